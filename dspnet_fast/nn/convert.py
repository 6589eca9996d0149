"""Make an existing network slimmable in place."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_iter

from .activate import activate, check_width
from .attributes import evaluation
from .batch_norm import SlimBatchNorm, SlimBatchNorm1d, SlimBatchNorm2d
from .conv import SlimConv2d
from .depth import use_stages, verified_stages
from .groups import OUTPUTS, ChannelGroups, Number, caches_of, find_groups, owned_tensors
from .labels import Conflict
from .linear import SlimLinear
from .numbers import guessed_numbers, known_numbers, tie_heads
from .selected import Selected, is_norm_act, selected_class
from .sized import Sized
from .tracing import Tracer, plain_operations

SLIMMABLE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: SlimConv2d,
    nn.Linear: SlimLinear,
    nn.BatchNorm1d: SlimBatchNorm1d,
    nn.BatchNorm2d: SlimBatchNorm2d,
}
OWN_TENSORS = {"weight", "bias", "running_mean", "running_var"}  # of the keys of SLIMMABLE
PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
VERIFIED_WIDTHS = (0.25, 0.5, 0.75)
IMAGE_SIZES = (64, 224, 32, 16, 299)


@plain_operations()
def slimmable(
    model: nn.Module, example: Any = None, keep: Iterable[str] = (OUTPUTS,), widths: Sequence[float] = VERIFIED_WIDTHS
) -> nn.Module:
    """Make a network slimmable, in place.

    The network runs once on an example, and every operation tells which channels must shrink together: those of a sum,
    of a depthwise convolution and its input, of an attention head. A network of any layers can be slimmed as long as
    its operations are understood. Parameters, buffers, hooks and names stay the same, so existing optimizers keep
    working. Until a subnet is activated, the network's outputs change by rounding only.

    Args:
        model: a network.
        example: an input, or a tuple of the inputs, with a batch of two or more; by default images of the size that the
            network was made for.
        keep: paths of modules whose channels all subnets keep. "outputs" stands for the channels of the network's
            outputs, such as the classes.
        widths: widths at which the network is tried.

    Returns:
        The network itself.

    Raises:
        TypeError: if a module cannot be slimmed; the message names it. The network is then unchanged.
        TypeError: if the network does not run on the example.
        ValueError: if `keep` names a module that the network does not have, or a width is not between 0 and 1.

    Example:
        >>> model = slimmable(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)), keep=())
        >>> type(model[0]).__name__
        'SlimConv2d'
        >>> with activate(model, 0.5):
        ...     model(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 8, 6, 6])
    """
    for width in widths:
        check_width(width)
    _refuse_unfit(model)
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    keep = _known_paths(model, keep)
    with evaluation(model):
        try:
            _undo(model)
            inputs = example_inputs(model, example)
            caches = caches_of(model)
            for path, name in caches:  # whose tensors have no labels
                setattr(model.get_submodule(path), name, {})
            groups = find_groups(model, [(model, inputs), *_training_run(model, inputs)], keep)
            if not groups.groups:
                warnings.warn(
                    "every channel of the network is kept: name the channels to keep with keep=, which is () for none",
                    stacklevel=3,
                )
            groups.numbers, groups.caches = known_numbers(model, groups), caches
            groups.inputs = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in inputs]
            stages, groups.stages = groups.stages, ()
            use_groups(model, groups)
            _verify(model, groups, inputs, widths)
            use_stages(model, stages)
            groups.stages = verified_stages(model, stages, inputs)
        except BaseException:
            for module, kind, attributes in before:
                module.__class__ = kind
                vars(module).clear()
                vars(module).update(attributes)
            raise
    return model


def _known_paths(model: nn.Module, keep: Iterable[str]) -> tuple[str, ...]:
    """The paths to keep; ValueError for one that the network does not have."""
    if isinstance(keep, str):
        raise TypeError(f"keep={keep!r}: give a tuple of paths, such as keep=({OUTPUTS!r}, {keep!r})")
    paths, known = tuple(keep), {OUTPUTS, *(path for path, _ in model.named_modules())}
    for path in paths:
        if path not in known:
            raise ValueError(f"keep: the network has no module {path!r}; see its named_modules()")
    return paths


def _undo(model: nn.Module) -> None:
    """Give layers that are converted already the classes that they had before, and activate the full network."""
    for module in model.modules():
        for name in (
            "channel_groups",
            "active_units",
            "active_selection",
            "skipped",
            "active_size",
            "active_dn",
            "views",
        ):
            vars(module).pop(name, None)
        if isinstance(module, Selected):
            module.__class__ = module.original_class  # type: ignore[assignment]


def refuse_lazy(model: nn.Module) -> None:
    """Raise TypeError for a module whose parameters have no sizes."""
    for path, module in model.named_modules():
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise _refusal(path, module, "its parameters have no sizes yet: run the network once", keepable=False)


def _refuse_unfit(model: nn.Module) -> None:
    """Raise TypeError for modules that cannot be traced, with what to do instead."""
    refuse_lazy(model)
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            reason = "TorchScript hides its operations: pass the network that it was made from"
        elif "_orig_mod" in module._modules:
            reason = (
                "torch.compile hides its operations: pass the network that it was made from, and compile the result"
            )
        elif ".quantized" in type(module).__module__ and type(module).__module__.startswith("torch.ao.nn."):
            reason = "its weights are quantised: pass the network before it is quantised"
        elif any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            reason = "its parameters are on the meta device, without values: load them first"
        else:
            continue
        raise _refusal(path, module, reason, keepable=False)


def example_inputs(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """Inputs on which a model runs: an example or a tuple of inputs that is given, or else images of a usual size."""
    with evaluation(model), torch.no_grad():
        return _that_run(model, example)


def _that_run(model: nn.Module, example: Any) -> tuple[Any, ...]:
    if example is not None:
        inputs = example if isinstance(example, tuple) else (example,)
        try:
            model(*inputs)
        except Exception as error:
            given = ", ".join(str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in inputs)
            raise TypeError(
                f"{type(model).__name__} does not run on the example that was given, {given}: {error}"
            ) from error
        return inputs
    problem: Exception | None = None
    for made in _examples(model):
        try:
            model(made)
            return (made,)
        except Exception as error:  # the size may not fit
            problem = problem or error
    raise TypeError(
        f"{type(model).__name__} does not run on the inputs that were tried ({problem}): give an example of its input"
    )


def _examples(model: nn.Module) -> Iterator[Tensor]:
    """Inputs that a model may take."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        yield torch.zeros(2, *config["input_size"], **like)
    for module in model.modules():
        if isinstance(module, _ConvNd):
            for size in IMAGE_SIZES:
                yield torch.zeros(2, module.in_channels, *[size] * len(module.kernel_size), **like)
            return
        if isinstance(module, nn.Linear):
            yield torch.zeros(2, module.in_features, **like)
            return


