"""Every selector on every trained bed, held against eager models that round half-precision products in other ways.

A processor with AVX512-FP16 adds products in FP16, one without in FP32, a GPU in blocks of some: the noise of the eager
model, which the gates measure, is another on each. What this processor does not do is emulated.

`python -m benchmarks.arithmetics --out out/arithmetics` exports, validates, and writes the record and the table; `--bed
real` does the same on the published decoder of `make bed-real`.
"""

import argparse
import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import capa_export
from capa_export.api.stages import calibrate, export
from capa_export.base.files import write_whole
from capa_export.base.precision import Precision
from capa_export.config.recipe import load_recipe
from capa_export.selectors.selector import load_selector, selectors

__all__ = ["main"]

_HERE = Path(__file__).parent
_RESULTS = _HERE / "results"
_BEDS = ("tiny-qwen25vl", "tiny-llava15", "tiny-internvl3")
_REAL = "real"
_REAL_RECIPE = _HERE / "real" / "real.toml"
_REAL_IMAGES = Path("out/bed-real-questions/clutter-calibration/scenes.jsonl")
_RATIO = 0.75
_CALIBRATED_ON = 40
"""Prompts of the calibration."""
_EXACT = 0
_ARITHMETICS: dict[Precision, dict[str, int | None]] = {
    "fp16": {"native": None, "sums in FP32": _EXACT, "sums in FP16": 1},
    "bf16": {"native": None, "sums in FP32": _EXACT},
}
"""By precision and name: how many products are added in FP32 before the sum is rounded to FP16; 0 for all of them."""
_TOO_SLOW = (_REAL, "sums in FP16")
"""Bed and arithmetic that would take days."""


@dataclass(frozen=True)
class Verdict:
    """How the gates judged one bundle against the eager model in one arithmetic."""

    bed: str
    schedule: str
    precision: str
    arithmetic: str
    samples: int
    """Prompts."""
    products: int
    """Of matrices, in half precision, that were emulated."""
    passed: bool
    failures: tuple[str, ...]


