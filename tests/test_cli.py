"""The command line end to end on a small model, and every bad input as one line with its exit code."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from capa_export.cli import main
from capa_export.errors import ExitCode
from capa_export.families import qwen25vl
from capa_export.shipped import shipped
from tests.conftest import noise, random_model, save_model

Result = tuple[int, str, str]
Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command line; gives its exit code, stdout and stderr."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def recipe(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped recipe, made small, over the small checkpoint."""
    text = (shipped("graphs") / "qwen25vl.toml").read_text(encoding="utf-8")
    text = text.replace("Qwen/Qwen2.5-VL-7B-Instruct", str(checkpoint)).replace("layer = 3,", "layer = 2,")
    text = text.replace("prompts = 32", "prompts = 4").replace("steps = 16", "steps = 4\naccuracy_samples = 4")
    # Random weights are linear nowhere near 0.96.
    text = text.replace("eta = 0.96", "eta = 0.5").replace("alternatives = [11, 21]", "")
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate(((224, 224), (140, 196), (84, 336))):
        noise(*size, index).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def bundle(recipe: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished bundle without engines. Tests copy it before they change it."""
    out = tmp_path_factory.mktemp("bundle") / "out"
    assert main(["build", "-m", str(recipe), "--images", str(pictures), "-t", "onnx", "-o", str(out)]) == ExitCode.OK
    return out


@pytest.fixture
def spare(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "spare"))


def test_a_bundle_holds_what_the_readme_lists(bundle: Path) -> None:
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert {
        "capa_manifest.json",
        "calibration.safetensors",
        "parity.json",
        "report.html",
        "onnx/llm/prefill.onnx",
        "onnx/llm/decode.onnx",
        "onnx/llm/model.onnx.data",
        "onnx/llm/embedding.safetensors",
        "onnx/llm/config.json",
        "onnx/llm/tokenizer.json",
        "onnx/visual/model.onnx",
        "onnx/visual/model.onnx.data",
        "onnx/visual/preprocessor_config.json",
    } <= files
    manifest = json.loads((bundle / "capa_manifest.json").read_text())
    assert set(manifest["stages"]) == {"calibrate", "export", "validate"}
    assert manifest["stages"]["export"]["result"]["linear_layers"]


def test_a_second_build_does_nothing_and_another_ratio_only_validates(
    cli: Cli, spare: Path, recipe: Path, pictures: Path
) -> None:
    options = ("-m", recipe, "--images", pictures, "-t", "onnx", "-o", spare)
    code, _, err = cli("build", *options)
    assert code == 0
    assert [line.split(maxsplit=1)[1] for line in err.splitlines() if line[0] != " "] == ["up to date"] * 3
    code, out, err = cli("build", *options, "--ratio", 0.5, "--json")
    assert code == 0 and json.loads(out)["schedule"] == [{"layer": 2, "ratio": 0.5, "selector": "capa", "options": {}}]
    # On a slow machine, lines of progress stand between: `validate: eager: 3 of 4`.
    done = [line for line in err.splitlines() if line[0] != " " and ": " not in line]
    stages = {line.split()[0]: "up to date" in line for line in done}
    assert stages == {"calibrate": True, "export": True, "validate": False}
    assert "ratio 0.5 after layer 2: kept 512 of 1024 visual tokens" in err


def test_engines_build_from_the_bundle(cli: Cli, spare: Path) -> None:
    code, out, _ = cli("engine", spare, "-t", "rtx", "--weights", "external", "--json")
    assert code == 0
    engines = json.loads(out)["engines"]
    assert set(engines) == {"visual/visual", "llm/prefill", "llm/decode"}
    assert all(row["weight_copies"] == 0 and row["custom_layers"] == 0 for row in engines.values())
    layers = json.loads((spare / "engines/rtx/llm/decode.layers.json").read_text())
    assert any("model/layers.4/self_attn" in name for layer in layers for name in layer["onnx"])


def test_run_answers_from_the_bundle_alone(cli: Cli, spare: Path, pictures: Path) -> None:
    question = ("--prompt", "what color is the star ?", "--image", pictures / "0.png", "--max-new-tokens", 3)
    code, out, err = cli("run", spare, *question)
    assert code == 0 and out.strip() and "kept 16 of 64 visual tokens after layer 2" in err
    code, streamed, _ = cli("run", spare, *question, "--ratio", 0)
    code, out, _ = cli("run", spare, *question, "--ratio", 0, "--json")
    result = json.loads(out)
    assert result["stages"] == [{"layer": 2, "where": "after layer 2", "kept": 64, "visual": 64}]
    assert result["answer"] == streamed.strip()
    assert result["new_tokens"] <= 3
    code, _, err = cli("run", spare, "--prompt", "hello", "--max-new-tokens", 1)
    assert code == 0 and "kept 0 of 0" in err


def test_validate_again_and_inspect(cli: Cli, bundle: Path, pictures: Path) -> None:
    code, out, _ = cli("validate", bundle, "--images", pictures)
    assert code == 0 and "parity: passed" in out
    code, out, _ = cli("inspect", bundle)
    assert code == 0 and "every file is as it was built" in out
    code, out, _ = cli("inspect", bundle, "--json")
    assert json.loads(out)["recipe"]["name"] == "small"


def test_calibrate_in_two_halves_and_merge(cli: Cli, recipe: Path, pictures: Path, tmp_path: Path) -> None:
    for part, names in (("a", ("0.png", "1.png")), ("b", ("2.png",))):
        (tmp_path / f"pictures-{part}").mkdir()
        for name in names:
            shutil.copy(pictures / name, tmp_path / f"pictures-{part}")
        options = ("-m", recipe, "--images", tmp_path / f"pictures-{part}", "-o", tmp_path / part)
        assert cli("calibrate", *options)[0] == 0
    merge = ("calibrate", "--merge", tmp_path / "a", tmp_path / "b" / "calibration.safetensors", "-o", tmp_path / "c")
    code, out, _ = cli(*merge, "-m", recipe, "--json")
    merged = json.loads(out)
    assert code == 0 and merged["samples"] == 3
    code, out, _ = cli("calibrate", "-m", recipe, "--images", pictures, "-o", tmp_path / "whole", "--json")
    whole = json.loads(out)
    assert merged["linear_layers"] == whole["linear_layers"] and merged["absmax"] == whole["absmax"]
    assert cli("export", "-m", recipe, "-o", tmp_path / "c")[0] == 0
    other = ("export", "-m", recipe, "-o", tmp_path / "d", "--calibration", tmp_path / "c", "--precision", "fp32")
    assert cli(*other)[0] == 0


def test_plan_needs_no_torch(recipe: Path) -> None:
    code = (
        "import sys; from capa_export.cli import main; "
        f"status = main(['build', '-m', {str(recipe)!r}, '--dry-run', '--json']); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["stages"] == [{"layer": 2, "where": "after layer 2", "selector": "capa", "kept": 256, "visual": 1024}]
    assert plan["prefill"]["ratio"] > 1.5


def test_tables_for_people(cli: Cli, recipe: Path) -> None:
    assert "kept 256 of 1024" in cli("plan", "-m", recipe)[1]
    assert "tiny-qwen25vl" in cli("models")[1] and "tensorrt-rtx" in cli("targets")[1]
    assert json.loads(cli("models", "--json")[1]) and json.loads(cli("targets", "--json")[1])
    assert "divprune      before the decoder" in cli("selectors")[1]
    (fastv,) = [one for one in json.loads(cli("selectors", "--json")[1]) if one["name"] == "fastv"]
    assert (fastv["place"], fastv["layer"], fastv["options"]) == ("entry", 2, {})
    assert cli("--version")[1].strip()


USAGE = {
    "unknown model": (["build", "-m", "llama", "-o", "x"], "unknown model 'llama'; known models: "),
    "unknown target": (["build", "-m", "qwen25vl", "-o", "x", "-t", "nano"], "unknown target 'nano'; known targets: "),
    "ratio of one": (["build", "-m", "qwen25vl", "-o", "x", "--ratio", "1"], "--ratio 1: the fraction of visual"),
    "negative ratio": (["plan", "-m", "qwen25vl", "--ratio", "-0.1"], "--ratio -0.1"),
    "negative layer": (["plan", "-m", "qwen25vl", "--prune-layer", "-1"], "--prune-layer -1"),
    "merge of nothing": (["calibrate", "--merge", "-o", "x"], "--merge takes calibrations"),
    "calibrate nothing": (["calibrate", "-o", "x"], "calibrate needs --model"),
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
    assert code == ExitCode.USAGE and "unknown key ffn.etta; known keys: eta, paper_layers" in err
    bad.write_text(recipe.read_text().replace("ratio = 0.75", "ratio = 1.75"))
    assert "prune.schedule.0.ratio" in cli("plan", "-m", bad)[2]
    bad.write_text("family = [")
    assert str(bad) in cli("plan", "-m", bad)[2]


def preflight(cli: Cli, message: str, *arguments: object) -> None:
    code, out, err = cli(*arguments)
    assert code == ExitCode.PREFLIGHT, err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert message in err, err
    assert not out


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
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["LlavaForConditionalGeneration"]}))
    preflight(cli, "holds LlavaForConditionalGeneration, this recipe is for Qwen2_5", "build", *options, other)
    preflight(cli, "layers 0 to 4", "build", *options, checkpoint, "--prune-layer", 4)
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
    from capa_export.bundle import Bundle, file_digest

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


def test_interrupt_keeps_finished_stages(
    cli: Cli, recipe: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("capa_export.export.write_onnx", interrupted)
    code, _, err = cli("build", "-m", recipe, "--images", pictures, "-t", "onnx", "-o", tmp_path / "out")
    assert code == ExitCode.INTERRUPTED and "the same command goes on" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "calibration.safetensors",
        "capa_manifest.json",
    ]


def test_debug_shows_the_traceback(cli: Cli) -> None:
    code, _, err = cli("build", "-m", "llama", "-o", "x", "--debug")
    assert code == ExitCode.USAGE and err.startswith("Traceback") and "error: unknown model 'llama'" in err


def test_bf16_runs_widened(cli: Cli, spare: Path, recipe: Path, pictures: Path) -> None:
    options = ("-m", recipe, "--images", pictures, "-t", "onnx", "-o", spare, "--precision", "bf16", "--json")
    code, out, _ = cli("build", *options)
    parity = json.loads(out)
    assert code == 0 and parity["export_error"][-1]["artefact"] == "bf16 ONNX"
    errors = {
        (row["artefact"], row["reference"]): check["value"]
        for row in parity["export_error"]
        for check in row["checks"]
        if check["name"] == "relative error"
    }
    fp32 = ("fp32 ONNX", "eager CAPA fp32")
    assert errors["bf16 ONNX", "eager CAPA fp32"] > 100 * errors[fp32] > 0 < errors["bf16 ONNX", "eager CAPA bf16"]
    assert "no bf16 kernels" in parity["notes"][0]


def test_a_target_without_its_builder_is_refused_first(
    cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capa_export.build_engines.find_spec", lambda _: None)
    code, _, err = cli("build", "-m", recipe, "-o", tmp_path / "out")
    assert code == ExitCode.ENGINE and "pip install capa-export[rtx]" in err and not (tmp_path / "out").exists()


def test_no_engine_to_build_is_a_usage_error(cli: Cli, spare: Path) -> None:
    code, _, err = cli("engine", spare, "-t", "onnx")
    assert code == ExitCode.USAGE and "target onnx has no engine" in err


def test_sigterm_ends_as_ctrl_c_does(cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("capa_export.pipeline.build", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    code, _, err = cli("build", "-m", recipe, "-t", "onnx", "-o", tmp_path / "out")
    assert code == ExitCode.TERMINATED and "the same command goes on" in err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_damaged_recipe_in_the_manifest(cli: Cli, spare: Path, pictures: Path) -> None:
    from capa_export.bundle import Bundle

    opened = Bundle(spare)
    recipe = opened.manifest["recipe"]
    del recipe["prune"]
    opened.update(recipe=recipe)
    for command in (("run", spare, "--prompt", "x"), ("validate", spare, "--images", pictures), ("inspect", spare)):
        preflight(cli, "damaged manifest (recipe: prune: Field required)", *command)


def test_a_dry_run_takes_the_calibration_it_is_given(cli: Cli, recipe: Path, bundle: Path) -> None:
    command = ("build", "-m", recipe, "--dry-run", "--json")
    measured = json.loads(cli(*command, "--calibration", bundle)[1])
    assert measured["linear_layers_from"] == "calibration"
    assert (
        measured["linear_layers"]
        == json.loads(cli("calibrate", "--merge", bundle, "-m", recipe, "-o", bundle.parent / "again", "--json")[1])[
            "linear_layers"
        ]
    )
    assert "unknown until calibrated" in cli("plan", "-m", "tiny-qwen25vl")[1]
    code, _, err = cli(*command, "--prune-layer", 4)
    assert code == ExitCode.PREFLIGHT and "the last one is too late" in err


def test_a_dry_run_counts_what_the_target_stores(cli: Cli, bundle: Path, recipe: Path) -> None:
    command = ("build", "-m", recipe, "--dry-run", "--json")
    plan = json.loads(cli(*command)[1])
    stored = sum((bundle / "onnx" / name / "model.onnx.data").stat().st_size for name in ("llm", "visual"))
    assert plan["files"]["onnx weights"] == pytest.approx(stored, rel=0.05)
    assert plan["files"]["engines"] > plan["files"]["onnx weights"]
    external = json.loads(cli(*command, "--weights", "external")[1])
    assert "engines" not in external["files"] and external["memory"]["engine"] < plan["memory"]["engine"]
    onnx = json.loads(cli(*command, "-t", "onnx")[1])
    assert "engines" not in onnx["files"] and "engine" not in onnx["memory"]


def test_tables_fit_80_columns(cli: Cli, bundle: Path, recipe: Path, pictures: Path) -> None:
    commands = (("validate", bundle, "--images", pictures), ("inspect", bundle), ("plan", "-m", recipe))
    for command in commands:
        lines = cli(*command)[1].splitlines()
        assert all(line == line.rstrip() for line in lines)
        tables = [line for line in lines if "  " in line]
        assert tables and max(map(len, tables)) <= 80


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

    monkeypatch.setattr("capa_export.runtime.OnnxModel.prefill", fail)
    ask = ("run", bundle, "--prompt", "x", "--image", pictures / "0.png")
    preflight(cli, "failed on a prompt of 64 visual tokens (Failed to allocate memory); use a smaller picture", *ask)


def test_an_answer_keeps_its_tail_and_its_times(cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capa_export.prompt.Prompter.decode", lambda _self, tokens: "\ufffd" * len(tokens))
    ask = ("run", bundle, "--prompt", "x", "--max-new-tokens", 1)
    assert cli(*ask)[1] == "\ufffd\n"
    result = json.loads(cli(*ask, "--json")[1])
    assert result["decode_ms_per_token"] is None and result["prefill_ms"] == round(result["prefill_ms"], 3)


def test_a_key_that_the_file_name_gives_is_unknown(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    code, _, err = cli("plan", "-m", bad)
    assert code == ExitCode.USAGE and err == f"error: {bad}: no such file\n"
    bad.write_text('name = "x"\n' + recipe.read_text())
    code, _, err = cli("plan", "-m", bad)
    assert (
        code == ExitCode.USAGE
        and "unknown key name; known keys: calibration, checkpoint, family, ffn, fp32_layers, parity" in err
    )
    bad.write_text(
        recipe.read_text().replace(
            "{ layer = 2, ratio = 0.75 }", "{ layer = 2, ratio = 0.5 }, { layer = 1, ratio = 0.5 }"
        )
    )
    assert "prune: layers must rise and ratios must not fall" in cli("plan", "-m", bad)[2]


def test_a_conversation_and_a_video_are_answered(cli: Cli, bundle: Path, pictures: Path, tmp_path: Path) -> None:
    question = {"type": "text", "text": "what color is the star ?"}
    path = tmp_path / "messages.json"

    def ask(*content: dict[str, str]) -> dict[str, Any]:
        turns = [{"role": "user", "content": "what is red ?"}, {"role": "assistant", "content": "the star"}]
        path.write_text(json.dumps([*turns, {"role": "user", "content": [*content, question]}]), encoding="utf-8")
        code, out, err = cli("run", bundle, "--messages", path, "--json", "--max-new-tokens", 2)
        assert (code, err) == (0, "")
        return json.loads(out)

    assert ask()["stages"] == [{"layer": 2, "where": "after layer 2", "kept": 0, "visual": 0}]
    shown = [{"type": "image", "image": str(pictures / name)} for name in ("0.png", "1.png")]
    assert ask(*shown)["stages"] == [{"layer": 2, "where": "after layer 2", "kept": 25, "visual": 64 + 35}]
    frames = tmp_path / "frames"
    frames.mkdir()
    for index in range(5):
        noise(112, 84, index).save(frames / f"{index}.png")
    video = ask({"type": "video", "video": "frames"})
    assert video["stages"] == [{"layer": 2, "where": "after layer 2", "kept": 9, "visual": 3 * 4 * 3}]
    options = ("--prompt", question["text"], "--video", frames, "--fps", 2, "--max-new-tokens", 2)
    code, out, err = cli("run", bundle, *options)
    assert code == 0 and out.strip() and err.startswith("kept 9 of 36 visual tokens after layer 2; vision ")


def test_several_conversations_are_answered_as_each_alone(
    cli: Cli, bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    files: list[Path] = []
    for index, names in enumerate([["0.png", "1.png"], [], ["1.png"]]):
        shown = [{"type": "image", "image": str(pictures / name)} for name in names]
        turn = {"role": "user", "content": [*shown, {"type": "text", "text": "what shape is red ?"}]}
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(json.dumps([turn]), encoding="utf-8")

    def ask(*paths: Path) -> Any:
        options = [word for path in paths for word in ("--messages", path)]
        code, out, _ = cli("run", bundle, *options, "--json", "--max-new-tokens", 4)
        assert code == 0
        return json.loads(out)

    alone, together = [ask(path) for path in files], ask(*files)
    for one, same in zip(alone, together, strict=True):
        assert one["answer"] == same["answer"] and one["stages"] == same["stages"]
    code, out, err = cli("run", bundle, "--messages", files[0], "--messages", files[1], "--max-new-tokens", 4)
    assert code == 0 and out.splitlines() == [one["answer"] for one in alone[:2]] and err.count("kept") == 2


def test_what_run_cannot_take_together_is_one_line(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    for options, message in (
        ((), "run needs --prompt, or a conversation in --messages"),
        (("--prompt", "x", "--messages", tmp_path), "--messages holds the whole conversation: it takes no --prompt"),
        (("--prompt", "x", "--fps", 2), "--fps has no effect without --video"),
        (("--messages", tmp_path / "x.json"), "x.json: no such file"),
    ):
        code, out, err = cli("run", bundle, *options)
        assert (code, out) == (ExitCode.USAGE, "") and message in err and err.count("\n") == 1
    preflight(cli, "clip.mp4: no such video", "run", bundle, "--prompt", "x", "--video", tmp_path / "clip.mp4")


def test_conversations_calibrate(cli: Cli, recipe: Path, pictures: Path, tmp_path: Path) -> None:
    first, second, third = ({"type": "image", "image": str(pictures / f"{index}.png")} for index in range(3))
    contents = ([first, second, {"type": "text", "text": "what color is the star ?"}], [third, first])
    lines = [json.dumps({"messages": [{"role": "user", "content": content}]}) for content in contents]
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    options = ("-m", recipe, "--images", path, "-t", "onnx", "-o", tmp_path / "out", "--json")
    code, out, _ = cli("build", *options)
    parity = json.loads(out)
    assert code == 0, parity["failures"]
    assert parity["prompts"] == f"2 conversations of {path}"
    assert "Only 2 different conversations for 4 prompts: give as many in --images." in parity["warnings"]
    path.write_text("{}\n", encoding="utf-8")
    preflight(cli, "samples.jsonl: line 1: messages: Field required", "build", *options)


def test_an_answer_ends_with_the_context(cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of decoders whose rotary frequencies are others from a length on."""
    ask = ("run", bundle, "--prompt", "what color is the star ?", "--max-new-tokens", 8, "--json")
    monkeypatch.setattr("capa_export.answer.eos_token_ids", lambda _folder: [])
    unlimited = json.loads(cli(*ask)[1])
    assert unlimited["new_tokens"] == 8
    limits = [unlimited["prompt_tokens"] + 2, unlimited["prompt_tokens"] - 1]
    model_dims = qwen25vl.model_dims

    def limited(config: dict[str, Any], **where: str) -> Any:
        dims = model_dims(config, **where)
        return replace(dims, decoder=replace(dims.decoder, rope_limit=limits[0]))

    monkeypatch.setattr("capa_export.families.qwen25vl.model_dims", limited)
    # The last token is not fed back: three of them end at the limit.
    assert json.loads(cli(*ask)[1])["new_tokens"] == 3
    del limits[0]
    preflight(cli, f"more than the {limits[0]} of this decoder's context; use fewer or smaller pictures", *ask)
