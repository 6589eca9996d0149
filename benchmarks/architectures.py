"""`python -m benchmarks.architectures`: which networks of timm and torchvision become slimmable, as a page.

Each network is built with random weights and checked:

    full      outputs of the converted network equal the original's within 1e-5 of the largest output
    widths    forward and backward passes at widths 0.25, 0.5 and 0.75 are finite, with the number of classes unchanged
    slim      the network cut out at each width equals the active subnet
    state     a state_dict of the original loads, and has the same names and shapes
    bf16      forward and backward under autocast are finite at width 0.5

A network that `slimmable` refuses is listed with the reason.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from dspnet_fast.nn import activate, slimmable
from dspnet_fast.slim import slim
from dspnet_fast.statistics import post_statistics

WIDTHS = (0.25, 0.5, 0.75)
CHECKS = ("full", "widths", "slim", "state", "bf16")
CONVOLUTIONAL = """
convmixer_768_32 cspdarknet53 cspresnet50 darknet53 densenet121 dla34 dla60_res2net dpn68 ecaresnet26t efficientnet_b0
efficientnet_lite0 efficientnetv2_rw_t ese_vovnet19b_dw fbnetc_100 gernet_s ghostnet_100 ghostnetv2_100 hardcorenas_a
hgnet_tiny hgnetv2_b0 hrnet_w18_small inception_next_tiny lcnet_050 legacy_xception mixnet_s mnasnet_small
mobilenet_edgetpu_v2_xs mobilenetv2_050 mobilenetv3_large_100 mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0
nf_regnet_b0 nfnet_f0 regnetx_002 regnety_002 regnetz_b16 repghostnet_050 repvgg_a0 res2net50_26w_4s resnest14d resnet18
resnet50 resnet50d resnetv2_50 resnext50_32x4d rexnet_100 selecsls42 semnasnet_075 seresnet50 skresnet18 spnasnet_100
starnet_s1 tf_efficientnet_lite0 tinynet_e tresnet_m vgg11_bn vovnet39a xception41
"""
OTHERS = """
convformer_s18 convnext_atto convnextv2_atto coat_lite_tiny deit_tiny_patch16_224 edgenext_xx_small efficientformer_l1
fastvit_t8 levit_128s mambaout_femto mixer_s32_224 mobilevitv2_050 poolformer_s12 pvt_v2_b0 repvit_m0_9
swin_tiny_patch4_window7_224 vit_tiny_patch16_224 xcit_nano_12_p16_224
"""
TORCHVISION = """
alexnet densenet121 efficientnet_b0 efficientnet_v2_s googlenet mnasnet0_5 mobilenet_v2 mobilenet_v3_small
mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x1_0 squeezenet1_0
squeezenet1_1 vgg11_bn wide_resnet50_2 inception_v3 convnext_tiny swin_t
"""
NAMES = [
    *(f"timm:{name}" for text in (CONVOLUTIONAL, OTHERS) for name in text.split()),
    *(f"torchvision:{name}" for name in TORCHVISION.split()),
]
NOT_CONVOLUTIONAL = {f"timm:{name}" for name in OTHERS.split()} | {"torchvision:convnext_tiny", "torchvision:swin_t"}
CLASSES = 10
INTRODUCTION = """\
# Networks that become slimmable

`slimmable` was tried with {count} networks of timm {timm} and torchvision {torchvision}, with random weights.
{passed} of the {convolutional} convolutional networks pass every check, and {others_passed} of the {others} others.
Networks that are refused are refused by `slimmable`, before training.

The checks: **full**, outputs equal the original network's within 1e-5 of the largest output; **widths**, forward and
backward passes at widths 0.25, 0.5 and 0.75 are finite and have all classes; **slim**, the network cut out at each
width equals the active subnet; **state**, the original's state_dict loads, with the same names and shapes; **bf16**,
forward and backward passes under autocast at width 0.5 are finite. The last column is the share of the parameters that
a subnet of width 0.5 has.

The page is the output of

    python -m benchmarks.architectures > docs/architectures.md

