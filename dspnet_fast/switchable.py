"""One file with all networks of a family: the weights of the largest, and the batch normalisation statistics of each.

    runtime = Switchable.load("switchable.safetensors")
    runtime.measure(batch_size=1)                  # not needed if the file has latencies of such a machine
    runtime.use(runtime.choose(budget_ms=12))
    features = runtime(images)

Every network consists of torch.nn layers whose weights are views of the largest network's, so switching costs nothing
and all networks together need little more memory than the largest.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import latency
from .errors import InputError
from .exported import plain
from .latency import Latency
from .models import Classifier, Network, encoder_of
from .slim import slim
from .subnets import Family, Subnet
from .tensor_file import write_tensors
from .weight_file import load_state

KIND, FORMAT = "dspnet-fast switchable", 1
WEIGHTS = "weights/"
EIGHT_BIT_RGB = {"channels": 3, "range": [0, 255]}


class Switchable(nn.Module):
    """Images [N, C, H, W] to features [N, F], or logits [N, classes] for classifiers, by the active network of a
    family.

    The largest network is active at first. For inference only: weights have no gradients. To train an exported network,
    use `dspnet_fast.exported.load`. Make a Switchable with `load` or `of`.

    Attributes:
        family: the networks, smallest first.
        image_size: height and width of the images that the family was pretrained on.
        normalization: {"mean": C numbers, "std": C numbers} to normalise images with values from 0 to 1.
        pixels: {"channels": C, "range": the two values that are rescaled to 0 and 1}.
        class_names: names of the logits; empty for networks that return features.
        latency: latency of each network by name, from `measure` or the file; empty if not measured.
        conditions: device, threads, batch size and image size of `latency`.

    Example:
        >>> full = Subnet("c8-d1111", (8, 8, 16, 32, 64), (1, 1, 1, 1))
        >>> runtime = Switchable.of(build("resnet", full, "small"), Family([full]), 32, {"mean": [0.5], "std": [0.2]})
        >>> runtime.use("c8-d1111")(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 64])
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
        pixels: Mapping[str, Any] = EIGHT_BIT_RGB,
    ) -> None:
        """Make a Switchable of tensors; `load` and `of` call this.

        Args:
            network: a key of `models.NETWORKS`.
            stem: "standard" or "small".
            family: the networks.
            tensors: `weights/<parameter>` of the full network; `<subnet>/<layer>.running_mean` and `.running_var` of
                each.
            image_size: height and width of the images that the family was pretrained on.
            normalization: {"mean": C numbers, "std": C numbers} to normalise images with values from 0 to 1.
            class_names: names of the logits; empty for networks that return features.
            pixels: {"channels": C, "range": the two values that are rescaled to 0 and 1}; by default 8-bit RGB.
        """
        super().__init__()
        self.network, self.stem, self.family = network, stem, family
        self.image_size, self.normalization = image_size, dict(normalization)
        self.class_names = tuple(class_names)
        self.pixels = dict(pixels)
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
        pixels: Mapping[str, Any] = EIGHT_BIT_RGB,
    ) -> Switchable:
        """Make a Switchable of a pretrained model; the tensors are copied.

        Args:
            model: a slimmable model with post-statistics of all networks of `family`.
            family: the networks.
            image_size: height and width of the images that the family was pretrained on.
            normalization: {"mean": C numbers, "std": C numbers} to normalise images with values from 0 to 1.
            class_names: names of the logits; empty for networks that return features.
            pixels: {"channels": C, "range": the two values that are rescaled to 0 and 1}; by default 8-bit RGB.

        Raises:
            RuntimeError: if no statistics were measured for a network.
        """
        networks = {dn: slim(model, dn).cpu() for dn in family}
        tensors = {f"{WEIGHTS}{name}": weight.detach() for name, weight in networks[family.full].named_parameters()}
        for dn, network in networks.items():
            tensors |= {f"{dn}/{name}": network.get_buffer(name) for name in _statistics(network)}
        encoder = encoder_of(model)
        stem = "small" if encoder.small_stem else "standard"
        return cls(encoder.name, stem, family, tensors, image_size, normalization, class_names, pixels)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Switchable:
        """Read a file written by `save` or `dspnet-export OUT --switchable`. Nothing in the file is executed.

        Args:
            path: the file.

        Raises:
            InputError: if the file is not of this kind, damaged, or of another version.
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
                manifest.get("pixels", EIGHT_BIT_RGB),
            )
            made.latency = {name: Latency(**taken) for name, taken in manifest["latency"].items()}
            made.conditions = dict(manifest["conditions"])
            if made.latency and (set(made.latency) != set(made.names) or "batch_size" not in made.conditions):
                raise InputError("its latencies do not belong to its networks")
        except Exception as error:  # wrong names, shapes or types, missing keys
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[-1].strip()
            raise InputError(f"{path} is damaged: {reason}") from error
        return made

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights, statistics and latencies to one file; an existing file is replaced atomically.

        Args:
            path: the file; its folder is created if missing.
        """
        manifest = {
            "network": self.network,
            "stem": self.stem,
            "dns": [{"name": dn.name, "channels": dn.channels, "depths": dn.depths} for dn in self.family],
            "image_size": self.image_size,
            "normalization": self.normalization,
            "class_names": self.class_names,
            "pixels": self.pixels,
            "conditions": self.conditions,
            "latency": {name: asdict(taken) for name, taken in self.latency.items()},
        }
        metadata = {"kind": KIND, "version": str(FORMAT), "manifest": json.dumps(manifest)}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._tensors.items()}
        write_tensors(Path(path), tensors, metadata)

    @property
    def names(self) -> tuple[str, ...]:
        """The networks' names, smallest first."""
        return self.family.names

    @property
    def active(self) -> str:
        """Name of the active network."""
        return self._active

    def use(self, name: str) -> Self:
        """Make a network active.

        Args:
            name: one of `names`.

        Returns:
            This Switchable.

        Raises:
            InputError: if the family has no network of this name.
        """
        self._active = self.family.find(name).name
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Compute the active network.

        Args:
            images: normalised images, [N, C, H, W].

        Returns:
            Features [N, F], or logits [N, classes] for a family of classifiers.
        """
        return self._networks[self._active](images)

    @torch.no_grad()
    def measure(self, batch_size: int = 1, image_size: int | None = None, threads: int | None = None) -> None:
        """Measure the latency of every network on the current device and store it in `latency`, for `choose`.

        Args:
            batch_size: images per call.
            image_size: height and width of the images; by default those of the pretraining.
            threads: PyTorch threads during the measurement; by default the current number.
        """
        size = image_size or self.image_size
        weight = next(iter(self._tensors.values()))
        images = torch.randn(batch_size, self.pixels["channels"], size, size, device=weight.device, dtype=weight.dtype)

        def call(network: nn.Module) -> None:
            network(images)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)

        calls = {name: functools.partial(call, network) for name, network in self._networks.items()}
        self.latency = latency.measure(calls, threads=threads)
        self.conditions = latency.conditions(images.device, threads, batch_size, size)

    def choose(self, budget_ms: float) -> str:
        """Name of the largest network whose median latency is within a budget; pass it to `use`.

        Args:
            budget_ms: the budget, in milliseconds per call.

        Returns:
            The network's name.

        Raises:
            InputError: if nothing was measured, or every network is slower.
        """
        if not self.latency:
            raise InputError("no latencies: call measure() first, on the target machine")
        within = [name for name in self.names if self.latency[name].median_ms <= budget_ms]
        if not within:
            fastest = min(self.latency, key=lambda name: self.latency[name].median_ms)
            raise InputError(
                f"no network is within {budget_ms:g} ms: the fastest, {fastest}, takes "
                f"{self.latency[fastest].median_ms:.3g} ms for a batch of {self.conditions['batch_size']}"
            )
        return within[-1]

    def train(self, mode: bool = True) -> Self:
        """Reject training: the networks share weights as views and have fixed statistics."""
        if mode:
            raise InputError("a Switchable is for inference: train a network of dspnet_fast.exported.load")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the shared tensors, and rebuild the networks as views of them."""
        self._tensors = {name: fn(tensor) for name, tensor in self._tensors.items()}
        self._build()
        return self

    def _build(self) -> None:
        """Build the networks on the meta device and assign the shared tensors to them."""
        # A plain dictionary: torch.nn would move the shared tensors of submodules one by one.
        self._networks = {dn.name: self._network(dn) for dn in self.family}
        used = {f"{WEIGHTS}{name}" for name, _ in self._networks[self.family.full.name].named_parameters()}
        used |= {f"{dn}/{name}" for dn, network in self._networks.items() for name in _statistics(network)}
        if used != self._tensors.keys():
            unknown = ", ".join(sorted(self._tensors.keys() - used)[:3])
            raise InputError(f"it contains tensors that belong to no network: {unknown}")

    def _network(self, dn: Subnet) -> nn.Module:
        with torch.device("meta"):
            network = plain(self.network, dn, self.stem, len(self.class_names), self.pixels["channels"])
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
        load_state(network, state, assign=True)
        return network.requires_grad_(False).eval()


def _statistics(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_buffers() if name.endswith(("running_mean", "running_var"))}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and manifest of a file; InputError if it is not a switchable family."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise InputError(
                    f"{path} contains no switchable family, which dspnet-export OUT --switchable writes; "
                    "a single network is read by dspnet_fast.exported.load"
                )
            if metadata.get("version") != str(FORMAT):
                raise InputError(
                    f"{path} has format {metadata.get('version')}, but this version of dspnet-fast reads {FORMAT}: "
                    "export the family again"
                )
            # Copied to aligned memory: at other addresses convolutions may add in another order.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a dict)
        manifest = json.loads(metadata["manifest"])
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{path} is damaged: its manifest is not a JSON object")
    return tensors, manifest
