"""Operators and their providers: what may run where, what runs now, and why not something else.

An operator is one Python function whose body, in plain PyTorch, is its specification, its documentation, its fake (the
shapes under torch.compile) and its provider `native`. `@operator` makes it a torch.library operator in the namespace
`dspnet`. A provider is a faster implementation with the same signature:

    @operator(mutates=("targets",))
    def ema_update(targets: Sequence[Tensor], onlines: Sequence[Tensor], tau: float) -> None: ...

    @ema_update.provider("cpp", devices=("cpu",), supported=lambda: (True, ""), accepts=lambda tau: (True, ""))
    def _(targets, onlines, tau): ...

Which provider serves a call is decided at run time inside the operator, so a compiled graph holds only the operator. An
ordinary eager call takes the same way without the dispatcher. A gradient that providers are to serve is an operator of
its own, called by the one given to `register_autograd`.

The policy is `native`, `auto` (per device the first of PRIORITY that accepts the arguments), `any` (the same, with the
providers that nobody has measured yet), or a provider's name. It starts as DSPNET_KERNELS, read once at import, and is
`native` without it.
"""

import functools
import inspect
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
Verdict = tuple[bool, str]  # (yes, "") or (no, why)

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

    devices: the device types it serves. supported: whether this machine can run it, asked once, when first needed.
    accepts: whether it takes the arguments at `places`, asked on every call. unproven: why `auto` does not choose it,
    if so. only_by_name: why `any` does not either.
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
    """A torch.library operator that hands each call to a provider. Call it like the function that it was made from."""

    def __init__(self, native: Callable[P, R], mutates: Sequence[str]):
        self.name = native.__name__
        self.native: Callable[..., R] = native
        self.providers: dict[str, Provider] = {}
        self._signature = inspect.signature(native)
        self._parameters = list(self._signature.parameters)
        self._reported: set[str] = set()
        schema = torch.library.infer_schema(native, mutates_args=mutates)
        self._custom = torch.library.custom_op(f"dspnet::{self.name}", self._run, mutates_args=mutates, schema=schema)
        self._call: Callable[P, R] = getattr(torch.ops.dspnet, self.name).default
        lazy_views.refuse_where_written(self._call)
        self._returns = not schema.endswith("-> ()")
        if self._returns:
            self._custom.register_fake(native)
        self._function: type[torch.autograd.Function] | None = None
        functools.update_wrapper(self, native)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._returns or kwargs or not _is_plain_eager(args):
            return self._call(*args, **kwargs)
        # The dispatcher's way through autograd costs three times as much as a small convolution.
        if not (torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)):
            return self._run(*args)
        return self._call(*args) if self._function is None else self._function.apply(*args)  # type: ignore[call-arg]

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
        """Decorates the implementation `name` of this operator, a function with the operator's parameters, or `*args`.

        `accepts` receives the arguments that its parameters name; as `*args` it receives all. Raises TypeError for
        parameters that the operator does not have.
        """
        assert name in PROVIDERS and name != "native"
        places = self._places(accepts)

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            if self._places(run) != tuple(range(len(self._parameters))):
                raise TypeError(f"{self.name}: {name} must take {', '.join(self._parameters)}, or *args")
            self.providers[name] = Provider(
                name, run, devices, functools.cache(supported), accepts, places, unproven, only_by_name
            )
            _candidates.cache_clear()
            return run

        return register

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Registers the gradient, as torch.library.register_autograd does."""
        self._custom.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:
            # An output that a provider made as a view would be one for autograd, which lets nobody write to it.
            with torch._C._ExcludeDispatchKeyGuard(_VIEWS):
                output = self._run(*args)
            setup_context(ctx, args, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self.name, (torch.autograd.Function,), members)

    def _places(self, function: Callable[..., Any]) -> tuple[int, ...]:
        """Which of the operator's arguments a function takes by its parameters' names; those that are left by *args."""
        places: list[int] = []
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                places += range(len(places), len(self._parameters))
            elif name in self._parameters:
                places.append(self._parameters.index(name))
            else:
                raise TypeError(f"{self.name} has no argument {name}: it has {', '.join(self._parameters)}")
        return tuple(places)

    def _run(self, *args: Any) -> Any:
        if len(args) < len(self._parameters):
            bound = self._signature.bind(*args)
            bound.apply_defaults()
            args = bound.args
        device = _device_type(args)
        for provider in _candidates(self.name, device) if device else ():
            accepted, reason = provider.accepts(*[args[place] for place in provider.places])
            if accepted:
                return provider.run(*args)
            if _policy not in CHOOSING:
                raise InputError(f"{self.name}: {provider.name} was asked for by name, but {reason}")
            if provider.name not in self._reported:
                self._reported.add(provider.name)
                log.warning("%s: not by %s, because %s (reported once)", self.name, provider.name, reason)
        return self.native(*args)


def operator(*, mutates: Sequence[str] = ()) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Makes `dspnet::<name>` out of a function. mutates: the arguments that it writes to."""

    def register(native: Callable[P, R]) -> Operator[P, R]:
        made = Operator(native, mutates)
        operators[made.name] = made
        return made

    return register


