"""Writes the report of a bundle: one HTML file that shows what was measured, and needs nothing else to be read."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from capa_export.base.precision import FP16_MAX
from capa_export.base.statistics import Rate
from capa_export.config.parts import measured_unit, parse_unit
from capa_export.config.schedule import Stage
from capa_export.report import charts, conclusions, words
from capa_export.report.pictures import data_uri, fitted, overlay
from capa_export.report.schema import MethodError, ParityReport
from capa_export.report.templates import open_template, size

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
    ranges = _largest(calibration["absmax"], parity.fp32_layers) if calibration else []
    template = open_template("report.html")
    page = template.render(
        manifest=manifest,
        parity=parity,
        verdict=words.verdict(parity),
        calibration=calibration,
        plan=plan,
        latency=latency,
        verdicts=conclusions.verdicts(parity),
        summary=conclusions.summary(parity, plan, latency),
        export_sentence=conclusions.export_sentence(parity),
        selection_sentence=conclusions.selection_sentence(parity),
        ranges_sentence=conclusions.ranges_sentence(ranges),
        num_failed=conclusions.num_failed,
        where=_places(parity),
        describe_check=words.describe_check,
        stages_of=words.by_stage,
        warnings=words.open_warnings(parity),
        method_rows=_method_rows(parity.method_error),
        gains=_gains(parity.method_error),
        examples=[_example(example, parity.method_error.pruned) for example in examples],
        curves=charts.error_curves(parity.export_error),
        linearity=calibration and charts.linearity(calibration),
        alpha=calibration and charts.alpha(calibration),
        ranges=ranges,
        fp16_max=FP16_MAX,
        work=_work(plan, latency),
        engines={name[7:]: stage for name, stage in manifest["stages"].items() if name.startswith("engine/")},
        command=[shlex.quote(argument) for argument in manifest["command"]],
        recipe=_flat(manifest["recipe"]),
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def _method_rows(found: MethodError) -> list[tuple[str, list[tuple[str, str]]]]:
    """A row per figure, with a cell per method: the figure's name, and figures with intervals, empty where unknown."""
    methods = found.methods
    rows = [
        ("accuracy", [_share(method.accuracy) for method in methods]),
        ("first token as dense", [_share(method.top1) for method in methods]),
        ("five likeliest as dense", [("" if one.top5 is None else words.percent(one.top5), "") for one in methods]),
        ("KL from dense, nats", [("" if one.name == "dense" else words.decimals(one.kl), "") for one in methods]),
        ("same answer as dense", [_share(method.same_answer) for method in methods]),
        ("first difference, token", [("" if (at := one.diverges_at) is None else f"{at:.1f}", "") for one in methods]),
    ]
    return [(name, cells) for name, cells in rows if any(figure for figure, _ in cells)]


def _share(found: Rate | None) -> tuple[str, str]:
    return words.rate(found) if found else ("", "")


def _gains(found: MethodError) -> list[tuple[str, str, str]]:
    """How far the bundle's pruning is ahead of random pruning: name, figure, interval."""
    rows: list[tuple[str, str, str]] = []
    if found.kl_gain is not None:
        rows.append((f"KL, nats: random minus {found.pruned}", *words.difference(found.kl_gain)))
    if found.accuracy_gain is not None:
        points = words.difference(found.accuracy_gain, scale=100, digits=1)
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


def _work(plan: Mapping[str, Any], latency: Mapping[str, Any] | None) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Rows of dense against CAPA: label, its measure, and cells for both and how many times less, each with times."""
    prefill, decode, kv = plan["prefill"], plan["decode"], plan["kv_cache"]
    timed = {row["name"]: (row["dense_ms"], row["capa_ms"]) for row in latency["rows"]} if latency else {}
    rows = [
        ("prefill", "prefill", (prefill["dense"]["total"], prefill["capa"]["total"]), _giga),
        (
            "visual tokens alone",
            "FLOPs",
            (prefill["dense_visual"]["total"], prefill["capa_visual"]["total"]),
            _giga,
        ),
        ("decode, a token", "decode", (decode["dense"], decode["capa"]), _giga),
        ("vision tower", "FLOPs", (plan["vision"]["total"], plan["vision"]["total"]), _giga),
        ("KV cache", "KV cache", (kv["dense_bytes"], kv["capa_bytes"]), size),
    ]
    return [(name, of, _cells(work, show, timed.get(of))) for name, of, work, show in rows]


def _cells(
    work: tuple[float, float], show: Callable[[float], str], times: tuple[float, float] | None
) -> list[tuple[str, str]]:
    dense, capa = work
    less = f"{dense / capa:.2f}" if capa else ""
    if times is None:
        return [(show(dense), ""), (show(capa), ""), (less, "")]
    return [(show(dense), words.milliseconds(times[0])), (show(capa), words.milliseconds(times[1])), (less, "")]


def _places(parity: ParityReport) -> Callable[[int], str]:
    """Where the stage of a layer drops tokens, as `after layer 2`."""
    stages = [Stage(**stage.model_dump()) for stage in parity.schedule]
    found = {stage.layer: stage.where for stage in stages}
    return lambda layer: found.get(layer, f"layer {layer}")


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as dotted keys with JSON values."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        name = prefix + key
        rows += _flat(item, f"{name}.") if isinstance(item, dict) else [(name, json.dumps(item, ensure_ascii=False))]
    return rows


def _giga(count: float) -> str:
    return f"{count / 1e9:,.2f}\u00a0GFLOPs" if count >= 1e9 else f"{count / 1e9:.4f}\u00a0GFLOPs"
