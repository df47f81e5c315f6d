"""The report: rendered from small hand-made results, complete, self-contained and safe."""

import re
from base64 import b64decode
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capa_export.report.pages import Example, KeptMap, write_report
from capa_export.report.schema import Check, MethodError
from tests.report.results import (
    BISECTION,
    EVIL,
    MANIFEST,
    answers,
    compared,
    export_stage,
    method_error,
    parity_of,
    selected,
)


def inputs() -> dict[str, Any]:
    engine = {
        "bytes": 5_000_000,
        "seconds": 2.0,
        "peak_memory_bytes": 0,
        "layers": 137,
        "custom_layers": 3,
        "weight_copies": 0,
        "runtime": "1.7.1",
        "warnings": [EVIL],
    }
    built = export_stage("engines/rtx/llm/decode.engine", weights="external", engines={"llm/decode": engine})
    flops = {
        "dense": {"total": 3e9},
        "capa": {"total": 1e9},
        "dense_visual": {"total": 2e9},
        "capa_visual": {"total": 0},
    }
    return {
        "manifest": {**MANIFEST, "stages": {**MANIFEST["stages"], "engine/rtx": built}},
        "parity": parity_of(),
        "calibration": {
            "samples": 4,
            "visual_tokens": 64,
            "eta": 0.96,
            "linear_layers": [0, 1],
            "scaled_layers": [0, 1],
            "paper_layers": [1, 2],
            "layers": [
                {
                    "layer": layer,
                    "cosine_visual": cosine,
                    "cosine_text": -0.2,
                    "relative_error": 0.1,
                    "alpha": {"min": -3.5, "p05": 0.9, "median": 1.0 + layer / 8, "p95": 1.1, "max": 9.0},
                    "sink_tokens": 7,
                }
                for layer, cosine in enumerate((0.99, 0.97, 0.5))
            ],
            "sink_channels": [458],
            "absmax": {f"model.language_model.layers.{layer}.mlp": 70000.0 / (layer + 1) for layer in range(12)},
        },
        "plan": {
            "precision": "fp16",
            "picture": [224, 224],
            "visual_tokens": 64,
            "text_tokens": 48,
            "stages": [{"layer": 1, "where": "after layer 1", "kept": 32, "visual": 64}],
            "linear_layers": [0, 1],
            "linear_layers_from": "calibration",
            "prefill": flops,
            "decode": {"dense": 2e6, "capa": 1e6},
            "kv_cache": {"dense_bytes": 4096, "capa_bytes": 1024},
            "vision": {"total": 5e8},
            "forecast": [],
        },
        "examples": [
            Example(Image.new("RGB", (60, 40), "white"), EVIL, "red", "red", "red ", EVIL, (KeptMap(1, 2, 3, (0, 4)),)),
            Example(Image.new("LA", (40, 60)), "Why?", "", "so", "so", "no", (KeptMap(1, 3, 2, ()),)),
        ],
        "latency": {"machine": EVIL, "rows": [{"name": "prefill", "dense_ms": 18.0, "capa_ms": 6.0}]},
    }


def render(folder: Path, **changes: Any) -> str:
    path = folder / "report.html"
    write_report(path, **{**inputs(), **changes})
    return path.read_text(encoding="utf-8")


def pixels_of(page: str) -> np.ndarray:
    """Of the first picture."""
    encoded = re.findall(r"data:image/png;base64,([^\"]*)", page)[0]
    return np.asarray(Image.open(BytesIO(b64decode(encoded))).convert("RGB")).astype(np.int64)


def text_of(page: str) -> str:
    """What a reader sees, roughly: tags out, white space folded."""
    body = page.partition("<body>")[2]
    return " ".join(re.sub(r"<[^>]*>", " ", body).replace("\u00a0", " ").replace("&#39;", "'").split())


