"""The machine, and the providers that it can run: `python -m dspnet_fast.info [--json]`."""

import argparse
import json
import os
import platform
from contextlib import suppress
from typing import Any

import torch

from . import settings, verdicts
from .errors import InputError
from .machine import TRITON, cpu_model, installed_version
from .ops import apex, cpp, cuda, registry


def collect() -> dict[str, Any]:
    """Collect the command's output.

    Returns:
        {"machine": {name: text}, "ops": registry.describe(), "policy": registry.get_policy(), "serving":
        registry.serving(), "verdicts": [{name: text}]}. If the policy names a provider that cannot run, "serving" is
        empty and "error" is the reason. "verdicts" are those of dspnet-select for this machine's devices.
    """
    facts = {"machine": _machine(), "ops": registry.describe(), "policy": registry.get_policy(), "serving": {}}
    facts["verdicts"] = _verdicts()
    try:
        facts["serving"] = registry.serving()
    except InputError as error:
        facts["error"] = str(error)
    return facts


def _machine() -> dict[str, str]:
    return {
        "os": f"{_os_name()}, {platform.machine()}",
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": f"{_usable_cores()} usable of {os.cpu_count()}",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "dspnet-fast": installed_version("dspnet-fast") or "not installed: running from the source folder",
        "torch": torch.__version__,
        "torchvision": installed_version("torchvision") or "absent",
        "triton": installed_version(*TRITON) or "absent",
        "cuda": torch.version.cuda or "this torch was built without CUDA",
        "gpu": _gpus(),
        "cpu operators": f"built for {', '.join(cpp.builds())}" if cpp.load()[0] else cpp.load()[1],
        "cuda operators": cuda.built(),
        "dali": _dali(),
        "apex": "NVIDIA's" if apex.installed()[0] else apex.installed()[1],
    }


def _verdicts() -> list[dict[str, str]]:
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    keys = {key["device"]: key for key in map(verdicts.key, (*gpus, torch.device("cpu")))}
    found = []
    for verdict in verdicts.read_all():
        with suppress(KeyError):  # a device of another machine, or a verdict of another version with other entries
            key, run = keys[verdict.key["device"]], verdict.run
            lasting = [{n: v for n, v in some.items() if n not in settings.read()} for some in (verdict.key, key)]
            size = f"{run['image_size']} px, {run['images']} images, {run['precision']}"
            found.append(
                {
                    "run": f"{run['network']} {run['dns']}, {size}, {verdict.key['threads']} threads",
                    "device": key["device"],
                    "formulation": verdict.formulation,
                    "reason": verdict.reason,
                    "date": verdict.date,
                    "outdated": verdicts.differences(*lasting),
                }
            )
    return found


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform(terse=True)


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    devices = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return "; ".join(f"{d.name}, sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB" for d in devices)


def _dali() -> str:
    found = installed_version("nvidia-dali-cuda130", "nvidia-dali-cuda120")
    if not found and installed_version("nvidia-dali"):
        return "absent: the package nvidia-dali is a placeholder, install nvidia-dali-cuda130"
    return found or "absent"


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console  # imported here, because --json does not need it
    from rich.table import Table
    from rich.text import Text

    console = Console()
    machine = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in facts["machine"].items():
        machine.add_row(Text(name, style="bold"), Text(value))
    console.print(machine)

    table = Table(title=f"operators, policy {facts['policy']}", title_justify="left", title_style="bold", box=None)
    for heading, style in (("operator", ""), ("chosen", "green"), ("available", ""), ("unavailable", "dim")):
        table.add_column(heading, header_style="dim", style=style)
    for operator, providers in facts["ops"].items():
        chosen = facts["serving"].get(operator, "")
        others = {
            available: ", ".join(
                name for name, state in _existing(providers) if name != chosen and state["available"] == available
            )
            for available in (True, False)
        }
        table.add_row(operator, chosen, others[True], others[False])
    console.print()
    console.print(table)

    kept = [Text("verdicts of dspnet-select", style="bold")] if facts["verdicts"] else []
    for verdict in facts["verdicts"]:
        reason = f"not used: {verdict['outdated']}" if verdict["outdated"] else verdict["reason"]
        style = "dim" if verdict["outdated"] else ""
        kept.append(Text(f"{verdict['date']}  {verdict['run']} on {verdict['device']}", style=style))
        kept.append(Text(f"            {verdict['formulation']}: {reason}", style=style))
    if kept:
        console.print()
        console.print(*kept, sep="\n", soft_wrap=True)

    reasons = Table(title="reasons", title_justify="left", title_style="bold", box=None, show_header=False)
    for provider, why in _reasons(facts["ops"]):
        reasons.add_row(provider, Text(why))
    if reasons.rows:
        console.print()
        console.print(reasons)
    if "error" in facts:
        console.print(Text(facts["error"], style="red"))
    if facts["policy"] == "eager":
        console.print(
            "\nThe policy is eager: plain PyTorch. --fast-kernels uses the operators where they are faster; "
            "dspnet-select verifies and times them on this device."
        )


def _existing(providers: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, state) for name, state in providers.items() if state["reason"] != registry.NO_IMPLEMENTATION]


def _reasons(operators: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of provider and reason for not using it, with operator names if a provider has several reasons."""
    found: dict[str, dict[str, list[str]]] = {}
    for operator, providers in operators.items():
        for name, state in _existing(providers):
            if state["reason"]:
                found.setdefault(name, {}).setdefault(state["reason"], []).append(operator)
    return [
        (name, reason if len(reasons) == 1 else f"{', '.join(of)}: {reason}")
        for name, reasons in found.items()
        for reason, of in reasons.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run the command. arguments: by default those of the process."""
    parser = argparse.ArgumentParser(
        prog="dspnet-info",
        description="Show this machine, the implementations (providers) of the operators that it can run, why it "
        "cannot run the others, and the verdicts that dspnet-select kept.",
        epilog="example: dspnet-info --json",
    )
    parser.add_argument("--json", action="store_true", help="JSON output")
    options = parser.parse_args(arguments)
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts)


if __name__ == "__main__":
    main()
