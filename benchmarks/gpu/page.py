"""`python -m benchmarks.gpu.page results.jsonl results.md`: write a page about the results so far.

Prints the failures last. The exit code is 1 if a part, a test or a variant failed, or if a step of ours synchronises.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dspnet_fast import atomic

from . import records

EAGER, EAGER_GRAPHS = "eager", "eager, graphs"
COMPILED, COMPILED_GRAPHS = "torch.compile", "torch.compile, graphs"
AGAIN = ", repeated"  # appended to the name of the control
KERNELS = 40  # rows of a table of kernels
TIMED_OUT = (-1, 124, 137)  # not started; exit codes of timeout
L2 = 50e6  # bytes of an H100's L2 cache
Line = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def title(case: Mapping[str, Any]) -> str:
    """Title of a case."""
    return f"{case['network']}, {case['images']} images of {case['pixels']} px, {case['precision']}"


def _ratio(above: float | None, below: float | None, digits: int = 2) -> str:
    return f"{above / below:.{digits}f}" if above and below else ""


def step_table(case: Mapping[str, Any], variants: Mapping[str, Line]) -> str:
    """Table of the variants of a case."""

    def median(name: str) -> float | None:
        times = variants.get(name, {}).get("ms")
        return statistics.median(times) if times else None

    def fastest(kind: str) -> float | None:
        times = (median(name) for name in variants if name.startswith(kind) and not name.endswith(AGAIN))
        return min(filter(None, times), default=None)

    eager, compiled = fastest("eager"), fastest(COMPILED)
    rows = []
    for name, line in variants.items():
        ms, memory = median(name), line.get("peak_MiB")
        if ms is None:
            rows.append([name, line.get("error", "timed out"), *[""] * 9])
            continue
        times = line["ms"]
        marks = [
            *(["few samples, not interleaved"] if not line.get("interleaved") else []),
            *(["allocator retried"] if line.get("retries") else []),
            *(line[kind] for kind in ("wrong", "error") if kind in line),
        ]
        rows.append(
            [
                ", ".join([name, *marks]),
                f"{ms:.2f}",
                f"{(max(times) - min(times)) / ms:.1%}",
                f"{1e3 * case['images'] / ms:.0f}",
                "" if "wrong" in line else _ratio(eager, ms),
                "" if "wrong" in line else _ratio(compiled, ms),
                _ratio(1e3 * case.get("TFLOP", 0), ms, 1),
                f"{case['limit_ms'] / ms:.0%}" if case.get("limit_ms") else "",
                "" if memory is None else f"{memory:.0f}",
                _ratio(memory, variants.get(EAGER, {}).get("peak_MiB")),
                str(line.get("syncs", "")),
            ]
        )
    header = ["step", "ms", "range", "images/s", "x eager", "x compile", "TFLOP/s", "limit", "memory, MiB"]
    return table([*header, "of eager", "syncs"], rows)


def faults_of(variants: Mapping[str, Line]) -> list[str]:
    """Errors, wrong losses and synchronisations of variants."""
    faults = [f"{name}: {line[kind]}" for name, line in variants.items() for kind in ("wrong", "error") if kind in line]
    syncs = [name for name, line in variants.items() if "first_sync" in line]
    return [*faults, *(f"{name} synchronises with the GPU:\n{variants[name]['first_sync']}" for name in syncs)]


def kernel_table(rows: Sequence[Line]) -> str:
    """Table of the kernels that take most of a step."""
    total = sum(row["ms"] for row in rows)
    shown = [
        *(
            [row["operator"], row["shapes"], row["kernel"][:60], row["count"], f"{row['ms']:.3f}"]
            + [f"{row['ms'] / max(total, 1e-9):.1%}", f"{row['GB/s']:.0f}"]
            for row in rows[:KERNELS]
        ),
        ["all", "", f"{len(rows)} kinds", sum(row["count"] for row in rows), f"{total:.3f}", "", ""],
    ]
    return table(["operator", "shapes", "kernel", "launches", "ms", "share", "GB/s"], shown)


class Results:
    """Lines of a run by kind; repeated measurements replace earlier ones."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self.environment: Line = {}
        self.parts: dict[str, Line] = {}
        self.tests: dict[str, Line] = {}
        self.steps: dict[tuple, dict[str, Line]] = {}
        self.limits: dict[tuple, Line] = {}
        self.operators: dict[tuple, dict[str, Line]] = {}
        self.verified: list[Line] = []
        self.kernels: dict[tuple, list[Line]] = {}
        self.ceilings: Line = {}
        for line in lines:
            rest = {key: value for key, value in line.items() if key != "kind"}
            getattr(self, "_" + line["kind"].replace(" ", "_"), lambda rest: None)(rest)

    def _environment(self, line: Line) -> None:
        self.environment = line

    def _part(self, line: Line) -> None:
        self.parts[line["name"]] = line

    def _test(self, line: Line) -> None:
        if self.tests.get(line["id"], {}).get("outcome") != "failed":
            self.tests[line["id"]] = line

    def _ceilings(self, line: Line) -> None:
        self.ceilings = line

    def _verified(self, line: Line) -> None:
        self.verified.append(line)

    def _kernel(self, line: Line) -> None:
        self.kernels.setdefault((*self._case(line), line["policy"]), []).append(line)

    @staticmethod
    def _case(line: Line) -> tuple:
        return tuple(line[key] for key in ("network", "images", "pixels", "precision"))

    def _limit(self, line: Line) -> None:
        self.limits[self._case(line)] = line

    def _step(self, line: Line) -> None:
        variants = self.steps.setdefault(self._case(line), {})
        if "loss_difference" in line:  # the first line of a variant
            variants[line["variant"]] = {}
        known = ("network", "images", "pixels", "precision", "variant")
        variants.setdefault(line["variant"], {}).update({k: v for k, v in line.items() if k not in known})

    def _started(self, line: Line) -> None:
        self._operator({**line, "error": "did not finish"})  # replaced by its result

    def _operator(self, line: Line) -> None:
        self.operators.setdefault((line["precision"], line["operator"], line["case"]), {})[line["variant"]] = line

    # --- Failures ----------------------------------------------------------------------------------------------------

    def slower(self) -> list[list[str]]:
        """Providers that are slower than the alternative or the native implementation: `accepts` must refuse them."""
        rows = []
        for (precision, operator, case), variants in self.operators.items():
            times = {name: line["ms"] for name, line in variants.items() if "ms" in line}
            other = times.get("eager")
            for name in times.keys() & {"triton", "cuda"}:
                gains = [_ratio(against, times[name]) for against in (other, times.get("native"))]
                if any(gain and float(gain) < 1 for gain in gains):
                    rows.append([operator, case, precision, name, *gains])
        return sorted(rows)

    def faults(self) -> list[str]:
        """All failures."""
        found = []
        for name, part in self.parts.items():
            if part["code"] and not (part["optional"] and part["code"] in TIMED_OUT):
                found.append(f"{name}: {_ending(part)}")
        found += [
            f"{line['operator']} by {line['provider']}: {line['reason']}"
            for line in self.verified
            if not line["verified"]
        ]
        failed = [line for line in self.tests.values() if line["outcome"] == "failed"]
        found += [f"{line['id']}\n{_last_lines(line.get('text', ''))}" for line in failed[:20]]
        if failed[20:]:
            found.append(f"and {len(failed) - 20} more tests: see results.jsonl")
        for case, variants in self.steps.items():
            found += [f"{' '.join(map(str, case))}, {fault}" for fault in faults_of(variants)]
        for key, lines in self.operators.items():
            found += [f"{', '.join(key)}, {name}: {v['error']}" for name, v in lines.items() if "error" in v]
        return found

    # --- The page -----------------------------------------------------------------------------------------------------

    def page(self) -> str:
        """The page in Markdown."""
        parts = ["# On a GPU", ", ".join(f"{name} {value}" for name, value in self.environment.items())]
        if self.ceilings:
            parts.append("Limits: " + ", ".join(f"{name} {value:.0f}" for name, value in self.ceilings.items()) + ".")
        if limits := list(self.limits.values()):
            seen = {line["precision"]: f"{line['TFLOP/s']:.0f} TFLOP/s in {line['precision']}" for line in limits}
            copy = limits[0]["copy GB/s"]
            parts.append(f"Measured: {', '.join(seen.values())}; a large copy reads and writes {copy:.0f} GB/s.")
        if self.steps:
            parts += ["## A training step", _ABOUT_STEPS]
        for case, variants in self.steps.items():
            limit = self.limits.get(case, {})
            known = dict(zip(("network", "images", "pixels", "precision"), case, strict=True)) | limit
            parts.append(f"### {title(known)}")
            if limit:
                parts.append(
                    f"{' '.join(limit['subnets'])}: {limit['TFLOP']:.2f} TFLOP, {limit['GB']:.1f} GB, at least "
                    f"{limit['limit_ms']:.1f} ms."
                )
            parts.append(step_table(known, variants))
        for kernels in self.kernels.values():
            about = f"{title(kernels[0])}, policy {kernels[0]['policy']}"
            parts += [f"## Kernels of a step, {about}", _ABOUT_KERNELS, kernel_table(kernels)]
        if self.verified:
            parts += ["## Verification", _ABOUT_VERIFICATION, self._verified_table()]
        parts += self._operator_parts()
        if self.tests:
            parts += ["## Tests", table(["file", "passed", "skipped", "failed"], self._test_rows())]
        if self.parts:
            rows = [[name, f"{part['seconds']} s", _ending(part)] for name, part in self.parts.items()]
            parts += ["## Parts of the run", table(["part", "time", "result"], rows)]
        faults = self.faults()
        parts += ["## Failures", "\n\n".join(f"    {line}" for line in _indented(faults)) if faults else "Nothing."]
        return "\n\n".join(parts) + "\n"

    def _operator_parts(self) -> list[str]:
        if not self.operators:
            return []
        parts = ["## Slower than the alternative", _ABOUT_SLOWER]
        header = ["operator", "case", "precision", "provider", "x eager", "x native"]
        parts.append(table(header, self.slower()) if self.slower() else "None.")
        for precision in dict.fromkeys(key[0] for key in self.operators):
            parts += [f"## Operators, {precision}", _ABOUT_OPERATORS, self._operator_table(precision)]
        return parts

    def _operator_table(self, precision: str) -> str:
        rows = []
        for (of, operator, case), variants in self.operators.items():
            if of != precision:
                continue
            other = variants.get("eager", {}).get("ms")
            for name, line in variants.items():
                if "error" in line:
                    rows.append([operator, case, name, line["error"][:80], *[""] * 5])
                    continue
                marks = [
                    *(["launched"] if not line["captured"] else []),
                    *(["warm L2"] if line["bytes"] < L2 else []),
                ]
                gains = _ratio(other, line["ms"]) if line["tests"] == "passed" else f"tests {line['tests']}"
                figures = f"{line['ms']:.4f}", f"{line['GB/s']:.0f}", f"{line['GFLOP/s'] / 1e3:.1f}"
                rows.append([operator, case, name, *figures, f"{line['share']:.0%}", gains, ", ".join(marks)])
        return table(["operator", "case", "provider", "ms", "GB/s", "TFLOP/s", "limit", "x", ""], rows)

    def _verified_table(self) -> str:
        rows = [
            [line["operator"], line["provider"], line["calls"], f"{line['error']:.2f}", line["reason"]]
            for line in self.verified
        ]
        return table(["operator", "provider", "calls", "error", "refused because"], rows)

    def _test_rows(self) -> list[list[Any]]:
        files: dict[str, dict[str, int]] = {}
        for line in self.tests.values():
            counts = files.setdefault(line["id"].split("::")[0], {"passed": 0, "skipped": 0, "failed": 0})
            counts[line["outcome"]] += 1
        return [[file, *counts.values()] for file, counts in files.items()]