def test_a_passed_bundle_says_so_first(tmp_path: Path) -> None:
    text = text_of(page := render(tmp_path))
    assert "Passed" in text[:200]
    assert "failed" not in text
    assert page.count("<details open") == 1, "the ranges, one of which overflows"
    assert "No engine was run &amp; none &lt; was asked for." in text
    assert "CAPA beats random pruning." in text
    assert "accuracy 95.0% 90.0 to 99.0 90.0% 85.0 to 94.0 60.0% 55.0 to 64.0" in text
    assert "KL, nats: random minus CAPA +0.2000 +0.1500 to +0.2500" in text
    assert "accuracy, points: CAPA minus random +30.0 +20.0 to +40.0" in text
    assert "prefill 3.00 GFLOPs 18 ms 1.00 GFLOPs 6 ms 3.00 visual tokens alone" in text
    assert "size 5.00 MB layers 137 plugin layers 3 weight copies 0 seconds 2.0 peak memory not measured" in text
    assert "4 of built-in scenes, seed 7; oracle: the eager model" in text
    for digest in ("cd" * 32, "ef" * 32):
        assert text.count(digest) == 1
    assert text.count("ab" * 32) == 2
    assert "prune.schedule = " in text


def test_every_check_stands_beside_its_bound_and_the_healthy_figure(tmp_path: Path) -> None:
    text = text_of(render(tmp_path))
    assert "1 - cosine 1.0e-04 \u2264 0.001 5.0e-05" in text
    assert "against eager CAPA fp32, 4 prompts, 16 steps, noise 3.0e-02" in text
    assert "times the noise 0.61 \u2264 2 0.85" in text
    assert "top-1 wrong 0 of 16 \u2264 0" in text
    assert "same tokens 3 of 4" in text
    assert "kept-set IoU 0.8750 \u2265 0.8 furthest flip 0.50% \u2264 0.02 0.30% mean IoU 0.9900 0.9500" in text


def test_a_measure_is_explained_once_wherever_it_is_named(tmp_path: Path) -> None:
    page = render(tmp_path, parity=parity_of(bisection=BISECTION))
    buttons = re.findall(r'<button type="button" class="term" popovertarget="([^"]*)" title="([^"]*)">', page)
    explained = re.findall(r'<div popover class="meaning" id="([^"]*)"><b>[^<]*</b> ([^<]*)</div>', page)
    assert len(explained) == len(set(buttons)) < len(buttons)
    assert dict(explained) == dict(buttons)
    assert "<th>" not in re.sub(r"<th>(?=</th>)", "", page), "a header says what it heads"


def test_a_forecast_stands_beside_the_work(tmp_path: Path) -> None:
    times = {way: {"first": first, "token": first / 10} for way, first in (("dense", 310.4), ("capa", 120.0))}
    plan = {**inputs()["plan"], "forecast": [{"device": EVIL, **times}]}
    text = text_of(render(tmp_path, plan=plan))
    assert "forecast until the first token: 120 ms for 310 ms on &lt;script&gt;" in text
    assert "310 ms 120 ms 31 ms 12 ms" in text


def test_what_fails_is_said_first_and_marked_where_it_stands(tmp_path: Path) -> None:
    parity = parity_of(compared(failure=f"cosine off {EVIL}"), selection=(selected(layers=(1, 4), failure="too far"),))
    page = render(tmp_path, parity=parity)
    assert "FAILED" in text_of(page)[:200]
    assert page.count(" <b>failed</b>") == 2
    assert text_of(page).index("cosine off") < text_of(page).index("Export error")
    assert "furthest flip 0.80% failed" in text_of(page)


def test_answers_that_changed_are_in_the_verdict(tmp_path: Path) -> None:
    text = text_of(render(tmp_path, parity=parity_of(answers=answers(100))))
    assert "Not fit to ship Parity passed" in text
    assert "Answers 50 % as dense: not fit to ship, 90 % are asked for Does the model answer" in text
    text = text_of(render(tmp_path, parity=parity_of(answers=answers())))
    assert "Answers 91 % as dense Does the model answer as it did with all visual tokens? Yes, on 182 of 200" in text
    text = text_of(render(tmp_path, parity=parity_of(answers=answers(100, accepted=True))))
    assert "Passed Parity passed" in text
    assert "On 100 of 200 questions; you accepted it." in text
    assert "Answers not measured" in text_of(render(tmp_path))


