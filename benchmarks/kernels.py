"""Counts the resources that the compiled kernels take, and the time below which no kernel can do their work.

python benchmarks/kernels.py
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.progress import Progress

from capa_export.kernels import OPERATORS, STEP_OPERATORS
from capa_export.kernels.compile import COMPUTE_CAPABILITIES, CompiledKernel, compile_kernels
from capa_export.kernels.operator import Operator

_RESULTS = Path(__file__).parent / "results"
_TEXT = 48


@dataclass(frozen=True)
class Chip:
    """The figures of a chip, as its maker publishes them."""

    gigabytes_per_second: float
    teraflops: float
    """Dense FP16 on tensor cores, accumulated in FP32."""
    note: str = ""


CHIPS = {
    "RTX 4090": Chip(1008, 165.2),
    "RTX 5090": Chip(1792, 209.5),
    "Orin AGX 64GB": Chip(204.8, 42.5, "the GPU's 170 sparse INT8 TOPS / 4"),
    "Thor": Chip(273, 258.8, "2,070 sparse FP4 TFLOPS / 8"),
    "GB10": Chip(273, 125, "1,000 sparse FP4 TFLOPS / 8"),
    "H100 SXM": Chip(3350, 989.4),
}


def _sizes(tokens: int) -> Any:
    """The sizes of a 7B decoder that keeps a quarter of the visual tokens."""
    return SimpleNamespace(
        batch=1,
        tokens=tokens,
        num_text=_TEXT,
        kept=(tokens - _TEXT) // 4 + _TEXT,
        hidden_size=3584,
        heads=28,
        kv_heads=4,
        head_size=128,
        projection=28 * 128,
        rotary_size=64,
        vocabulary=152064,
        axes=3,
        stages=2,
    )


def _roofline(operators: Sequence[Operator], tokens: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for operator in operators:
        cost = operator.cost(_sizes(tokens))
        floors = {
            name: {"memory": cost.bytes / chip.gigabytes_per_second / 1e3, "compute": cost.flops / chip.teraflops / 1e6}
            for name, chip in CHIPS.items()
        }
        rows.append(
            {
                "operator": operator.name,
                "tokens": tokens,
                "kept": min(_sizes(tokens).kept, tokens),
                "bytes": cost.bytes,
                "flops": cost.flops,
                "floor_microseconds": {name: round(max(floor.values()), 4) for name, floor in floors.items()},
                "bound_by": {name: max(floor, key=lambda one: floor[one]) for name, floor in floors.items()},
            }
        )
    return rows


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _cell(kernel: CompiledKernel) -> str:
    spill = f", **{kernel.spill_bytes} spilled**" if kernel.spill_bytes else ""
    return f"{kernel.registers}, {kernel.shared_bytes / 1024:.3g}{spill}"


def _report(date: str, result: dict[str, Any], kernels: list[CompiledKernel]) -> str:
    figures = {(one.variant, one.compute_capability): one for one in kernels}
    variants = dict.fromkeys((one.variant, one.operator, one.warps) for one in kernels)
    compiled = [
        [operator, f"`{variant}`", str(32 * warps), *(_cell(figures[variant, one]) for one in COMPUTE_CAPABILITIES)]
        for variant, operator, warps in variants
    ]
    floors = [
        [
            row["operator"],
            f"{row['tokens']:,} / {row['kept']:,}",
            _three_digits(row["bytes"] / 1e6),
            _three_digits(row["flops"] / 1e9),
            *(
                f"{_three_digits(floor)}{'' if row['bound_by'][chip] == 'memory' else ' c'}"
                for chip, floor in row["floor_microseconds"].items()
            ),
        ]
        for row in result["roofline"]
    ]
    chips = [[name, f"{chip.gigabytes_per_second:g}", f"{chip.teraflops:g}", chip.note] for name, chip in CHIPS.items()]
    return f"""# Kernels, {date}

`python benchmarks/kernels.py`, {result["versions"]}. Not measured: no GPU was had.

## As compiled

Per compute capability: registers per thread, KiB of shared memory per block, and bytes per thread that spill.

{_table(["operator", "kernel", "threads", *COMPUTE_CAPABILITIES], compiled)}

## The floor

A decoder of hidden size 3584, 28 query heads, 4 KV heads, head size 128 and 152,064 tokens in its vocabulary; {_TEXT}
tokens of a prompt are text, and what stands beside a step of decode has one. Every input is read
once and every output written once, in fp16, at the published bandwidth; arithmetic runs at the published rate of the
tensor cores. The floor is the longer of the two, in microseconds; c marks where that is arithmetic.

{_table(["operator", "tokens / kept", "MB", "GFLOP", *CHIPS], floors)}

{_table(["chip", "GB/s", "TFLOPS, dense FP16", "derived from"], chips)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", default=datetime.now(timezone.utc).date().isoformat())
    arguments = parser.parse_args()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling kernels", total=None)
        kernels = compile_kernels(
            (*OPERATORS, *STEP_OPERATORS),
            COMPUTE_CAPABILITIES,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    figures = (
        "operator",
        "variant",
        "compute_capability",
        "warps",
        "registers",
        "shared_bytes",
        "spill_bytes",
        "stack_bytes",
    )
    result = {
        "date": arguments.date,
        "versions": f"triton {version('triton')}, Python {platform.python_version()}, {platform.machine()}",
        "measured": "no GPU was had",
        "kernels": [
            {name: getattr(one, name) for name in figures} | {"image_bytes": len(one.image)} for one in kernels
        ],
        "roofline": [
            *(row for tokens in (1072, 16432) for row in _roofline(OPERATORS, tokens)),
            *_roofline(STEP_OPERATORS, 1),
        ],
        "chips": {name: vars(chip) for name, chip in CHIPS.items()},
    }
    path = _RESULTS / f"{arguments.date}-kernels.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_report(arguments.date, result, kernels), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