_ABOUT_STEPS = (
    "Times are medians; range: of the samples, relative to the median. x eager: speed-up over the fastest eager row; "
    "x compile: over the faster row of torch.compile. ours eager: plain PyTorch, as without --fast-kernels; ours: all "
    "providers. Both replay graphs and use deterministic convolutions unless said otherwise. tf32: all variants may "
    "round operands of fp32 products to tf32; fp32: none does. limit: roofline time of convolutions and products "
    "divided by the time. memory: peak of torch's allocator in a step, including private memory of graphs. syncs: "
    "synchronisations of a step with the GPU."
)
_ABOUT_KERNELS = (
    "One step launched kernel by kernel, profiled. Bytes of GB/s: the operator's arguments and results, each once."
)
_ABOUT_VERIFICATION = (
    "Calls of the timed step and of odd sizes, compared with the specification in higher precision, in processes that "
    "may die; error: the largest, as a share of its bound."
)
_ABOUT_SLOWER = (
    "`accepts` must refuse these cases, or the kernels must become faster, before `auto` chooses the provider."
)
_ABOUT_OPERATORS = (
    "Medians of calls replayed as graphs; x is the speed-up over eager. limit: roofline time divided by the "
    "time; the roofline time is the larger of bytes at copy speed and arithmetic at peak speed. warm L2: the data fit "
    "into the cache and stay there between calls. launched: not captured as a graph."
)


def _ending(part: Line) -> str:
    code = part["code"]
    return {0: "passed", 124: "timed out", 137: "killed", -1: "not started: no time"}.get(code, f"exit code {code}")


def _last_lines(text: str, count: int = 3) -> str:
    errors = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines()
    return "\n".join(errors[:count])


def _indented(faults: list[str]) -> list[str]:
    return [fault.replace("\n", "\n    ") for fault in faults]


def main(arguments: Sequence[str]) -> int:
    """Write the page, and print it without the operators' tables."""
    source, target = map(Path, arguments)
    results = Results(records.read(source))
    atomic.write_text(target, results.page())
    print(results.page().split("\n## Operators, ")[0])
    faults = results.faults()
    print("\n".join(["== failures", *faults]) if faults else "== no failures")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