def _training_run(model: nn.Module, inputs: Any) -> Iterator[tuple[nn.Module, Any]]:
    """A copy in training mode, which may run further layers, with the same parameters and buffers of its own."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, memo).train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            twin(*inputs)
    except Exception:  # e.g. one value per channel: layers that run in training alone are then kept whole
        return
    yield twin, inputs


def _convert(path: str, module: nn.Module, groups: ChannelGroups) -> None:
    """Give a module the class that reduces its tensors to the active channels."""
    if isinstance(module, Sized | SlimBatchNorm) and not isinstance(module, Selected):
        if path in groups.tensors and not _is_prefix(path, groups):
            raise _refusal(path, module, "a subnet needs channels that are no prefix")
        return
    kind = type(module)
    tensors = groups.tensors.get(path, {})
    is_norm = isinstance(module, _BatchNorm)
    if is_norm and kind not in PLAIN_NORMS and not is_norm_act(kind):
        if not tensors:
            return
        raise _refusal(path, module, "it is a batch normalisation with its own forward method")
    if tensors.keys() & {"running_mean", "running_var"} and not is_norm and "Frozen" not in kind.__name__:
        raise _refusal(path, module, "its running statistics would mix those of all subnets")
    own = tensors.keys() <= OWN_TENSORS  # others are those of hooks, such as weight_orig of a pruned layer
    if kind in SLIMMABLE and own and path not in groups.foreign and _is_prefix(path, groups):
        module.__class__ = SLIMMABLE[kind]
    elif tensors or is_norm:
        reads_prefix = is_norm and path not in groups.foreign and _is_prefix(path, groups)  # as SlimBatchNorm does
        module.__class__ = selected_class(kind, () if reads_prefix else tuple(sorted(tensors)))
    if isinstance(module, SlimBatchNorm):
        module.measured = {}
        if kind.__name__.startswith("Sync"):
            world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
            module.process_group = module.process_group or world


def use_groups(model: nn.Module, groups: ChannelGroups) -> None:
    """Convert the layers of a network whose channel groups are known, in place."""
    for path, module in list(model.named_modules()):
        _convert(path, module, groups)
    model.channel_groups = groups  # type: ignore[assignment]
    model.active_units = groups.full()  # type: ignore[assignment]


def _is_prefix(path: str, groups: ChannelGroups) -> bool:
    return all(d.is_prefix for dimensions in groups.tensors.get(path, {}).values() for d in dimensions)


def _refusal(path: str, module: nn.Module, reason: str, keepable: bool = True) -> TypeError:
    original = next((plain for plain, made in SLIMMABLE.items() if type(module) is made), type(module))
    original = getattr(original, "original_class", original)
    kind = f"{original.__module__}.{original.__qualname__}"
    keep = f"; keep its channels with keep=({OUTPUTS!r}, {path!r})" if path and keepable else ""
    return TypeError(f"{path or 'the network'} ({kind}) cannot be slimmed: {reason}{keep}")


def _verify(model: nn.Module, groups: ChannelGroups, inputs: Any, widths: Sequence[float]) -> None:
    """Run subnets, and check that the same channels meet in them as in the full network.

    Where a subnet does not run, attributes that may count channels are made to follow them, one guess after another.
    """
    modules = dict(model.named_modules())
    with torch.no_grad():
        shapes = _shapes(model(*inputs))
    if not shapes:
        raise _refusal("", model, "no tensor is found in its output: return tensors, or tuples, lists or dicts of them")
    known, guesses, chosen = groups.numbers, dict[type, Iterator[list[Number]]](), dict[type, list[Number]]()
    verified: set[float] = set()
    while (width := next((width for width in widths if width not in verified), None)) is not None:
        failure = _failure(model, groups, inputs, width, shapes)
        if failure is None:
            verified.add(width)
            continue
        path, problem = failure
        running = [modules[name] for name in reversed(path)]  # and children, of which other methods may have run
        for kind in dict.fromkeys(type(of) for module in running for of in (module, *module.children())):
            if issubclass(kind, Sized) or getattr(kind, "original_class", kind).__module__.startswith("torch."):
                continue
            if tie_heads(model, groups, kind):
                break
            if kind not in guesses:
                guesses[kind] = guessed_numbers(model, groups, kind)
            guess = next(guesses[kind], None)
            chosen[kind] = guess or []
            if guess:
                break
        else:
            place = path[-1] if path else ""
            raise _refusal(place, modules[place], f"at width {width}, {problem}")
        groups.numbers = [*known, *(number for numbers in chosen.values() for number in numbers)]
        verified.clear()


def _failure(
    model: nn.Module, groups: ChannelGroups, inputs: Any, width: float, shapes: Any
) -> tuple[list[str], str] | None:
    """Where a subnet fails, as the paths of the running modules, and why."""
    labels, sources = groups.labels(owned_tensors(model))
    tracer = Tracer(labels, sources, {module: path for path, module in model.named_modules()})
    norms = [module for module in model.modules() if isinstance(module, SlimBatchNorm)]
    before = [(norm.measured, norm.track_running_stats) for norm in norms]
    try:
        with activate(model, groups.sizes(groups.at(width))):
            for norm in norms:
                norm.measured, norm.training, norm.track_running_stats = {}, True, False
            outputs = tracer.run(model, inputs)
    except Conflict as conflict:
        return tracer.path, str(conflict)
    except Exception as error:
        return tracer.path, str(error).splitlines()[0] if str(error) else type(error).__name__
    finally:
        for norm, (measured, tracks) in zip(norms, before, strict=True):
            norm.measured, norm.training, norm.track_running_stats = measured, False, tracks
    found = [tuple(tensor.shape) for tensor, _ in outputs]
    if groups.keeps_outputs and found != shapes:
        return [], f"the output has the shape {found} instead of {shapes}"
    return None


def _shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tree_iter(outputs) if isinstance(tensor, Tensor)]