class HalfProducts(TorchFunctionMode):
    """Products of half-precision matrices, with sums that are rounded every so many products.

    Args:
        block: products that are added in FP32 before the sum is rounded to FP16; 0 for all, as always in BF16.
    """

    def __init__(self, block: int) -> None:
        """Count nothing yet."""
        super().__init__()
        self.block = block
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Emulate what multiplies half-precision matrices, and run all else as it is."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.dtype in (torch.float16, torch.bfloat16):
            emulated = {
                functional.linear: self._linear,
                torch.matmul: self._matmul,
                torch.bmm: self._matmul,
                torch.Tensor.matmul: self._matmul,
                torch.Tensor.__matmul__: self._matmul,
                functional.scaled_dot_product_attention: self._attend,
            }.get(func)
            if emulated is not None:
                return emulated(*args, **kwargs)
        return func(*args, **kwargs)

    def _sum(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The product in FP32, its sums rounded on their way."""
        self.count += 1
        half, one, other = one.dtype, one.float(), other.float()
        if not self.block or half == torch.bfloat16:
            return one @ other
        total = torch.zeros(())
        for start in range(0, one.shape[-1], self.block):
            added = slice(start, start + self.block)
            total = (total + one[..., added] @ other[..., added, :]).to(half).float()
        return total

    def _matmul(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self._sum(one, other).to(one.dtype)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        total = self._sum(x, weight.t())
        return (total if bias is None else total + bias.float()).to(x.dtype)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002, as torch has it
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: FBT001, FBT002
    ) -> torch.Tensor:
        if dropout_p:
            raise ValueError("a model that is held against another drops nothing out")
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = (each.repeat_interleave(repeats, -3) for each in (key, value))
        scores = self._sum(query, key.transpose(-1, -2)) * (scale or query.shape[-1] ** -0.5)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            hidden = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, float("-inf")) if hidden else scores + attn_mask.float()
        return self._matmul(scores.softmax(-1).to(query.dtype), value)


def _model(bed: str) -> dict[str, Any]:
    """What calibration and export are told of a bed."""
    return {"recipe": str(_REAL_RECIPE), "images": _REAL_IMAGES} if bed == _REAL else {"recipe": bed}


def _schedule(bed: str, name: str) -> str:
    """A selector where it acts by itself, or else at the recipe's layer, as `capa@2:0.75`."""
    selector = load_selector(name)
    layer = selector.layer if selector.layer is not None else load_recipe(_model(bed)["recipe"]).prune.schedule[0].layer
    return f"{name}:{_RATIO}" if selector.place == "input" else f"{name}@{layer}:{_RATIO}"


def _judged(bed: str, out: Path, samples: int, names: Sequence[str]) -> Iterator[Verdict]:
    """The verdicts on one bed's bundles; those that were given before are read."""
    known = out / f"{bed}.jsonl"
    read = [Verdict(**json.loads(line)) for line in known.read_text().splitlines()] if known.exists() else []
    schedules = [_schedule(bed, name) for name in names]
    found = [verdict for verdict in read if verdict.samples == samples and verdict.schedule in schedules]
    yield from found
    calibration = out / bed
    calibrate(**_model(bed), out=calibration, samples=_CALIBRATED_ON)
    for schedule in schedules:
        for precision, arithmetics in _ARITHMETICS.items():
            left = {name for name in arithmetics if (bed, name) != _TOO_SLOW} - {
                one.arithmetic for one in found if (one.schedule, one.precision) == (schedule, precision)
            }
            if not left:
                continue
            with TemporaryDirectory(dir=out) as folder:
                export(**_model(bed), out=folder, schedule=schedule, calibration=calibration, precision=precision)
                for name, block in arithmetics.items():
                    if name not in left:
                        continue
                    products = HalfProducts(block or 0)
                    with TemporaryDirectory(dir=out) as trial, nullcontext() if block is None else products:
                        # What was validated is not validated again.
                        shutil.copytree(folder, trial, dirs_exist_ok=True)
                        report = capa_export.open(trial).validate(
                            **_model(bed), samples=samples, accept_method_loss=True
                        )
                    verdict = Verdict(
                        bed, schedule, precision, name, samples, products.count, report.passed, tuple(report.failures)
                    )
                    print(f"{bed} {schedule} {precision} {name}: {verdict.failures or 'passed'}", file=sys.stderr)
                    with known.open("a") as file:
                        file.write(json.dumps(asdict(verdict)) + "\n")
                    yield verdict


def _table(found: Sequence[Verdict]) -> str:
    """By precision and arithmetic, how many bundles passed, and what failed in the others."""
    lines = ["| precision | eager products | bundles | passed | failed |", "|---|---|---|---|---|"]
    for precision, arithmetics in _ARITHMETICS.items():
        for name in arithmetics:
            verdicts = [one for one in found if (one.precision, one.arithmetic) == (precision, name)]
            failed = [f"{one.bed} `{one.schedule}`: {'; '.join(one.failures)}" for one in verdicts if not one.passed]
            passed = len(verdicts) - len(failed)
            lines.append(f"| {precision} | {name} | {len(verdicts)} | {passed} | {'<br>'.join(failed)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.arithmetics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="calibrations, and verdicts to go on from")
    parser.add_argument("--bed", action="append", choices=(*_BEDS, _REAL), help="all but the real one by default")
    parser.add_argument("--selector", action="append", choices=selectors(), help="all by default")
    parser.add_argument("--samples", type=int, default=8, help="prompts of a validation (default: 8)")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    found = [
        verdict
        for bed in given.bed or _BEDS
        for verdict in _judged(bed, given.out, given.samples, given.selector or selectors())
    ]
    print(_table(found))
    day = datetime.now(timezone.utc).date()
    record = {
        "date": f"{day}",
        "command": shlex.join(["python", "-m", "benchmarks.arithmetics", *arguments]),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=_HERE, text=True).strip(),  # noqa: S607
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": version("torch"),
        "onnxruntime": version("onnxruntime"),
        "verdicts": [asdict(verdict) for verdict in found],
    }
    beds = "".join(f"-{bed}" for bed in given.bed or ())
    write_whole(_RESULTS / f"{day}-arithmetics{beds}.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
