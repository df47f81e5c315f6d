"""Writes the report of a bundle: one HTML file that shows what was measured, and needs nothing else to be read."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageOps

from capa_export.base.precision import FP16_MAX
from capa_export.base.statistics import Rate
from capa_export.config.parts import measured_unit, parse_unit
from capa_export.config.recipe import ranges
from capa_export.report import charts
from capa_export.report import words as figures
from capa_export.report.pictures import data_uri, fitted, overlay
from capa_export.report.schema import MethodError, ParityReport, QuantizationError

__all__ = ["Example", "KeptMap", "write_report"]

_NUM_RANGES = 10


@dataclass(frozen=True)
class KeptMap:
    """The visual tokens of one picture that one stage of the schedule kept."""

    layer: int
    rows: int
    """Rows of the grid of visual tokens."""
    cols: int
    kept: tuple[int, ...]
    """Indices in row-major order of the grid."""
    square: bool = False
    """Whether the grid lies over a centred square of the picture, and the rest was cropped off."""


@dataclass(frozen=True)
class Example:
    """One picture with its question, and what each method answered."""

    picture: Image.Image
    question: str
    expected: str
    """The right answer; empty where nobody knows it."""
    dense: str
    capa: str
    random: str
    kept: tuple[KeptMap, ...]
    """One map per stage of the schedule."""


def write_report(
    path: Path,
    *,
    manifest: Mapping[str, Any],
    parity: ParityReport,
    calibration: Mapping[str, Any] | None,
    plan: Mapping[str, Any],
    examples: Sequence[Example],
    latency: Mapping[str, Any] | None,
) -> None:
    """Render everything that is known about a bundle; equal inputs give equal bytes.

    Args:
        path: the HTML file to write.
        manifest: the bundle's manifest, with its export done.
        parity: the parity report.
        calibration: the summary of its calibration, or None for a bundle made without.
        plan: the result of `dry_run` for the same recipe.
        examples: pictures to show, in this order.
        latency: `{"machine": ..., "rows": [{"name": ..., "dense_ms": ..., "capa_ms": ...}]}`, medians of this machine's
            CPU, or None where nothing was timed.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        size=_size,
        percent=figures.percent,
        error=figures.error,
        decimals=figures.decimals,
        layers=_ranges,
    )
    page = environment.get_template("report.html").render(
        manifest=manifest,
        parity=parity,
        verdict=figures.verdict(parity),
        calibration=calibration,
        plan=plan,
        latency=latency,
        summary=_summary(parity, plan),
        describe_check=figures.describe_check,
        stages_of=figures.by_stage,
        warnings=figures.open_warnings(parity),
        method_rows=_method_rows(parity.method_error),
        gains=_gains(parity.method_error),
        examples=[_example(example, parity.method_error.pruned) for example in examples],
        curves=charts.error_curves(parity.export_error),
        linearity=calibration and charts.linearity(calibration),
        alpha=calibration and charts.alpha(calibration),
        ranges=calibration and _largest(calibration["absmax"], parity.fp32_layers),
        fp16_max=FP16_MAX,
        work=_work(plan),
        engines={name[7:]: stage for name, stage in manifest["stages"].items() if name.startswith("engine/")},
        command=[shlex.quote(argument) for argument in manifest["command"]],
        recipe=_flat(manifest["recipe"]),
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def _summary(parity: ParityReport, plan: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The three questions and the gain, each in one figure: label, figure, caption."""
    error, artefact = figures.worst_error(parity.export_error) or ("not measured", "")
    stages = [stage for row in parity.selection for stage in row.stages]
    flips = sum(stage.flipped for stage in stages)
    prefill = plan["prefill"]
    less = prefill["dense"]["total"] / prefill["capa"]["total"]
    return [
        ("Export error", error, f"largest relative error, {artefact}" if artefact else "no logits were compared"),
        (
            "Selection",
            figures.smallest_overlap(stages) if stages else "not measured",
            f"smallest kept-set IoU, {flips} {'flip' if flips == 1 else 'flips'}",
        ),
        ("Method error", *_method_figure(parity.method_error)),
        *_quantization_figure(parity.quantization_error),
        ("Work", f"{less:.2f} times", "fewer FLOPs in prefill, counted"),
    ]


def _method_figure(found: MethodError) -> tuple[str, str]:
    methods = {method.name: method for method in found.methods}
    if "capa" not in methods:
        return "not measured", "no questions"
    accuracy = {name: method.accuracy and figures.percent(method.accuracy.value) for name, method in methods.items()}
    if accuracy["capa"]:
        others = ", ".join(f"{name} {share}" for name, share in accuracy.items() if name != "capa" and share)
        return accuracy["capa"], f"of {found.pruned}'s answers are right; {others}"
    others = f"; random {figures.decimals(methods['random'].kl)}" if "random" in methods else ""
    return figures.decimals(methods["capa"].kl), f"KL from dense{others}"


def _quantization_figure(found: QuantizationError | None) -> list[tuple[str, str, str]]:
    if found is None:
        return []
    same = figures.percent(found.top1)
    return [
        ("Quantization error", figures.decimals(found.kl), f"KL from full precision; {same} of next tokens as there")
    ]


def _method_rows(found: MethodError) -> list[tuple[str, list[tuple[str, str]]]]:
    """A row per figure, with a cell per method: the figure's name, and figures with intervals, empty where unknown."""
    methods = found.methods
    rows = [
        ("accuracy", [_share(method.accuracy) for method in methods]),
        ("first token as dense", [_share(method.top1) for method in methods]),
        ("five likeliest as dense", [("" if one.top5 is None else figures.percent(one.top5), "") for one in methods]),
        ("KL from dense, nats", [("" if one.name == "dense" else figures.decimals(one.kl), "") for one in methods]),
        ("same answer as dense", [_share(method.same_answer) for method in methods]),
        ("first difference, token", [("" if (at := one.diverges_at) is None else f"{at:.1f}", "") for one in methods]),
    ]
    return [(name, cells) for name, cells in rows if any(figure for figure, _ in cells)]


def _share(found: Rate | None) -> tuple[str, str]:
    return figures.rate(found) if found else ("", "")


def _gains(found: MethodError) -> list[tuple[str, str, str]]:
    """How far the bundle's pruning is ahead of random pruning: name, figure, interval."""
    rows: list[tuple[str, str, str]] = []
    if found.kl_gain is not None:
        rows.append((f"KL, nats: random minus {found.pruned}", *figures.difference(found.kl_gain)))
    if found.accuracy_gain is not None:
        points = figures.difference(found.accuracy_gain, scale=100, digits=1)
        rows.append((f"accuracy, points: {found.pruned} minus random", *points))
    return rows


def _example(example: Example, pruned: str) -> dict[str, Any]:
    answers = [("dense", example.dense), (pruned, example.capa), ("random", example.random)]
    expected = example.expected.strip()
    return {
        "picture": None if example.kept else data_uri(fitted(example.picture)),
        "question": example.question,
        "expected": expected,
        "answers": [(name, text, text.strip() == expected if expected else None) for name, text in answers],
        "maps": [(tokens, _drawn(example.picture, tokens)) for tokens in example.kept],
    }


def _drawn(picture: Image.Image, tokens: KeptMap) -> str:
    side = min(picture.size)
    seen = ImageOps.fit(picture, (side, side)) if tokens.square else picture
    return data_uri(overlay(seen, tokens.rows, tokens.cols, tokens.kept))


def _largest(absmax: Mapping[str, float], fp32_layers: Sequence[str]) -> list[tuple[str, float, float, bool]]:
    """The blocks with the largest activations: name, magnitude, share of FP16's largest number, whether in FP32."""
    largest = sorted(absmax.items(), key=lambda item: (-item[1], item[0]))[:_NUM_RANGES]
    return [(name, value, value / FP16_MAX, _in_fp32(name, fp32_layers)) for name, value in largest]


def _in_fp32(module: str, fp32_layers: Sequence[str]) -> bool:
    """Whether a module's output is computed in FP32; a whole layer's output is the residual stream."""
    unit = measured_unit(module)
    return unit is not None and any(parse_unit(word).covers(unit) for word in fp32_layers)


def _work(plan: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of dense against CAPA: label, dense, CAPA, how many times less."""
    prefill, decode, kv = plan["prefill"], plan["decode"], plan["kv_cache"]
    rows = [
        ("prefill, GFLOPs", prefill["dense"]["total"], prefill["capa"]["total"], _giga),
        ("visual tokens alone, GFLOPs", prefill["dense_visual"]["total"], prefill["capa_visual"]["total"], _giga),
        ("decode, GFLOPs a token", decode["dense"], decode["capa"], _giga),
        ("vision tower, GFLOPs", plan["vision"]["total"], plan["vision"]["total"], _giga),
        ("KV cache", kv["dense_bytes"], kv["capa_bytes"], _size),
    ]
    return [(name, show(dense), show(capa), f"{dense / capa:.2f}" if capa else "") for name, dense, capa, show in rows]


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as dotted keys with JSON values."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        name = prefix + key
        rows += _flat(item, f"{name}.") if isinstance(item, dict) else [(name, json.dumps(item, ensure_ascii=False))]
    return rows


def _ranges(layers: Sequence[int]) -> Markup:
    """`2-5, 13`, or `none`; a run never breaks over lines."""
    runs = ranges(layers).split(", ")
    return Markup(", ").join(Markup('<span class="nowrap">{}</span>').format(run) for run in runs)


def _size(count: float) -> str:
    scale, unit = (1e9, "GB") if count >= 1e9 else (1e6, "MB") if count >= 1e6 else (1e3, "kB")
    return f"{count / scale:,.{0 if count / scale >= 100 else 2}f}\u00a0{unit}"


def _giga(count: float) -> str:
    return f"{count / 1e9:,.2f}" if count >= 1e9 else f"{count / 1e9:.4f}"