def test_a_long_list_of_failures_is_folded(tmp_path: Path) -> None:
    failures = tuple(f"failure {index}" for index in range(30))
    page = render(tmp_path, parity=parity_of(passed=False, failures=failures))
    assert "<summary>18 more</summary>" in page
    assert all(failure in page for failure in failures)


def test_warnings_are_not_failures(tmp_path: Path) -> None:
    text = text_of(render(tmp_path, parity=parity_of(warnings=("Few pictures.",))))
    assert text.index("Passed Parity passed") < text.index("Answers") < text.index("1 warning Few pictures.")
    strict = parity_of(warnings=("Few pictures.",), passed=False, strict=True)
    assert "1 warning, and the run is strict Few" in text_of(render(tmp_path, parity=strict))
    repeated = strict.model_copy(update={"failures": ("--strict: Few pictures.",)})
    assert text_of(render(tmp_path, parity=repeated)).count("Few pictures.") == 1


def test_figures_that_are_not_finite(tmp_path: Path) -> None:
    row = compared()
    layers = tuple(layer.model_copy(update={"relative_error": None, "cosine": None}) for layer in row.layers)
    checks = tuple(Check(name=check.name, value=None, failure="not finite") for check in row.checks)
    page = render(tmp_path, parity=parity_of(row.model_copy(update={"layers": layers, "checks": checks})))
    assert text_of(page).count("not finite failed") == len(checks)
    assert page.count(": not finite</title>") == 3


@pytest.mark.parametrize(("noise", "lines"), [(2e-3, 2), (0.0, 0)])
def test_error_curves_rise_with_the_error_on_one_scale(tmp_path: Path, noise: float, lines: int) -> None:
    row = compared()
    row = row.model_copy(update={"layers": tuple(layer.model_copy(update={"noise": noise}) for layer in row.layers)})
    page = render(tmp_path, parity=parity_of(row))
    chart = page[page.index("Relative error of the hidden states") :].partition("</svg>")[0]
    heights = [float(y) for y in re.findall(r'<circle class="linear" cx="[^"]*" cy="([\d.]+)%"', chart)]
    assert heights == pytest.approx([100.0, 50.0, 0.0], abs=0.01)
    assert len(re.findall(r'<line class="text"', chart)) == lines


def test_where_a_bisection_ends(tmp_path: Path) -> None:
    text = text_of(render(tmp_path, parity=parity_of(bisection=BISECTION)))
    assert "Bisection" not in text_of(render(tmp_path))
    assert text.count(BISECTION.sentence) == 2
    assert "Proposed: --fp32-layers 1.mlp,residual" in text
    assert "model/layers.1 not finite 2.0e-03 off" in text
    assert "model/layers.0 1.0e-04 2.0e-03 clean" in text


def test_without_engines_calibration_examples_and_answers(tmp_path: Path) -> None:
    parity = parity_of(method_error=method_error(known=False), selection=())
    page = render(tmp_path, parity=parity, manifest=MANIFEST, calibration=None, examples=[], latency=None)
    for heading in ("Engines", "Linear FFNs", "Activation ranges", "Pictures"):
        assert f"<h2>{heading}" not in page
    text = text_of(page)
    assert "No selection was compared." in text
    assert "nats of KL from dense; random 0.2500" in text
    assert "accuracy, points" not in text
    assert " ms" not in text


def test_no_question_is_no_figure(tmp_path: Path) -> None:
    text = text_of(render(tmp_path, parity=parity_of(method_error=MethodError(questions=0))))
    assert "the method's error was not measured" in text
    assert "Wilson" not in text


def test_a_plan_of_other_layers_is_not_passed_off_as_the_bundle(tmp_path: Path) -> None:
    assert "not what is counted here" not in render(tmp_path)
    other = {**inputs()["plan"], "linear_layers": [0]}
    assert "not what is counted here" in render(tmp_path, plan=other)


