"""One file, all networks of a family: the weights of the largest once, and the statistics of each.

    runtime = Switchable.load("switchable.safetensors")
    runtime.measure(batch_size=1)                  # or trust the latencies in the file, if it is from such a machine
    runtime.use(runtime.choose(budget_ms=12))
    features = runtime(images)

Every network is made of torch.nn layers whose weights are views into the largest's, so that a switch costs nothing and
all of them together need hardly more memory than one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from . import latency
from .atomic import write_bytes
from .errors import InputError
from .exported import plain
from .latency import Latency
from .models import Classifier, Network, encoder_of
from .slim import slim
from .subnets import Family, Subnet

KIND, FORMAT = "dspnet-fast switchable", 1
WEIGHTS = "weights/"


class Switchable(nn.Module):
    """Images [N, 3, H, W] to features [N, F] by the network in use, at first the largest; for inference.

    A family of classifiers gives logits [N, classes].

    `load` reads one, `of` makes one of a family. Weights carry no gradient; `dspnet_fast.exported` has networks to
    train.

    Attributes:
        family: the networks, smallest first.
        image_size: height and width of the images that the family was pretrained on.
        normalization: {"mean": 3 numbers, "std": 3 numbers} of what the networks expect, for values from 0 to 1.
        class_names: of the logits; empty if there are none.
        latency: by name, as `measure` or the file has it; empty if nothing was measured.
        conditions: for which device, threads, batch and image size `latency` holds.
    """

    def __init__(
        self,
        network: str,
        stem: str,
        family: Family,
        tensors: Mapping[str, Tensor],
        image_size: int,
        normalization: Mapping[str, Any],
        class_names: Sequence[str] = (),
    ) -> None:
        """`tensors`: `weights/<parameter>` of the full network, `<dn>/<layer>.running_mean` and `.running_var`."""
        super().__init__()
        self.network, self.stem, self.family = network, stem, family
        self.image_size, self.normalization = image_size, dict(normalization)
        self.class_names = tuple(class_names)
        self.latency: dict[str, Latency] = {}
        self.conditions: dict[str, Any] = {}
        self._tensors = dict(tensors)
        self._build()
        self.use(family.full.name)
        super().train(False)

    @classmethod
    def of(
        cls,
        model: Network | Classifier,
        family: Family,
        image_size: int,
        normalization: Mapping[str, Any],
        class_names: Sequence[str] = (),
    ) -> Switchable:
        """The networks of `family`, all within `model` and with post-statistics; copies what it needs."""
        networks = {dn: slim(model, dn).cpu() for dn in family}
        tensors = {f"{WEIGHTS}{name}": weight.detach() for name, weight in networks[family.full].named_parameters()}
        for dn, network in networks.items():
            tensors |= {f"{dn}/{name}": network.get_buffer(name) for name in _statistics(network)}
        encoder = encoder_of(model)
        stem = "small" if encoder.small_stem else "standard"
        return cls(encoder.name, stem, family, tensors, image_size, normalization, class_names)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Switchable:
        """Read a file that `save` or `dspnet-export OUT --switchable` wrote; nothing in it is executed.

        Raises InputError if it is none, is damaged or is of another version.
        """
        tensors, manifest = _read(Path(path))
        try:
            family = Family(Subnet(dn["name"], tuple(dn["channels"]), tuple(dn["depths"])) for dn in manifest["dns"])
            made = cls(
                manifest["network"],
                manifest["stem"],
                family,
                tensors,
                manifest["image_size"],
                manifest["normalization"],
                manifest.get("class_names", ()),
            )
            made.latency = {name: Latency(**taken) for name, taken in manifest["latency"].items()}
            made.conditions = dict(manifest["conditions"])
            if made.latency and (set(made.latency) != set(made.names) or "batch_size" not in made.conditions):
                raise InputError("its latencies are not of its networks")
        except Exception as error:  # whatever does not fit: names, shapes, types, missing keys
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[-1].strip()
            raise InputError(f"{path} is damaged: {reason}") from error
        return made

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything, the latencies included, to one file; an existing one is replaced whole."""
        manifest = {
            "network": self.network,
            "stem": self.stem,
            "dns": [{"name": dn.name, "channels": dn.channels, "depths": dn.depths} for dn in self.family],
            "image_size": self.image_size,
            "normalization": self.normalization,
            "class_names": self.class_names,
            "conditions": self.conditions,
            "latency": {name: asdict(taken) for name, taken in self.latency.items()},
        }
        metadata = {"kind": KIND, "version": str(FORMAT), "manifest": json.dumps(manifest)}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._tensors.items()}
        write_bytes(Path(path), serialize(tensors, metadata))

    @property
    def names(self) -> tuple[str, ...]:
        """The networks' names, smallest first."""
        return self.family.names

    @property
    def active(self) -> str:
        """Name of the network in use."""
        return self._active

    def use(self, name: str) -> Self:
        """Compute as the network `name` from now on; InputError lists the names there are."""
        self._active = self.family.find(name).name
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Represent images [N, 3, H, W], normalised, by [N, F] of the network in use, or classify them."""
        return self._networks[self._active](images)

    @torch.no_grad()
    def measure(self, batch_size: int = 1, image_size: int | None = None, threads: int | None = None) -> None:
        """Time every network here, on the device that this is on, and keep it in `latency` for `choose`.

        Args:
            batch_size: images a call.
            image_size: their height and width, by default those of the pretraining.
            threads: of PyTorch while this measures, by default as many as it has now.
        """
        size = image_size or self.image_size
        weight = next(iter(self._tensors.values()))
        images = torch.randn(batch_size, 3, size, size, device=weight.device, dtype=weight.dtype)

        def caller(network: nn.Module) -> Callable[[], None]:
            def call() -> None:
                network(images)
                if images.is_cuda:
                    torch.cuda.synchronize(images.device)

            return call

        calls = {name: caller(network) for name, network in self._networks.items()}
        self.latency = latency.measure(calls, threads=threads)
        self.conditions = latency.conditions(images.device, threads, batch_size, size)

    def choose(self, budget_ms: float) -> str:
        """Name of the largest network whose median latency is at most `budget_ms` milliseconds; `use` takes it.

        Raises InputError if nothing was measured, or if no network is as fast as that.
        """
        if not self.latency:
            raise InputError("no latencies to choose by: call measure() first, on the machine that this will run on")
        within = [name for name in self.names if self.latency[name].median_ms <= budget_ms]
        if not within:
            fastest = min(self.latency, key=lambda name: self.latency[name].median_ms)
            raise InputError(
                f"no network takes at most {budget_ms:g} ms: the fastest, {fastest}, takes "
                f"{self.latency[fastest].median_ms:.3g} ms for a batch of {self.conditions['batch_size']}"
            )
        return within[-1]

    def train(self, mode: bool = True) -> Self:
        """Refuses to train: the networks are views of each other, with fixed statistics."""
        if mode:
            raise InputError("a Switchable is for inference: train a network of dspnet_fast.exported.load")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the one set of tensors; the networks become views of the new ones."""
        self._tensors = {name: fn(tensor) for name, tensor in self._tensors.items()}
        self._build()
        return self

    def _build(self) -> None:
        """Make the networks without memory of their own, and lay the tensors under them."""
        # in a dictionary, which torch.nn does not look into: as submodules they would be moved one by one
        self._networks = {dn.name: self._network(dn) for dn in self.family}
        used = {f"{WEIGHTS}{name}" for name, _ in self._networks[self.family.full.name].named_parameters()}
        used |= {f"{dn}/{name}" for dn, network in self._networks.items() for name in _statistics(network)}
        if used != self._tensors.keys():
            raise InputError(f"it holds tensors of no network: {', '.join(sorted(self._tensors.keys() - used)[:3])}")

    def _network(self, dn: Subnet) -> nn.Module:
        with torch.device("meta"):
            network = plain(self.network, dn, self.stem, len(self.class_names))
        state = {}
        for name, wanted in network.state_dict().items():
            if name.endswith("num_batches_tracked"):
                state[name] = torch.zeros((), dtype=torch.int64)
                continue
            shared = name not in _statistics(network)
            tensor = self._tensors.get(f"{WEIGHTS}{name}" if shared else f"{dn.name}/{name}")
            if tensor is None:
                raise InputError(f"{dn.name} has no {name}")
            if dn is self.family.full and tensor.numel() > wanted.numel():
                raise InputError(f"{name} is {list(tensor.shape)}, larger than the full network's {list(wanted.shape)}")
            if shared and tensor.ndim == wanted.ndim:
                tensor = tensor[tuple(slice(size) for size in wanted.shape)]
            if tensor.shape != wanted.shape or not tensor.is_floating_point():
                raise InputError(
                    f"{name} of {dn.name} is {list(tensor.shape)} of {tensor.dtype}, not {list(wanted.shape)}"
                )
            state[name] = tensor
        network.load_state_dict(state, assign=True)
        return network.requires_grad_(False).eval()


def _statistics(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_buffers() if name.endswith(("running_mean", "running_var"))}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and manifest of a file; InputError if it is not one of ours."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise InputError(
                    f"{path} holds no switchable family, which dspnet-export OUT --switchable writes; "
                    "a single network is read by dspnet_fast.exported.load"
                )
            if metadata.get("version") != str(FORMAT):
                raise InputError(
                    f"{path} has format {metadata.get('version')}, this version of dspnet-fast reads {FORMAT}: "
                    "export the family again"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        manifest = json.loads(metadata["manifest"])
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{path} is damaged: its manifest is no object")
    return tensors, manifest
