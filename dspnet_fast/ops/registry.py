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

The policy is `native`, `auto` (for each device the first of PRIORITY that accepts the arguments), `any` (like `auto`,
with the providers that were not yet measured), or a provider's name. It is initialised from DSPNET_KERNELS at import,
and is `native` if that is unset.
"""

import functools
import inspect
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from . import lazy_views

P = ParamSpec("P")
R = TypeVar("R")
Verdict = tuple[bool, str]  # (True, "") or (False, reason)

PRIORITY = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
CHOOSING = ("auto", "any")  # policies that choose among providers
PROVIDERS = ("native", "cpp", "triton", "cuda", "apex")
NO_IMPLEMENTATION = "no implementation of this operator"

_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

log = logging.getLogger(__name__)
operators: dict[str, "Operator[Any, Any]"] = {}


@dataclass(frozen=True)
class Provider:
    """One implementation of one operator.

    Attributes:
        name: one of PROVIDERS.
        run: the implementation, called with the operator's arguments.
        devices: supported device types.
        supported: whether this machine can run it; called once, when first needed.
        accepts: whether it supports the arguments at `places`; called on every call.
        places: positions of the arguments that `accepts` takes.
        unproven: reason why `auto` does not choose it, or empty.
        only_by_name: reason why neither `auto` nor `any` chooses it, or empty.
    """

    name: str
    run: Callable[..., Any]
    devices: tuple[str, ...]
    supported: Callable[[], Verdict]
    accepts: Callable[..., Verdict]
    places: tuple[int, ...]
    unproven: str
    only_by_name: str


def _yes() -> Verdict:
    return True, ""


class Operator(Generic[P, R]):
    """A torch.library operator that passes each call to a provider. Call it like the function it was made from."""

    def __init__(self, body: Callable[..., R], mutates: Sequence[str], checks: Sequence[Callable[..., None]]):
        self.name = body.__name__
        self.providers: dict[str, Provider] = {}
        self._signature = inspect.signature(body)
        self.parameters = list(self._signature.parameters)
        self.checks = [(check, self._places(check)) for check in checks]

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
        self._returns = not schema.endswith("-> ()")
        if self._returns:
            self._custom.register_fake(self.native)
        self._function: type[torch.autograd.Function] | None = None
        functools.update_wrapper(self, body)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._returns or kwargs or not _is_plain_eager(args):
            return self._call(*args, **kwargs)
        # Autograd through the dispatcher takes three times as long as a small convolution.
        if not (torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)):
            return self._run(*args)
        return self._call(*args) if self._function is None else self._function.apply(*args)  # type: ignore[call-arg]

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
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function as this operator's provider.

        Args:
            name: one of PROVIDERS but `native`.
            devices: supported device types.
            supported: whether this machine can run it; called once, when first needed.
            accepts: whether it supports a call's arguments; gets those that its parameters name, or all as `*args`.
            unproven: reason why `auto` does not choose it, or empty.
            only_by_name: reason why neither `auto` nor `any` chooses it, or empty.

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
                name, run, devices, functools.cache(supported), accepts, places, unproven, only_by_name
            )
            _candidates.cache_clear()
            return run

        return register

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Register the gradient, as torch.library.register_autograd does.

        `backward` may return gradients of inputs that need none, which are dropped, and omit a trailing None.
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
    *, mutates: Sequence[str] = (), checks: Sequence[Callable[..., None]] = ()
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Make the operator `dspnet::<name>` from a function, its native body.

    Args:
        mutates: names of the arguments that it writes to.
        checks: functions that raise an error for invalid arguments, called before the native body. Each gets the
            arguments that its parameters name.
    """

    def register(body: Callable[P, R]) -> Operator[P, R]:
        made: Operator[P, R] = Operator(body, mutates, checks)
        operators[made.name] = made
        return made

    return register


def set_policy(policy: str) -> None:
    """Set the policy: `native`, `auto`, `any`, or a provider's name, for the operators that have it.

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


def fast_kernels() -> dict[str, str]:
    """Apply a command's --fast-kernels: set the policy `auto`, unless DSPNET_KERNELS names another. Returns serving().

    Logs a warning for each provider that could run on this machine's accelerator but that `auto` does not choose.
    """
    set_policy(_policy_of_environment or "auto")
    if _policy == "auto":
        able = (provider for name in operators for provider in _able(name, _accelerator()))
        for provider, reason in sorted({(p.name, p.unproven) for p in able if p.unproven}):
            log.warning("--fast-kernels does not use %s: %s", provider, reason)
    return serving()


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
    available, reason = provider.supported()
    return {"available": available, "reason": provider.only_by_name or provider.unproven if available else reason}


@functools.cache
def _candidates(name: str, device: str) -> tuple[Provider, ...]:
    """The providers to try, in order, before the native body."""
    providers = operators[name].providers
    if _policy == "native":
        return ()
    if _policy in CHOOSING:
        return tuple(p for p in _able(name, device) if _policy == "any" or not p.unproven)
    _check(_policy)
    if _policy not in providers:
        return ()
    provider = providers[_policy]
    if device not in provider.devices:
        serves = " and ".join(provider.devices)
        raise InputError(f"{name}: {_policy} was chosen by name, but it runs on {serves}, not {device}")
    return (provider,)


def _able(name: str, device: str) -> Iterator[Provider]:
    """The providers that this machine can run on a device type, in order of priority."""
    providers = operators[name].providers
    ordered = (providers[p] for p in PRIORITY.get(device, ()) if p in providers)
    return (p for p in ordered if not p.only_by_name and device in p.devices and p.supported()[0])


def _accelerator() -> str:
    """The device type of this machine's accelerator."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check(policy: str) -> None:
    if policy in ("native", *CHOOSING):
        return
    if policy not in PROVIDERS:
        raise InputError(f"unknown kernel provider {policy!r}: use {', '.join((*CHOOSING, *PROVIDERS))}")
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


def _is_plain_eager(args: tuple[Any, ...]) -> bool:
    """Whether only autograd observes this call: no compiler, mode, transform, subclass, fake tensor or lazy view."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    return all(
        type(arg) in (Tensor, torch.nn.Parameter) and not (arg.is_meta or lazy_views.is_lazy(arg))
        for arg in args
        if isinstance(arg, Tensor)
    )


_policy_of_environment = os.environ.get("DSPNET_KERNELS", "")
_policy = _policy_of_environment or "native"  # validated at first use, so that `info` still starts