def set_policy(policy: str) -> None:
    """Chooses among providers from now on: `native`, `auto`, `any`, or a provider's name, for operators that have it.

    Raises InputError if there is no such provider, or if this machine cannot run it.
    """
    _check(policy)
    global _policy
    _policy = policy
    _candidates.cache_clear()


def get_policy() -> str:
    """The policy in force."""
    return _policy


def fast_kernels() -> dict[str, str]:
    """What a command's --fast-kernels means: `auto`, unless DSPNET_KERNELS says otherwise. Returns serving().

    Warns of providers that could serve this machine's accelerator and that `auto` leaves out.
    """
    set_policy(_policy_of_environment or "auto")
    if _policy == "auto":
        able = (provider for name in operators for provider in _able(name, _accelerator()))
        for provider, reason in sorted({(p.name, p.unproven) for p in able if p.unproven}):
            log.warning("--fast-kernels leaves out %s: %s", provider, reason)
    return serving()


def serving(device: str | None = None) -> dict[str, str]:
    """The provider that comes first for each operator on a device type, by default that of the machine's accelerator.

    A call whose arguments that provider does not accept goes to the next one. Raises InputError as set_policy does.
    """
    device = device or _accelerator()
    return {name: next((p.name for p in _candidates(name, device)), "native") for name in operators}


def describe() -> dict[str, dict[str, dict[str, Any]]]:
    """{operator: {provider: {"available": bool, "reason": str}}}: the reason says why not, or why only by name."""
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
    """The providers to ask, in order, before the native body."""
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
        raise InputError(f"{name}: {_policy} was asked for by name, but it serves {serves}, not {device}")
    return (provider,)


def _able(name: str, device: str) -> Iterator[Provider]:
    """The providers that can be chosen on this device type of this machine, in order."""
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
        raise InputError(f"no kernel provider is called {policy!r}: use {', '.join((*CHOOSING, *PROVIDERS))}")
    having = {name: op.providers[policy] for name, op in operators.items() if policy in op.providers}
    if not having:
        raise InputError(f"{policy} was asked for by name, but no operator has a {policy} implementation")
    for name, provider in having.items():
        supported, reason = provider.supported()
        if not supported:
            raise InputError(f"{name}: {policy} was asked for by name, but {reason}")


def _device_type(args: tuple[Any, ...]) -> str | None:
    """That of the first tensor among the arguments. None, as for empty lists, leaves the call to the native body."""
    for arg in args:
        if isinstance(arg, (list, tuple)) and arg:
            arg = arg[0]
        if isinstance(arg, Tensor):
            return arg.device.type
    return None


def _is_plain_eager(args: tuple[Any, ...]) -> bool:
    """Whether nobody but autograd wants to see this call: no compiler, mode, transform, subclass, fake or lazy view."""
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
_policy = _policy_of_environment or "native"  # a wrong name is reported by the first use, so that `info` still starts
