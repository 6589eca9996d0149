"""Operators and their providers: registration, and the choice of a provider for each call.

An operator is one Python function whose body, in plain PyTorch, is its specification, its fake implementation (the
shapes under torch.compile) and its provider `native`. `@operator` makes it a torch.library operator in the namespace
`dspnet`. A provider is a faster implementation with the same signature:

    @operator(mutates=("targets",), checks=(check_tau,))
    def ema_update(targets: Sequence[Tensor], onlines: Sequence[Tensor], tau: float) -> None: ...

    @ema_update.provider("cpp", devices=("cpu",), supported=lambda: (True, ""), accepts=lambda tau: (True, ""))
    def _(targets, onlines, tau): ...

The operator chooses the provider of each call at run time, so a compiled graph contains only the operator. Plain eager
calls choose the same way, but bypass the dispatcher. A gradient with providers is a separate operator, called by the
backward function passed to `register_autograd`.

The policy also decides the formulation of networks (docs/formulation.md). With `eager`, the default, slimmable layers
compute in plain PyTorch, and operators run their native bodies. With all others convolution and batch normalisation are
operators: `native` runs their specifications, `auto` the first provider of PRIORITY that accepts the arguments, `any`
also providers that were not yet measured, and a provider's name that provider. The policy is initialised from
DSPNET_KERNELS at import. What was found about providers on this device (`use_findings`) restricts and extends `auto`.
"""

import functools
import inspect
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from . import autocast, cpp, lazy_views
from .autocast import is_autocasting
from .provider import Provider, Verdict

P = ParamSpec("P")
R = TypeVar("R")

PRIORITY = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
NATIVE = ("eager", "native")  # policies without providers
CHOOSING = ("auto", "any")  # policies that choose among providers
CONVOLUTIONS = ("conv_moments", "conv_moments_backward")  # operators that take most of a step
PROVIDERS = ("native", "cpp", "triton", "cuda", "apex")
NO_IMPLEMENTATION = "no implementation of this operator"

_PLAIN = (Tensor, torch.nn.Parameter)
_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

log = logging.getLogger(__name__)
operators: dict[str, "Operator[Any, Any]"] = {}
_findings: dict[tuple[str, str], str] = {}


def _yes() -> Verdict:
    return True, ""


