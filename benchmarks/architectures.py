"""`python -m benchmarks.architectures`: which networks of timm and torchvision become slimmable, as a page.

Each network is built with random weights and checked:

    full      outputs of the converted network equal the original's within 1e-5 of the largest output
    widths    forward and backward passes at widths 0.25, 0.5 and 0.75 are finite, with the number of classes unchanged
    slim      the network cut out at each width equals the active subnet
    state     a state_dict of the original loads, and has the same names and shapes
    bf16      forward and backward under autocast are finite at width 0.5
    compile   torch.compile(fullgraph=True) computes the same outputs and gradients at widths 1 and 0.5 as without it;
              not checked where the original network cannot be compiled

A network that `slimmable` refuses is listed with the reason. With `--results FILE`, results are appended to a file, and
networks that are in it are not checked again, so an interrupted run can be continued.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from dspnet_fast.nn import activate, slimmable
from dspnet_fast.slim import slim
from dspnet_fast.statistics import post_statistics

WIDTHS = (0.25, 0.5, 0.75)
CHECKS = ("full", "widths", "slim", "state", "bf16", "compile")
CONVOLUTIONAL = """
bat_resnext26ts convmixer_768_32 cs3darknet_s cspdarknet53 cspresnet50 darknet53 densenet121 dla34 dla60_res2net dpn68
eca_nfnet_l0 ecaresnet26t efficientnet_b0 efficientnet_lite0 efficientnetv2_rw_t ese_vovnet19b_dw fasternet_t0
fbnetc_100 gernet_s ghostnet_100 ghostnetv2_100 ghostnetv3_100 hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small
inception_next_tiny lcnet_050 legacy_xception mixnet_s mnasnet_small mobilenet_edgetpu_v2_xs mobilenetv2_050
mobilenetv3_large_100 mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0 nf_regnet_b0 nfnet_f0 regnetx_002
regnety_002 regnetz_b16 repghostnet_050 repvgg_a0 res2net50_26w_4s resnest14d resnet18 resnet50 resnet50d resnetv2_50
resnext50_32x4d rexnet_100 selecsls42 semnasnet_075 seresnet50 skresnet18 spnasnet_100 starnet_s1
tf_efficientnet_lite0 tinynet_e tresnet_m vgg11_bn vovnet39a xception41
"""
OTHERS = """
cait_xxs24_224 coat_lite_tiny coatnet_pico_rw_224 convformer_s18 convit_tiny convnext_atto convnextv2_atto
deit_tiny_patch16_224 edgenext_xx_small efficientformer_l1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224
fastvit_t8 gcvit_xxtiny gmlp_s16_224 hiera_tiny_224 lambda_resnet26t levit_128s mambaout_femto mixer_s32_224
mobilevit_xxs mobilevitv2_050 pit_ti_224 poolformer_s12 pvt_v2_b0 repvit_m0_9 resmlp_12_224 shvit_s1
swin_tiny_patch4_window7_224 tiny_vit_5m_224 visformer_tiny vit_tiny_patch16_224 xcit_nano_12_p16_224
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
MARKS = {True: "yes", False: "no", None: "-"}
INTRODUCTION = """\
# Networks that become slimmable

`slimmable` was tried with {count} networks of timm {timm} and torchvision {torchvision}, with random weights.
{passed} of the {convolutional} convolutional networks pass every check made, {others_passed} of the {others} others
(transformers, MLPs, and networks built like them).
Networks that are refused are refused by `slimmable`, before training.

The checks: **full**, outputs equal the original network's within 1e-5 of the largest output; **widths**, forward and
backward passes at widths 0.25, 0.5 and 0.75 are finite and have all classes; **slim**, the network cut out at each
width equals the active subnet; **state**, the original's state_dict loads, with the same names and shapes; **bf16**,
forward and backward passes under autocast at width 0.5 are finite; **compile**, `torch.compile(fullgraph=True)` gives
the outputs and gradients of plain PyTorch at widths 1 and 0.5, in training mode, with the backend `aot_eager`, which
captures the graphs of both passes and generates no code ("-": the original network cannot be compiled; empty: not
checked). {compiled} networks were checked for it. The last column is the share of the parameters that a subnet of width
0.5 has.

The page is the output of

    python -m benchmarks.architectures > docs/architectures.md

| network | full | widths | slim | state | bf16 | compile | parameters at 0.5 |
|---|---|---|---|---|---|---|---|
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


def check(name: str, compiles: bool = True) -> dict[str, Any]:
    """Check a network; the result has a truth value for each of `CHECKS`, or a reason under "refused".

    Args:
        name: the network, such as "timm:resnet18".
        compiles: whether to check "compile", which takes most of the time.
    """
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
    if compiles:
        compiled = _compiles(network, x, (1.0, 0.5))
        result["compile"] = compiled or (False if _compiles(build(name), x, (None,)) else None)
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


def _compiles(network: nn.Module, x: Tensor, widths: Sequence[float | None]) -> bool:
    """Whether the network in training mode is one graph, with the outputs and gradients of plain PyTorch."""
    torch.compiler.reset()
    compiled = torch.compile(network.train(), backend="aot_eager", fullgraph=True)
    try:
        for width in widths:
            with activate(network, width):
                pairs = zip(_step(network, compiled, x), _step(network, network, x), strict=True)
                if not all(_close(one, other, 1e-4) for one, other in pairs):
                    return False
    except Exception as error:  # graph breaks, and what backends do not support
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return False
    finally:
        network.zero_grad()
        network.eval()
    return True


def _step(network: nn.Module, run: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """Outputs of a forward pass, which may be random, and all gradients of its backward pass in one vector."""
    torch.manual_seed(0)
    outputs = [y for y in tree_iter(run(x)) if isinstance(y, Tensor)]
    torch.stack([y.square().mean() for y in outputs]).sum().backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    return [*(y.detach() for y in outputs), torch.cat(gradients)]


def page(results: Sequence[dict[str, Any]]) -> str:
    """The page of documentation."""
    rows, passed = [], set()
    for result in results:
        if "refused" in result:
            reason = result["refused"].replace("|", "/").replace("_", "\\_").replace("*", "\\*")
            rows.append(f"| {result['name']} | refused: {reason} | | | | | | |")
            continue
        if all(result.get(name) is not False for name in CHECKS):
            passed.add(result["name"])
        marks = " | ".join(MARKS[result[name]] if name in result else "" for name in CHECKS)
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
        compiled=sum("compile" in result for result in results),
    )
    return introduction + "\n".join(rows) + "\n"


def main() -> None:
    """Check networks, print a line for each on the standard error, and then the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="networks such as timm:resnet18 [the list in this file]")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="continue with the results in a file, line by line"
    )
    parser.add_argument(
        "--without-compile", action="store_true", help="leave out the check that takes most of the time"
    )
    options = parser.parse_args()
    lines = options.results.read_text().splitlines() if options.results and options.results.exists() else []
    results = {result["name"]: result for result in map(json.loads, lines)}
    names = options.names or NAMES
    for name in names:
        if name in results:
            continue
        results[name] = check(name, not options.without_compile)
        line = json.dumps(results[name])
        print(line, file=sys.stderr, flush=True)
        if options.results:
            with options.results.open("a") as file:
                file.write(f"{line}\n")
    print(page([results[name] for name in names]), end="")


if __name__ == "__main__":
    main()