@pytest.mark.parametrize(
    ("island", "protected"),
    [
        ("0", ["layers.0.mlp"]),
        ("0.mlp", ["layers.0.mlp"]),
        ("0.self_attn", []),
        ("residual", ["language_model.layers.0"]),
        ("visual.3.attn", ["blocks.3.attention"]),
        ("visual.residual", ["visual.blocks.3"]),
    ],
)
def test_ranges_say_what_is_computed_in_fp32(tmp_path: Path, island: str, protected: list[str]) -> None:
    names = ("language_model.layers.0.mlp", "language_model.layers.0", "visual.blocks.3.attention", "visual.blocks.3")
    absmax = {f"model.{name}": 70000.0 for name in names}
    calibration = {**inputs()["calibration"], "absmax": absmax}
    text = text_of(render(tmp_path, calibration=calibration, parity=parity_of(fp32_layers=(island,))))
    assert f"Computed in FP32: {island}." in text
    for name in names:
        safe = any(name.endswith(end) for end in protected)
        assert f"model.{name} 70000.0 106.9%{' yes' if safe else ' overflows'}" in text


def test_ranges_without_islands(tmp_path: Path) -> None:
    text = text_of(render(tmp_path))
    assert "model.language_model.layers.0.mlp 70000.0 106.9% overflows" in text
    assert "model.language_model.layers.1.mlp 35000.0 53.4% model" in text
    assert "layers.10.mlp" not in text
    assert "computed in FP32" not in text


def test_alpha_is_drawn_on_an_axis_that_fits_the_linear_layers(tmp_path: Path) -> None:
    page = render(tmp_path)
    chart = page[page.index("Alpha of each layer") :].partition("</svg>")[0]
    ticks = [float(label) for label in re.findall(r">([\d.-]+)</text>", chart)]
    assert min(ticks) <= 0.9
    assert 1.1 <= max(ticks) < 1.5
    assert chart.count('class="linear"') == 2
    assert re.search(r'class="reach" [^>]* y1="100.00%" y2="0.00%"', chart), "what lies beyond is cut off at the edge"
    assert "1 -3.500 0.900 1.125 1.100 9.000" in text_of(page)


def test_user_text_is_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    page = render(tmp_path, parity=parity_of(compared(EVIL, failure=EVIL), warnings=(EVIL,)))
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page
    references = re.findall(r"""(?:src|href|srcset|action|poster|data)\s*=\s*["']([^"']*)""", page)
    assert len(references) == 2
    assert all(reference.startswith("data:image/png;base64,") for reference in references)
    assert not re.search(r"url\(|@import|<link|<iframe|<object", page)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    markup = re.sub(r">[^<]*<", "><", page)
    assert "http://" not in markup
    assert "https://" not in markup


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    given = inputs()
    untouched = deepcopy({key: given[key] for key in given if key != "examples"})
    write_report(tmp_path / "a.html", **given)
    write_report(tmp_path / "b.html", **inputs())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert {key: given[key] for key in given if key != "examples"} == untouched


def test_kept_tokens_stay_as_they_are_and_dropped_ones_are_dimmed(tmp_path: Path) -> None:
    page = render(tmp_path)
    pixels = pixels_of(page)
    assert pixels.shape == (256, 384, 3)
    brightness = pixels[64::128, 64::128].mean(-1)
    assert (brightness > 230).tolist() == [[True, False, False], [False, True, False]]
    assert (brightness < 170).sum() == 4
    assert pixels[64, 0, 2] < 80, "the outline is not grey"


def test_a_grid_over_the_centre_is_drawn_over_that(tmp_path: Path) -> None:
    picture = Image.new("RGB", (90, 30), "red")
    picture.paste("white", (30, 0, 60, 30))
    page = render(tmp_path, examples=[Example(picture, "", "", "", "", "", (KeptMap(1, 2, 2, (3,), square=True),))])
    pixels = pixels_of(page)
    assert pixels.shape == (384, 384, 3)
    assert (pixels[96::192, 96::192].min(-1) > 230).tolist() == [[False, False], [False, True]]
    assert np.ptp(pixels[96::192, 96::192], axis=-1).max() < 8, "nothing of the red beside it"


def test_a_picture_whose_tokens_make_no_grid_is_shown_as_it_is(tmp_path: Path) -> None:
    page = render(tmp_path, examples=[Example(Image.new("RGB", (60, 40), "white"), "Why?", "", "a", "b", "c", ())])
    assert pixels_of(page).min() == 255
    assert "they make no single grid" in text_of(page)
