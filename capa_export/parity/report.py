"""Writes the report of a bundle: one HTML file that shows what was measured, and needs nothing else to be read."""

import json
import shlex
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import ceil, floor, isfinite, sqrt
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageOps

from capa_export.calibration import FP16_MAX
from capa_export.parity import restored
from capa_export.recipe import ranges

__all__ = ["Example", "KeptMap", "write_report"]

_METHODS = {"dense": "dense", "capa": "CAPA", "random": "random, same k"}
_NUM_RANGES = 10
_SIDE = 384
"""Longer side of a picture in the report, in pixels."""
_SHADE, _OUTLINE = (40, 42, 46), (255, 176, 0)


@dataclass(frozen=True)
class KeptMap:
    """The visual tokens of one picture that one stage of the schedule kept."""

    layer: int
    rows: int
    """Of the grid of visual tokens."""
    cols: int
    kept: tuple[int, ...]
    """Indices in row-major order of the grid."""


@dataclass(frozen=True)
class Example:
    """One picture with its question, and what each method answered."""

    picture: Image.Image
    question: str
    expected: str
    """Empty where nobody knows the answer."""
    dense: str
    capa: str
    random: str
    kept: tuple[KeptMap, ...]
    """One per stage of the schedule."""


@dataclass(frozen=True)
class _Check:
    """One figure beside its gate."""

    name: str
    value: str
    gate: str
    """Empty where nothing is asked of the figure."""
    failed: bool


