"""Every bad input is one line with its exit code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from capa_export.base.errors import ExitCode
from capa_export.base.toml import shipped
from tests.cli.conftest import Cli, preflight
from tests.conftest import noise
from tests.models.qwen25vl import random_model, save_model

USAGE = {
    "unknown model": (["build", "-m", "llama", "-o", "x"], "unknown model 'llama'; known models: "),
    "unknown target": (["build", "-m", "qwen25vl", "-o", "x", "-t", "nano"], "unknown target 'nano'; known targets: "),
    "ratio of one": (["build", "-m", "qwen25vl", "-o", "x", "--ratio", "1"], "--ratio 1: the fraction of visual"),
    "negative ratio": (["plan", "-m", "qwen25vl", "--ratio", "-0.1"], "--ratio -0.1"),
    "negative layer": (["plan", "-m", "qwen25vl", "--prune-layer", "-1"], "--prune-layer -1"),
    "schedule of no stage": (
        ["plan", "-m", "qwen25vl", "--schedule", "dense"],
        "write one, as capa@2:0.75, or capa@2:0 to drop nothing",
    ),
    "schedule without a colon": (
        ["plan", "-m", "qwen25vl", "--schedule", "capa@3"],
        "--schedule 'capa@3': 'capa@3' is no stage; write selector@layer:ratio, as capa@2:0.75",
    ),
    "schedule that no graph has": (
        ["plan", "-m", "qwen25vl", "--schedule", "capa@3:0.75/skip"],
        "skip is for `evaluate`; write capa@3:0.75, capa@3:0.75/full or capa@3:0.75/eta=0.97",
    ),
    "schedule and ratio": (
        ["build", "-m", "qwen25vl", "-o", "x", "--schedule", "capa@3:0.75", "--ratio", "0.5", "--no-ffn"],
        "--schedule capa@3:0.75 says it all: drop --ratio 0.5 --no-ffn",
    ),
    "schedule and layer": (
        ["export", "-m", "qwen25vl", "-o", "x", "--schedule", "capa@3:0.75", "--prune-layer", "3"],
        "says it all: drop --prune-layer 3",
    ),
    "schedule and selector": (
        ["plan", "-m", "qwen25vl", "--schedule", "capa@3:0.75", "--selector", "fastv"],
        "says it all: drop --selector fastv",
    ),
    "merge of nothing": (["calibrate", "--merge", "-o", "x"], "--merge takes calibrations"),
    "calibrate nothing": (["calibrate", "-o", "x"], "name a checkpoint"),
    "build to nowhere": (["build", "-m", "qwen25vl"], "build needs --out"),
    "samples of no run": (
        ["build", "-m", "qwen25vl", "-o", "x", "--calibration", "y", "--samples", "9"],
        "--samples has no effect",
    ),
    "shared by no engine": (
        ["build", "-m", "qwen25vl", "-o", "x", "-t", "onnx", "--weights", "external"],
        "target onnx has no engine",
    ),
    "revision of a merge": (["calibrate", "--merge", "y", "-o", "x", "--revision", "v1"], "--merge takes calibrations"),
    "image given twice at once": (["run", "x", "--prompt", "y", "--image", "a", "b"], "give --image once per picture"),
    "unknown option": (["build", "--mdl"], "No such option"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_usage_errors(cli: Cli, arguments: list[str], message: str) -> None:
    code, out, err = cli(*arguments)
    assert code == ExitCode.USAGE and message in err and not out


def test_recipe_errors_name_the_key(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(recipe.read_text().replace("eta = 0.5", "etta = 0.5"))
    code, _, err = cli("plan", "-m", bad)
    assert code == ExitCode.USAGE and "unknown key ffn.etta; known keys: budget, eta, paper_layers" in err
    bad.write_text(recipe.read_text().replace("ratio = 0.75", "ratio = 1.75"))
    assert "prune.schedule.0.ratio" in cli("plan", "-m", bad)[2]
    bad.write_text("family = [")
    assert str(bad) in cli("plan", "-m", bad)[2]


def damaged(checkpoint: Path, folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_bad_checkpoints(cli: Cli, checkpoint: Path, recipe: Path, pictures: Path, tmp_path: Path) -> None:
    options = ("-m", recipe, "--images", pictures, "-t", "onnx", "-o", tmp_path / "out", "--checkpoint")
    preflight(cli, "no such folder", "build", *options, tmp_path / "none")

    name = "model.layers.1.mlp.up_proj.weight"
    stored = next(
        key for key in load_file(checkpoint / "model.safetensors") if key.endswith("layers.1.mlp.up_proj.weight")
    )
    missing = damaged(checkpoint, tmp_path / "missing", lambda tensors: tensors.pop(stored))
    preflight(cli, f"tensor {name} is missing", "build", *options, missing)
    extra = damaged(checkpoint, tmp_path / "extra", lambda tensors: tensors.update({"lora_A": np.ones(2, np.float32)}))
    preflight(cli, "tensor lora_A has no place", "build", *options, extra)
    nan = damaged(checkpoint, tmp_path / "nan", lambda tensors: tensors[stored].fill(np.nan))
    preflight(cli, "layers.1.mlp.up_proj.weight holds NaN or infinity", "build", *options, nan)

    shard = tmp_path / "truncated" / "model.safetensors"
    shutil.copytree(checkpoint, shard.parent)
    shard.write_bytes(shard.read_bytes()[:-100])
    preflight(cli, "truncated", "build", *options, shard.parent)

    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    preflight(cli, "model_type is 'llava', this recipe is for", "build", *options, other)
    preflight(cli, "layers 0 to 4", "build", *options, checkpoint, "--schedule", "capa@4:0.75")
    assert not (tmp_path / "out" / "onnx").exists()


def test_bad_pictures(cli: Cli, recipe: Path, tmp_path: Path, bundle: Path) -> None:
    options = ("-m", recipe, "-t", "onnx", "-o", tmp_path / "out", "--images")
    preflight(cli, "no such folder of pictures", "build", *options, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    preflight(cli, "no pictures in this folder", "build", *options, tmp_path / "empty")
    (tmp_path / "empty" / "bad.png").write_bytes(b"\x89PNG broken")
    preflight(cli, "bad.png: not a readable picture", "build", *options, tmp_path / "empty")
    preflight(cli, "pass --images FOLDER", "build", "-m", recipe, "-t", "onnx", "-o", tmp_path / "out")
    preflight(cli, "no such picture", "run", bundle, "--prompt", "x", "--image", tmp_path / "none.png")
    preflight(cli, "not a readable picture", "run", bundle, "--prompt", "x", "--image", tmp_path / "empty" / "bad.png")


def test_a_changed_bundle_is_refused(cli: Cli, spare: Path, pictures: Path) -> None:
    path = spare / "onnx/llm/model.onnx.data"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    for command in (
        ("run", spare, "--prompt", "x"),
        ("validate", spare, "--images", pictures),
        ("engine", spare),
        ("inspect", spare),
    ):
        preflight(cli, "onnx/llm/model.onnx.data: missing or changed since it was built", *command)


def test_a_bundle_is_validated_with_its_own_checkpoint(cli: Cli, bundle: Path, pictures: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", random_model(7))
    preflight(
        cli,
        "is not the checkpoint this bundle was made from",
        "validate",
        bundle,
        "--images",
        pictures,
        "--checkpoint",
        other,
    )


def test_a_wrong_graph_exits_with_6(cli: Cli, spare: Path, recipe: Path, pictures: Path) -> None:
    """A fault that was built in, hashes and all: only validation can see it."""
    path = spare / "onnx/llm/prefill.onnx"
    model = ir.load(path)
    for node in model.graph:
        if node.op_type == "RMSNormalization":
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.3)
    ir.save(model, path)
    from capa_export.bundle.store import Bundle, file_digest

    opened = Bundle(spare)
    stages: Any = opened.manifest["stages"]
    stages["export"]["files"]["onnx/llm/prefill.onnx"] = file_digest(path)
    opened.update(stages=stages)
    code, out, err = cli("validate", spare, "--images", pictures)
    assert code == ExitCode.PARITY
    assert "parity: FAILED" in out and "fp16 ONNX against eager CAPA fp32" in err
    assert json.loads((spare / "parity.json").read_text())["passed"] is False


def test_an_impossible_gpu_is_refused_at_once(cli: Cli, spare: Path, tmp_path: Path) -> None:
    orin = tmp_path / "orin.toml"
    text = (shipped("engines") / "rtx.toml").read_text()
    orin.write_text(
        text.replace('compute_capabilities = ["8.0", "8.6", "8.9", "12.0"]', 'compute_capabilities = ["8.7"]', 1)
    )
    code, _, err = cli("engine", spare, "-t", orin)
    assert code == ExitCode.ENGINE and "for compute capability 8.7; it can for 8.0" in err


def test_what_fp16_cannot_hold_is_computed_in_fp32_or_refused(
    cli: Cli, model: Any, recipe: Path, pictures: Path, tmp_path: Path
) -> None:
    hot = save_model(tmp_path / "hot", random_model())
    tensors = load_file(hot / "model.safetensors")
    name = next(key for key in tensors if key.endswith("layers.3.mlp.down_proj.weight"))
    tensors[name] *= 1e6
    save_file(tensors, hot / "model.safetensors", metadata={"format": "pt"})
    options = ("build", "-m", recipe, "--images", pictures, "-t", "onnx", "-o", tmp_path / "out", "--checkpoint", hot)
    code, _, err = cli(*options)
    assert code == ExitCode.OK and "3.mlp in FP32" in err and "residual in FP32" in err
    tensors[next(key for key in tensors if key.endswith("embed_tokens.weight"))] *= 1e6
    save_file(tensors, hot / "model.safetensors", metadata={"format": "pt"})
    code, _, err = cli(*options)
    last = err.splitlines()[-1]
    assert code == ExitCode.PREFLIGHT and "of the largest FP16 number" in last and "--precision bf16" in last


def test_a_target_without_its_builder_is_refused_first(
    cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capa_export.trt.stage.find_spec", lambda _: None)
    code, _, err = cli("build", "-m", recipe, "-o", tmp_path / "out")
    assert code == ExitCode.ENGINE and 'pip install ".[rtx]" in a checkout' in err and not (tmp_path / "out").exists()


def test_no_engine_to_build_is_a_usage_error(cli: Cli, spare: Path) -> None:
    code, _, err = cli("engine", spare, "-t", "onnx")
    assert code == ExitCode.USAGE and "target onnx has no engine" in err


def test_a_damaged_recipe_in_the_manifest(cli: Cli, spare: Path, pictures: Path) -> None:
    from capa_export.bundle.store import Bundle

    opened = Bundle(spare)
    recipe = opened.manifest["recipe"]
    del recipe["prune"]
    opened.update(recipe=recipe)
    for command in (("run", spare, "--prompt", "x"), ("validate", spare, "--images", pictures), ("inspect", spare)):
        preflight(cli, "damaged manifest (recipe: prune: Field required)", *command)


def test_pictures_that_no_model_takes(cli: Cli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strip = tmp_path / "strip.png"
    noise(600, 2).save(strip)
    ask = ("run", bundle, "--prompt", "x", "--image", strip)
    preflight(cli, "600 x 2 pixels: absolute aspect ratio must be smaller than 200", *ask)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    preflight(cli, "strip.png: too many pixels", *ask)


def test_a_missing_preprocessor_is_named(
    cli: Cli, checkpoint: Path, recipe: Path, pictures: Path, tmp_path: Path
) -> None:
    for name, message in (
        ("preprocessor_config.json", "no preprocessor_config.json (nor processor_config.json); copy it"),
        ("tokenizer.json", "no tokenizer.json (nor tokenizer.model or vocab.json); copy it"),
    ):
        folder = Path(shutil.copytree(checkpoint, tmp_path / name))
        (folder / name).unlink()
        options = ("-m", recipe, "--images", pictures, "-t", "onnx", "-o", tmp_path / "out", "--checkpoint", folder)
        preflight(cli, f"{folder}: {message}", "build", *options)


def test_a_failing_runtime_is_one_line(cli: Cli, bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("Failed to allocate memory")

    monkeypatch.setattr("capa_export.run.onnx.OnnxModel.prefill", fail)
    ask = ("run", bundle, "--prompt", "x", "--image", pictures / "0.png")
    preflight(cli, "failed on a prompt of 64 visual tokens (Failed to allocate memory); use a smaller picture", *ask)


def test_a_key_that_the_file_name_gives_is_unknown(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    code, _, err = cli("plan", "-m", bad)
    assert code == ExitCode.USAGE and err == f"error: {bad}: no such file\n"
    bad.write_text('name = "x"\n' + recipe.read_text())
    code, _, err = cli("plan", "-m", bad)
    assert (
        code == ExitCode.USAGE
        and "unknown key name; known keys: auto_precision, calibration, checkpoint, family, ffn, fp32_layers, method"
        in err
    )
    bad.write_text(
        recipe.read_text().replace(
            "{ layer = 2, ratio = 0.75 }", "{ layer = 2, ratio = 0.5 }, { layer = 1, ratio = 0.5 }"
        )
    )
    assert "prune: layers must rise and ratios must not fall" in cli("plan", "-m", bad)[2]


def test_a_bundle_that_memory_has_no_room_for_is_not_loaded(
    cli: Cli, bundle: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capa_export.run.bundled.available_memory", lambda: 400 << 20)
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: pytest.fail("loads it all the same"))
    picture = min(pictures.glob("*.png"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": str(picture), "question": "?", "answer": "x"}), encoding="utf-8")
    commands: tuple[tuple[object, ...], ...] = (
        ("run", bundle, "--prompt", "?", "--image", picture),
        ("evaluate", bundle, "--data", rows, "-o", tmp_path / "answers"),
        ("compare", bundle, bundle),
    )
    for command, needed in zip(commands, (0.5, 0.5, 1.1), strict=True):
        code, out, err = cli(*command)
        assert (code, out) == (ExitCode.PREFLIGHT, ""), err
        assert f"running the graphs takes {needed} GB of memory, 0.4 GB are available" in err
        assert str(bundle) in err and "use a machine with more" in err