| network | full | widths | slim | state | bf16 | parameters at 0.5 |
|---|---|---|---|---|---|---|
"""


def build(name: str) -> nn.Module:
    """A network with random weights and ten classes."""
    library, _, rest = name.partition(":")
    torch.manual_seed(0)
    if library == "timm":
        return timm.create_model(rest, num_classes=CLASSES)
    return torchvision.models.get_model(rest, weights=None, num_classes=CLASSES)


def inputs(network: nn.Module) -> Tensor:
    """Images that a network runs on, small ones if it can."""
    config = getattr(network, "default_cfg", {})
    largest = config.get("input_size", (3, 224, 224))[-1]
    for size in (64, largest, 299):
        if size < largest and config.get("fixed_input_size"):
            continue
        try:
            x = torch.randn(4, 3, size, size)
            twin = copy.deepcopy(network)  # whose running statistics may change
            with torch.no_grad():
                twin.eval()(x), twin.train()(x)
            return x
        except (RuntimeError, AssertionError, ValueError):
            continue
    raise ValueError(f"{type(network).__name__} runs on no image size that was tried")


def check(name: str) -> dict[str, Any]:
    """Check a network; the result has a truth value for each of `CHECKS`, or a reason under "refused"."""
    network = build(name).eval()
    x = inputs(network)
    state = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        expected = network(x)
    try:
        slimmable(network, x)
    except TypeError as refusal:
        return {"name": name, "refused": str(refusal).partition("; keep")[0]}
    with torch.no_grad():
        full = _close(network(x), expected, 1e-5)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    network.load_state_dict(state)
    result: dict[str, Any] = {
        "name": name,
        "full": full,
        "state": shapes == {key: value.shape for key, value in state.items()},
        "widths": all(_trains(network, x, width) for width in WIDTHS),
        "bf16": _trains(network, x, 0.5, torch.bfloat16),
        "slim": True,
    }
    network.load_state_dict(state)
    post_statistics(network, WIDTHS, [x])
    for width in WIDTHS:
        small = slim(network, width, x)
        with activate(network, width), torch.no_grad():
            result["slim"] &= _close(small(x), network(x), 1e-4)
        if width == 0.5:
            counts = [sum(p.numel() for p in of.parameters()) for of in (small, network)]
            result["share"] = counts[0] / counts[1]
    return result


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= tolerance * other.abs().max())


def _trains(network: nn.Module, x: Tensor, width: float, dtype: torch.dtype | None = None) -> bool:
    """Whether a forward and a backward pass in training mode are finite, with all classes."""
    network.train()
    with activate(network, width):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            outputs = network(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)  # with those of auxiliary classifiers
        torch.stack([y.float().square().mean() for y in outputs]).sum().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    finite = bool(gradients) and all(bool(gradient.isfinite().all()) for gradient in gradients)
    network.zero_grad()
    network.eval()
    return finite and all(y.shape == (len(x), CLASSES) for y in outputs)


def page(results: Sequence[dict[str, Any]]) -> str:
    """The page of documentation."""
    rows, passed = [], set()
    for result in results:
        if "refused" in result:
            reason = result["refused"].replace("|", "/").replace("_", "\\_").replace("*", "\\*")
            rows.append(f"| {result['name']} | refused: {reason} | | | | | |")
            continue
        if all(result[name] for name in CHECKS):
            passed.add(result["name"])
        marks = " | ".join("yes" if result[name] else "no" for name in CHECKS)
        rows.append(f"| {result['name']} | {marks} | {result['share']:.0%} |")
    convolutional = {result["name"] for result in results} - NOT_CONVOLUTIONAL
    introduction = INTRODUCTION.format(
        count=len(results),
        timm=timm.__version__,
        torchvision=torchvision.__version__.partition("+")[0],
        passed=len(passed & convolutional),
        convolutional=len(convolutional),
        others_passed=len(passed - convolutional),
        others=len(results) - len(convolutional),
    )
    return introduction + "\n".join(rows) + "\n"


def main() -> None:
    """Check networks, print a line for each on the standard error, and then the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="networks such as timm:resnet18 [the list in this file]")
    options = parser.parse_args()
    results = []
    for name in options.names or NAMES:
        results.append(check(name))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(page(results), end="")


if __name__ == "__main__":
    main()