def write_report(
    path: Path,
    *,
    manifest: dict[str, Any],
    parity: dict[str, Any],
    calibration: dict[str, Any] | None,
    plan: dict[str, Any],
    examples: Sequence[Example],
) -> None:
    """Render everything that is known about a bundle; equal inputs give equal bytes.

    Args:
        path: of the HTML file.
        manifest: of the bundle, with its export done.
        parity: what validation found.
        calibration: its summary, or None for a bundle made without.
        plan: what `dry_run` counted for the same recipe.
        examples: pictures to show, in this order.
    """
    parity = {**parity, "export_error": [restored(row) for row in parity["export_error"]]}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(size=_size, percent=_percent, error=_error, layers=_ranges)
    page = environment.get_template("report.html").render(
        manifest=manifest,
        parity=parity,
        calibration=calibration,
        plan=plan,
        summary=_summary(parity, plan),
        export_checks=[(row, _export_checks(row)) for row in parity["export_error"]],
        selection_checks=[(row, _selection_check(row), _flip_check(row)) for row in parity["export_error"]],
        method_rows=_method_rows(parity["method_error"]),
        method_words=_method_words(parity["method_error"]),
        examples=[_example(example) for example in examples],
        chart=calibration and _chart(calibration),
        ranges=calibration and _largest(calibration["absmax"]),
        fp16_max=FP16_MAX,
        work=_work(plan),
        engines={name[7:]: stage for name, stage in manifest["stages"].items() if name.startswith("engine/")},
        command=[shlex.quote(argument) for argument in manifest["command"]],
        recipe=_flat(manifest["recipe"]),
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def _bound(name: str, value: float, shown: str, *, most: float | None = None, least: float | None = None) -> _Check:
    """A figure that is held against at most one bound; NaN meets none."""
    if most is not None:
        return _Check(name, shown, f"\u2264 {most:.2g}", not value <= most)
    if least is not None:
        return _Check(name, shown, f"\u2265 {least:g}", not value >= least)
    return _Check(name, shown, "", failed=False)


def _export_checks(row: Mapping[str, Any]) -> list[_Check]:
    """The figures of one comparison and what its gate asks of them, by the rules of `Comparison.failures`."""
    gate, cosine, same, wrong = row["gate"], row["cosine"], row["same_tokens"], row["top1_wrong"]
    all_same, counted = "all" if gate["same_tokens"] else "", row["top1_counted"]
    return [
        _bound("relative error", row["relative_error"], _error(row["relative_error"]), most=gate.get("relative_error")),
        # 1 - cosine keeps the digits that matter; the verdict is taken on the cosine itself, as parity does.
        _Check("1 - cosine", _error(1 - cosine), f"\u2264 {1 - gate['cosine']:.2g}", not cosine >= gate["cosine"]),
        _bound("norm ratio", row["norm_ratio"], _error(row["norm_ratio"]), most=gate["norm_ratio"]),
        _noise_check(row),
        _Check("top-1 wrong", f"{wrong} of {counted}", "0 of 1 or more", wrong > 0 or not counted),
        _Check("same tokens", f"{same} of {row['prompts']}", all_same, bool(all_same) and same < row["prompts"]),
    ]


def _noise_check(row: Mapping[str, Any]) -> _Check:
    """The largest difference of a logit, in units of what the eager model itself shows in this precision."""
    noise, bound = row["precision_noise"], row["gate"].get("noise_ratio")
    if not noise or not isfinite(noise):
        return _Check("of the noise", "", "", failed=False)
    times = row["difference"] / noise
    return _bound("of the noise", times, f"{times:.2f}", most=bound)


def _selection_check(row: Mapping[str, Any]) -> _Check:
    return _bound("mean IoU", row["kept_iou_mean"], f"{row['kept_iou_mean']:.4f}", least=row["gate"]["kept_iou"])


def _flip_check(row: Mapping[str, Any]) -> _Check:
    """How far from the cut the flips are."""
    lead = row["flip_distance"]
    return _bound("furthest flip", lead, f"{lead:.2%}", most=row["gate"]["flip_distance"])


def _summary(parity: Mapping[str, Any], plan: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The three questions and the gain, each in one figure: label, figure, what it is."""
    rows, effect, prefill = parity["export_error"], parity["method_error"], plan["prefill"]
    worst = max(rows, key=lambda row: row["relative_error"])
    overlap, flips = min(row["kept_iou_min"] for row in rows), sum(row["prompts_with_flips"] for row in rows)
    accuracy, divergence = effect.get("accuracy"), effect["kl_from_dense"]
    if not effect["questions"]:
        figure, words = "not measured", "no questions"
    elif accuracy:
        others = f"dense {_percent(accuracy['dense'])}, random {_percent(accuracy['random'])}"
        figure, words = _percent(accuracy["capa"]), f"of CAPA's answers are right; {others}"
    else:
        figure, words = f"{divergence['capa']:.4f}", f"KL from dense; random {divergence['random']:.4f}"
    less = prefill["dense"]["total"] / prefill["capa"]["total"]
    return [
        ("Export error", _error(worst["relative_error"]), f"largest relative error, {worst['artefact']}"),
        ("Selection", f"{overlap:.4f}", f"smallest kept-set IoU, {flips} prompts with flips"),
        ("Method error", figure, words),
        ("Work", f"{less:.2f} times", "fewer FLOPs in prefill, counted"),
    ]


def _wilson(share: float, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share of `count`."""
    z = 1.959964
    centre = share + z * z / (2 * count)
    reach = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def _method_rows(effect: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per method; a figure that was not measured is None."""
    count = effect["questions"]

    def measured(key: str, method: str) -> float | None:
        return effect.get(key, {}).get(method) if count else None

    rows: list[dict[str, Any]] = []
    for method, name in _METHODS.items():
        row: dict[str, Any] = {"name": name, "kl": measured("kl_from_dense", method)}
        for short, key in (("accuracy", "accuracy"), ("same", "first_token_same_as_dense")):
            share = row[short] = measured(key, method)
            row[f"{short}_interval"] = None if share is None else _wilson(share, count)
        rows.append(row)
    return rows


def _method_words(effect: Mapping[str, Any]) -> list[str]:
    """What the figures say of CAPA against random pruning, in words."""
    count = effect["questions"]
    if not count:
        return ["No question was asked: the method's error was not measured."]
    same, divergence, accuracy = effect["first_token_same_as_dense"], effect["kl_from_dense"], effect.get("accuracy")
    behind: list[str] = []
    if accuracy and accuracy["capa"] <= accuracy["random"]:
        behind.append(f"accuracy ({_percent(accuracy['capa'])} against {_percent(accuracy['random'])})")
    if same["capa"] <= same["random"]:
        behind.append(f"first token ({_percent(same['capa'])} against {_percent(same['random'])} as dense)")
    if divergence["capa"] >= divergence["random"]:
        behind.append(f"KL from dense ({divergence['capa']:.4f} against {divergence['random']:.4f})")
    if behind:
        words = [f"CAPA does not beat random pruning at the same k in {', '.join(behind)}."]
    else:
        words = ["CAPA beats random pruning at the same k in every figure below."]
    if not accuracy:
        return [*words, "The answers are not known, so there is no accuracy."]
    floor_of_capa, ceiling_of_random = _wilson(accuracy["capa"], count)[0], _wilson(accuracy["random"], count)[1]
    if not accuracy["dense"]:
        words.append("The dense model answers nothing right, so accuracy says nothing about pruning here.")
    elif accuracy["capa"] > accuracy["random"] and floor_of_capa <= ceiling_of_random:
        words.append(f"The accuracy intervals of CAPA and random overlap: {count} questions may be too few to tell.")
    return words


def _example(example: Example) -> dict[str, Any]:
    answers = [("dense", example.dense), ("CAPA", example.capa), ("random", example.random)]
    expected = example.expected.strip()
    return {
        "question": example.question,
        "expected": expected,
        "answers": [(name, text, text.strip() == expected if expected else None) for name, text in answers],
        "maps": [(kept, _data_uri(_overlay(example.picture, kept))) for kept in example.kept],
    }


def _overlay(picture: Image.Image, tokens: KeptMap) -> Image.Image:
    """The picture with dropped tokens dimmed and a line around the kept ones."""
    scale = _SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    picture = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    grey = ImageOps.grayscale(picture).convert("RGB")
    shown = Image.blend(grey, Image.new("RGB", picture.size, _SHADE), 0.55)
    xs = [round(col * width / tokens.cols) for col in range(tokens.cols + 1)]
    ys = [round(row * height / tokens.rows) for row in range(tokens.rows + 1)]
    cells = {divmod(index, tokens.cols) for index in tokens.kept}
    for row, col in cells:
        shown.paste(picture.crop(box := (xs[col], ys[row], xs[col + 1], ys[row + 1])), box)
    draw = ImageDraw.Draw(shown)
    more = int(min(width / tokens.cols, height / tokens.rows) >= 16)
    for row, col in sorted(cells):
        left, top, right, bottom = xs[col], ys[row], xs[col + 1] - 1, ys[row + 1] - 1
        edges = {
            (row - 1, col): (left, top, right, top + more),
            (row + 1, col): (left, bottom - more, right, bottom),
            (row, col - 1): (left, top, left + more, bottom),
            (row, col + 1): (right - more, top, right, bottom),
        }
        for neighbour, edge in edges.items():
            if neighbour not in cells:
                draw.rectangle(edge, fill=_OUTLINE)
    return shown


def _data_uri(picture: Image.Image) -> str:
    # 256 colours take a third of the bytes.
    picture.quantize(256).save(data := BytesIO(), "PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(data.getvalue()).decode()}"


def _chart(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Where everything goes on the linearity chart, in per cent of its panels."""
    layers, eta = calibration["layers"], calibration["eta"]
    lowest = min([eta, *(layer[key] for layer in layers for key in ("cosine_visual", "cosine_text"))])
    # Room below the lowest point, down to a tenth, so that the axis has round labels.
    bottom = floor((lowest - 0.02) * 10) / 10
    top_error = max(layer["relative_error"] for layer in layers) or 1.0
    every = ceil(len(layers) / 14)
    ticks = range(round(bottom * 10), 11, max(1, ceil((10 - round(bottom * 10)) / 5)))

    def height(cosine: float) -> str:
        return f"{100 * (1 - cosine) / (1 - bottom):.2f}%"

    points = [
        {
            "layer": layer["layer"],
            "x": f"{100 * (index + 0.5) / len(layers):.2f}%",
            "visual": height(layer["cosine_visual"]),
            "text": height(layer["cosine_text"]),
            "error": f"{100 * layer['relative_error'] / top_error:.2f}%",
            "left": f"{100 * (index + 0.2) / len(layers):.2f}%",
            "linear": layer["layer"] in calibration["linear_layers"],
            "paper": layer["layer"] in calibration["paper_layers"],
            "label": index % every == 0,
        }
        for index, layer in enumerate(layers)
    ]
    return {
        "points": points,
        "bar": f"{60 / len(layers):.2f}%",
        "eta": height(eta),
        "top_error": top_error,
        "ticks": [(f"{tick / 10:.1f}", height(tick / 10)) for tick in ticks],
    }


def _largest(absmax: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """The blocks with the largest activations: name, magnitude, share of what FP16 holds."""
    largest = sorted(absmax.items(), key=lambda item: (-item[1], item[0]))[:_NUM_RANGES]
    return [(name, value, value / FP16_MAX) for name, value in largest]


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


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def _error(value: float) -> str:
    return f"{value:.1e}" if isfinite(value) else "not finite"
