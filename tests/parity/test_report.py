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

from capa_export.parity import Comparison, Trace
from capa_export.recipe import Gate
from capa_export.report import Example, KeptMap, write_report

FP32 = Gate(relative_error=1e-3, cosine=0.99999, norm_ratio=1e-3, kept_iou=1.0, flip_distance=0.0, same_tokens=True)
FP16 = Gate(cosine=0.999, norm_ratio=0.01, noise_ratio=2.0, kept_iou=0.98, flip_distance=0.02)
EVIL = '<script>alert(1)</script>" onload="x'


def compared(name: str, gate: Gate, *, drift: float = 0.0, kept: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """One prompt of two steps; `drift` moves the logits, `kept` is against (0, 1, 2) with one text token."""
    wanted = np.array([[4.0, 1.0, 0.0], [0.0, 5.0, 1.0]])
    comparison = Comparison(name, "eager CAPA fp32", noise=0.0 if gate.same_tokens else 0.1)
    comparison.add(Trace(wanted + drift * wanted[:, ::-1], [np.array(kept)]), Trace(wanted, [np.array([0, 1, 2])]), 1)
    return comparison.as_dict(gate)


def parity_of(*rows: dict[str, Any], **effect: Any) -> dict[str, Any]:
    failures = [failure for row in rows for failure in row["failures"]]
    return {
        "version": 1,
        "passed": not failures,
        "failures": failures,
        "prompts": "built-in scenes",
        "schedule": [{"layer": 1, "ratio": 0.5}],
        "linear_layers": [0, 1],
        "export_error": list(rows),
        "method_error": {
            "questions": 100,
            "first_token_same_as_dense": {"capa": 0.9, "random": 0.7},
            "kl_from_dense": {"capa": 0.05, "random": 0.25},
            "accuracy": {"dense": 0.95, "capa": 0.9, "random": 0.6},
            **effect,
        },
        "notes": ["No engine was run & none < was asked for."],
    }


def stage(*files: str, **result: Any) -> dict[str, Any]:
    return {"seconds": 1.5, "peak_memory_bytes": 0, "result": result, "files": dict.fromkeys(files, "ab" * 32)}


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
    flops = {
        "dense": {"total": 3e9},
        "capa": {"total": 1e9},
        "dense_visual": {"total": 2e9},
        "capa_visual": {"total": 0},
    }
    return {
        "manifest": {
            "recipe": {"name": EVIL, "prune": {"schedule": [{"layer": 1, "ratio": 0.5}]}},
            "checkpoint": {
                "source": "https://example.org/model",
                "revision": None,
                "sha256": {"a.safetensors": "cd" * 32},
            },
            "command": ["build", "--model", EVIL],
            "tool": {"capa-export": "0.1.0"},
            "stages": {
                "export": stage("onnx/llm/prefill.onnx", precision="fp16"),
                "engine/rtx": stage(
                    "engines/rtx/llm/decode.engine", weights="external", engines={"llm/decode": engine}
                ),
            },
        },
        "parity": parity_of(compared("fp32 ONNX", FP32), compared("fp16 ONNX", FP16)),
        "calibration": {
            "samples": 4,
            "visual_tokens": 64,
            "eta": 0.96,
            "linear_layers": [0, 1],
            "paper_layers": [1, 2],
            "layers": [
                {"layer": layer, "cosine_visual": cosine, "cosine_text": -0.2, "relative_error": 0.1, "sink_tokens": 7}
                for layer, cosine in enumerate((0.99, 0.97, 0.5))
            ],
            "sink_channels": [458],
            "absmax": {f"model.layers.{layer}": 70000.0 / (layer + 1) for layer in range(12)},
        },
        "plan": {
            "precision": "fp16",
            "visual_tokens": 64,
            "text_tokens": 48,
            "stages": [{"layer": 1, "kept": 32, "visual": 64}],
            "linear_layers": [0, 1],
            "linear_layers_from": "calibration",
            "prefill": flops,
            "decode": {"dense": 2e6, "capa": 1e6},
            "kv_cache": {"dense_bytes": 4096, "capa_bytes": 1024},
            "vision": {"total": 5e8},
        },
        "examples": [
            Example(Image.new("RGB", (60, 40), "white"), EVIL, "red", "red", "red ", EVIL, (KeptMap(1, 2, 3, (0, 4)),)),
            Example(Image.new("LA", (40, 60)), "Why?", "", "so", "so", "no", (KeptMap(1, 3, 2, ()),)),
        ],
    }


def render(folder: Path, given: dict[str, Any]) -> str:
    path = folder / "report.html"
    write_report(path, **given)
    return path.read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees, roughly: tags out, white space folded."""
    body = page.partition("<body>")[2]
    return " ".join(re.sub(r"<[^>]*>", " ", body).replace("\u00a0", " ").split())


def test_a_passed_bundle_says_so_first(tmp_path: Path) -> None:
    text = text_of(render(tmp_path, inputs()))
    assert "Passed" in text[:200]
    assert "failed" not in text
    assert "No engine was run &amp; none &lt; was asked for." in text
    assert "CAPA beats random pruning at the same k in every figure below." in text
    assert "90.0 % 82.6 to 94.5" in text
    assert "model.layers.0 70000.0 106.86 % overflows" in text
    assert "model.layers.10" not in text
    assert "llm/decode 5.00 MB 137 3 0 2.0 not measured" in text
    assert "cd" * 32 in text
    assert text.count("ab" * 32) == 2
    assert "prune.schedule = " in text


@pytest.mark.parametrize(
    ("drift", "kept"), [(0.0, (0, 1, 2)), (0.01, (0, 1, 2)), (0.2, (0, 1, 3)), (-6.0, (0, 3, 4)), (np.inf, (0, 1, 2))]
)
@pytest.mark.parametrize("gate", [FP32, FP16], ids=["fp32", "fp16"])
def test_as_many_figures_are_marked_as_gates_failed(
    tmp_path: Path, drift: float, kept: tuple[int, ...], gate: Gate
) -> None:
    with np.errstate(invalid="ignore"):
        row = compared("some ONNX", gate, drift=drift, kept=kept)
    given = {**inputs(), "parity": parity_of(row)}
    page = render(tmp_path, given)
    assert page.count("<b>failed</b>") == len(row["failures"])
    assert ("FAILED" in text_of(page)[:200]) == bool(row["failures"])
    for failure in row["failures"]:
        assert failure in page


def test_without_engines_calibration_examples_and_answers(tmp_path: Path) -> None:
    given = inputs()
    del given["manifest"]["stages"]["engine/rtx"]
    del given["parity"]["method_error"]["accuracy"]
    text = text_of(render(tmp_path, {**given, "calibration": None, "examples": []}))
    for heading in ("Engines", "Linear FFNs", "Activation ranges", "Pictures"):
        assert heading not in text
    assert "there is no accuracy" in text
    assert "CAPA not measured 90.0 %" in text


def test_it_says_plainly_that_capa_does_not_beat_random(tmp_path: Path) -> None:
    effect = {"accuracy": {"dense": 0.9, "capa": 0.5, "random": 0.5}, "kl_from_dense": {"capa": 0.3, "random": 0.2}}
    text = text_of(render(tmp_path, {**inputs(), "parity": parity_of(compared("fp32 ONNX", FP32), **effect)}))
    assert (
        "does not beat random pruning at the same k in accuracy (50.0 % against 50.0 %), KL from dense (0.3000" in text
    )


def test_a_lead_within_the_intervals_is_called_one(tmp_path: Path) -> None:
    parity = parity_of(compared("fp32 ONNX", FP32), accuracy={"dense": 0.9, "capa": 0.85, "random": 0.8})
    assert "100 questions may be too few to tell" in text_of(render(tmp_path, {**inputs(), "parity": parity}))


def test_no_question_is_no_figure(tmp_path: Path) -> None:
    zeros = {"capa": 0.0, "random": 0.0}
    effect = {
        "questions": 0,
        "first_token_same_as_dense": zeros,
        "kl_from_dense": zeros,
        "accuracy": {"dense": 0.0, **zeros},
    }
    text = text_of(render(tmp_path, {**inputs(), "parity": parity_of(compared("fp32 ONNX", FP32), **effect)}))
    assert "method's error was not measured" in text.replace("&#39;", "'")
    assert "Wilson" not in text


def test_a_plan_of_other_layers_is_not_passed_off_as_the_bundle(tmp_path: Path) -> None:
    given = inputs()
    assert "not what is counted here" not in render(tmp_path, given)
    given["plan"]["linear_layers"] = [0]
    assert "not what is counted here" in render(tmp_path, given)


def test_user_text_is_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    page = render(tmp_path, inputs())
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page
    references = re.findall(r"""(?:src|href|srcset|action|poster|data)\s*=\s*["']([^"']*)""", page)
    assert len(references) == 2
    assert all(reference.startswith("data:image/png;base64,") for reference in references)
    assert not re.search(r"url\(|@import|<link|<iframe|<object", page)
    markup = re.sub(r">[^<]*<", "><", page)
    assert "http://" not in markup
    assert "https://" not in markup


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    given = inputs()
    untouched = deepcopy({key: given[key] for key in given if key != "examples"})
    assert render(tmp_path, given) == render(tmp_path, inputs())
    assert {key: given[key] for key in given if key != "examples"} == untouched


def test_kept_tokens_stay_as_they_are_and_dropped_ones_are_dimmed(tmp_path: Path) -> None:
    page = render(tmp_path, inputs())
    encoded = re.findall(r"data:image/png;base64,([^\"]*)", page)[0]
    pixels = np.asarray(Image.open(BytesIO(b64decode(encoded))).convert("RGB"))
    assert pixels.shape == (256, 384, 3)
    brightness = pixels[64::128, 64::128].mean(-1)
    assert (brightness > 230).tolist() == [[True, False, False], [False, True, False]]
    assert (brightness < 170).sum() == 4
    assert pixels[64, 0, 2] < 80, "the outline is not grey"