class Operator(Generic[P, R]):
    """A torch.library operator that passes each call to a provider. Call it like the function it was made from."""

    def __init__(
        self,
        body: Callable[..., R],
        mutates: Sequence[str],
        checks: Sequence[Callable[..., None]],
        cast: Sequence[str],
        parts: Sequence[str],
    ):
        self.name = body.__name__
        self.parts = tuple(parts)
        self.providers: dict[str, Provider] = {}
        self._signature = inspect.signature(body)
        self.parameters = list(self._signature.parameters)
        self.checks = [(check, self._places(check)) for check in checks]
        self._cast_places = tuple(map(self.parameters.index, cast))

        @functools.wraps(body)
        def native(*args: Any, **kwargs: Any) -> R:
            if kwargs or len(args) < len(self.parameters):
                args = self._complete(*args, **kwargs)
            self.check(*args)
            return body(*args)

        self.native: Callable[..., R] = native if checks else body
        self._reported: set[str] = set()
        schema = torch.library.infer_schema(body, mutates_args=mutates)
        self._custom = torch.library.custom_op(f"dspnet::{self.name}", self._run, mutates_args=mutates, schema=schema)
        self._call: Callable[P, R] = getattr(torch.ops.dspnet, self.name).default
        lazy_views.refuse_where_written(self._call)
        self._library = torch.library.Library("dspnet", "IMPL")
        for key in autocast.DISPATCH_KEYS:
            self._library.impl(self.name, self._call_autocast, key)
        self._returns = not schema.endswith("-> ()")
        if self._returns:
            self._custom.register_fake(self.native)
        self._function: type[torch.autograd.Function] | None = None
        functools.update_wrapper(self, body)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._returns or kwargs or not is_plain_eager(args):
            return self._call(*args, **kwargs)
        if not torch._C._is_any_autocast_enabled():
            return self._call_plain(args)
        args = self._cast(args)  # type: ignore[assignment]
        with autocast.disabled():
            return self._call_plain(args)

    def _call_plain(self, args: tuple[Any, ...]) -> R:
        """A call that only autograd observes."""
        # Autograd through the dispatcher takes three times as long as a small convolution.
        if not torch.is_grad_enabled():
            return self._run(*args)
        recorded = self.recorded(*args)
        if recorded is not None:
            return recorded(*args)
        if not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return self._run(*args)
        return self._call(*args) if self._function is None else self._function.apply(*args)  # type: ignore[call-arg]

    def _call_autocast(self, *args: Any) -> R:
        """A call by the dispatcher under autocast."""
        args = self._cast(args)
        with autocast.disabled():
            return self._call(*args)  # type: ignore[call-arg]

    def _cast(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return autocast.cast(args, self._cast_places, _device_type(args))

    def recorded(self, *args: Any) -> Callable[..., Any] | None:
        """The function `autograd` of the provider that is chosen for these arguments.

        None if the provider has none, if the gradient's operator has another provider, or for incomplete arguments.
        """
        device = _device_type(args)
        provider = _recording(self.name, device) if device and len(args) == len(self.parameters) else None
        if provider is None or not provider.accepts(*[args[place] for place in provider.places])[0]:
            return None
        return provider.autograd

    def check(self, *args: Any) -> None:
        """Raise an error if an argument is invalid. For providers that do not check their arguments."""
        for check, places in self.checks:
            check(*map(args.__getitem__, places))

    def provider(
        self,
        name: str,
        *,
        devices: tuple[str, ...],
        supported: Callable[[], Verdict] = _yes,
        accepts: Callable[..., Verdict] = _yes,
        unproven: str = "",
        only_by_name: str = "",
        autograd: Callable[..., Any] | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function as this operator's provider.

        Args:
            name: one of PROVIDERS but `native`.
            devices: supported device types.
            supported: whether this machine can run it; called once, when first needed.
            accepts: whether it supports a call's arguments; gets those that its parameters name, or all as `*args`.
            unproven: reason why `auto` does not choose it, or empty.
            only_by_name: reason why neither `auto` nor `any` chooses it, or empty.
            autograd: a function of the operator's arguments that computes the same results and records the gradient.

        Returns:
            A decorator of a function with the operator's parameters, or `*args`.

        Raises:
            TypeError: if a function has parameters that the operator does not have.
        """
        assert name in PROVIDERS and name != "native"
        places = self._places(accepts)

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            if self._places(run) != tuple(range(len(self.parameters))):
                raise TypeError(f"{self.name}: {name} must take {', '.join(self.parameters)}, or *args")
            self.providers[name] = Provider(
                name, run, devices, functools.cache(supported), accepts, places, unproven, only_by_name, autograd
            )
            _candidates.cache_clear()
            return run

        return register

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Register the gradient, as torch.library.register_autograd does.

        `backward` may return gradients of inputs that need none, which are dropped, and omit trailing Nones.
        """

        def needed(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            gradients = itertools.zip_longest(backward(ctx, *grads), ctx.needs_input_grad)
            return tuple(gradient if wanted else None for gradient, wanted in gradients)

        self._custom.register_autograd(needed, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:
            # Otherwise autograd would track an output that is a view as one, and forbid in-place writes to it.
            with torch._C._ExcludeDispatchKeyGuard(_VIEWS):
                output = self._run(*args)
            setup_context(ctx, args, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(needed)}
        self._function = type(self.name, (torch.autograd.Function,), members)

    def _places(self, function: Callable[..., Any]) -> tuple[int, ...]:
        """Positions of the operator's arguments that a function takes, by parameter name; `*args` are the remaining.

        From the first parameter with a default that the operator does not have, parameters keep their defaults.
        """
        places: list[int] = []
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                places += range(len(places), len(self.parameters))
            elif name in self.parameters:
                places.append(self.parameters.index(name))
            elif parameter.default is parameter.empty:
                raise TypeError(f"{self.name} has no argument {name}: it has {', '.join(self.parameters)}")
            else:
                break
        return tuple(places)

    def _complete(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """All arguments by position, with defaults."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def _run(self, *args: Any) -> Any:
        if len(args) < len(self.parameters):
            args = self._complete(*args)
        device = _device_type(args)
        for provider in _candidates(self.name, device) if device else ():
            accepted, reason = provider.accepts(*[args[place] for place in provider.places])
            if accepted:
                return provider.run(*args)
            if _policy not in CHOOSING:
                raise InputError(f"{self.name}: {provider.name} was chosen by name, but {reason}")
            if provider.name not in self._reported:
                self._reported.add(provider.name)
                log.warning("%s: %s is not used, because %s (reported once)", self.name, provider.name, reason)
        return self.native(*args)


def operator(
    *,
    mutates: Sequence[str] = (),
    checks: Sequence[Callable[..., None]] = (),
    autocast: Sequence[str] = (),
    parts: Sequence[str] = (),
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Make the operator `dspnet::<name>` from a function, its native body.

    Args:
        mutates: names of the arguments that it writes to.
        checks: functions that raise an error for invalid arguments, called before the native body. Each gets the
            arguments that its parameters name.
        autocast: names of the arguments that are cast to the dtype of autocast. The body itself runs without autocast.
        parts: names of the operators that the body calls, each by its own provider. Their gradients are its gradient,
            and a provider that was refused for one of them is not used for it.
    """

    def register(body: Callable[P, R]) -> Operator[P, R]:
        made: Operator[P, R] = Operator(body, mutates, checks, autocast, parts)
        operators[made.name] = made
        return made

    return register


def set_policy(policy: str) -> None:
    """Set the policy: `eager`, `native`, `auto`, `any`, or a provider's name, for the operators that have it.

    Raises:
        InputError: if no such provider exists, or this machine cannot run it.
    """
    _check(policy)
    global _policy
    _policy = policy
    _candidates.cache_clear()


def get_policy() -> str:
    """The current policy."""
    return _policy


def is_eager() -> bool:
    """Whether slimmable layers compute in plain PyTorch instead of by operators."""
    return _policy == "eager"


def uses_pytorch(device: torch.device) -> bool:
    """Whether layers call PyTorch's functions: with the policy `eager`, and under autocast, which casts for them."""
    return is_eager() or is_autocasting(device)


def defers_normalization(device: torch.device) -> bool:
    """Whether layers of a network that `fused` has prepared defer normalisation: with the operators, outside of
    compilers and transforms. Under autocast only in bfloat16, which the operators support."""
    if is_eager() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if not torch._C._is_any_autocast_enabled() or not is_autocasting(device):
        return True
    return torch.get_autocast_dtype(device.type) == torch.bfloat16


def policy_of_environment() -> str:
    """The policy that DSPNET_KERNELS gave at import, or an empty string."""
    return _policy_of_environment


@contextmanager
def triton_on_meta() -> Iterator[None]:
    """Calls on meta tensors run the provider `triton` if calls on a GPU would, to observe its launches (ahead.py)."""
    global _triton_on_meta
    _triton_on_meta = True
    _candidates.cache_clear()
    try:
        yield
    finally:
        _triton_on_meta = False
        _candidates.cache_clear()


def use_findings(findings: Mapping[tuple[str, str], str]) -> None:
    """Make `auto` use the providers that were verified on this device, and not those that were refused.

    Args:
        findings: for pairs of operator and provider the reason against it, or an empty string if it was verified.
            Replaces earlier findings; for all other pairs a provider's own note `unproven` decides.
    """
    global _findings
    _findings = dict(findings)
    _candidates.cache_clear()


def fast_kernels(device: str | None = None) -> dict[str, str]:
    """Set the policy of --fast-kernels where nothing was verified: DSPNET_KERNELS, else `auto` if it is known to be
    faster than plain PyTorch, else `eager`.

    Args:
        device: device type, by default the accelerator's.

    Returns:
        As `serving`.
    """
    device = device or _accelerator()
    set_policy(_policy_of_environment or ("auto" if known_to_be_fast(device) else "eager"))
    return serving(device)


def known_to_be_fast(device: str, precision: str = "fp32") -> bool:
    """Whether operators are known to be faster than plain PyTorch on a device type, without a race.

    Convolutions must have a provider that is not marked unproven, and on a CPU the compiled library must be one that
    was measured to be faster.

    Args:
        device: device type.
        precision: "fp32", "bf16" or "fp16".
    """
    if precision == "fp16" or (device == "cpu" and not cpp.is_fast(precision)):
        return False
    return all(any(not provider.unproven for provider in available(name, device)) for name in CONVOLUTIONS)


def serving(device: str | None = None) -> dict[str, str]:
    """The provider with the highest priority for each operator on a device type, by default that of the accelerator.

    A call whose arguments that provider rejects goes to the next one. Raises InputError as set_policy does.
    """
    device = device or _accelerator()
    return {name: next((p.name for p in _candidates(name, device)), "native") for name in operators}


def describe() -> dict[str, dict[str, dict[str, Any]]]:
    """{operator: {provider: {"available": bool, "reason": str}}}: why it is unavailable, or not chosen by `auto`."""
    return {name: {provider: _describe(op, provider) for provider in PROVIDERS} for name, op in operators.items()}


def _describe(op: Operator[Any, Any], name: str) -> dict[str, Any]:
    if name == "native":
        return {"available": True, "reason": ""}
    provider = op.providers.get(name)
    if provider is None:
        return {"available": False, "reason": NO_IMPLEMENTATION}
    runs, reason = provider.supported()
    return {"available": runs, "reason": _objection(op.name, provider) if runs else reason}


def _objection(operator: str, provider: Provider) -> str:
    """The reason why `auto` does not choose a provider that can run, or an empty string."""
    for part in operators[operator].parts:
        if refusal := _findings.get((part, provider.name)):
            return f"{part}: {refusal}"
    return provider.only_by_name or _findings.get((operator, provider.name), provider.unproven)


@functools.cache
def _candidates(name: str, device: str) -> tuple[Provider, ...]:
    """The providers to try, in order, before the native body."""
    if device == "meta":
        return tuple(p for p in _candidates(name, "cuda") if p.name == "triton") if _triton_on_meta else ()
    providers = operators[name].providers
    if _policy in NATIVE:
        return ()
    if _policy in CHOOSING:
        return tuple(p for p in available(name, device) if _policy == "any" or not _objection(name, p))
    _check(_policy)
    if _policy not in providers:
        return ()
    provider = providers[_policy]
    if device not in provider.devices:
        serves = " and ".join(provider.devices)
        raise InputError(f"{name}: {_policy} was chosen by name, but it runs on {serves}, not {device}")
    return (provider,)


def _recording(name: str, device: str) -> Provider | None:
    """The first provider of an operator if it records gradients and its gradient's operator has the same one first.

    An operator of several parts records gradients if all its parts do, by the same provider.
    """
    providers = _candidates(name, device)
    if not providers or providers[0].autograd is None:
        return None
    first = providers[0]
    if parts := operators[name].parts:
        found = [_recording(part, device) for part in parts]
    else:
        found = [*_candidates(f"{name}_backward", device)[:1]] or [None]
    return first if all(other is not None and other.name == first.name for other in found) else None


def available(name: str, device: str) -> Iterator[Provider]:
    """The providers of an operator that this machine can run on a device type and that may be chosen, best first."""
    providers = operators[name].providers
    ordered = (providers[p] for p in PRIORITY.get(device, ()) if p in providers)
    return (p for p in ordered if not p.only_by_name and device in p.devices and p.supported()[0])


def _accelerator() -> str:
    """The device type of this machine's accelerator."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check(policy: str) -> None:
    if policy in (*NATIVE, *CHOOSING):
        return
    if policy not in PROVIDERS:
        raise InputError(f"unknown kernel provider {policy!r}: use {', '.join(('eager', *CHOOSING, *PROVIDERS))}")
    having = {name: op.providers[policy] for name, op in operators.items() if policy in op.providers}
    if not having:
        raise InputError(f"{policy} was chosen by name, but no operator has a {policy} implementation")
    for name, provider in having.items():
        supported, reason = provider.supported()
        if not supported:
            raise InputError(f"{name}: {policy} was chosen by name, but {reason}")


def _device_type(args: tuple[Any, ...]) -> str | None:
    """The device type of the first tensor among the arguments; None without tensors, which selects the native body."""
    for arg in args:
        if isinstance(arg, (list, tuple)) and arg:
            arg = arg[0]
        if isinstance(arg, Tensor):
            return arg.device.type
    return None


def is_plain_eager(args: tuple[Any, ...]) -> bool:
    """Whether only autograd observes this call: no compiler, mode, transform, subclass, fake tensor or lazy view."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    for arg in args:  # not all(...) of a generator, which takes twice as long in every call
        if isinstance(arg, Tensor) and (
            type(arg) not in _PLAIN or (arg.is_meta and not _triton_on_meta) or arg.is_neg() or arg.is_conj()
        ):
            return False
    return True


_policy_of_environment = os.environ.get("DSPNET_KERNELS", "")
_policy = _policy_of_environment or "eager"  # validated at first use, so that `info` still starts
_triton_on_meta = False
