"""The command line end to end on a small model."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from capa_export.base.errors import ExitCode
from capa_export.run import providers
from tests.cli.conftest import Cli, preflight


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
    assert set(manifest["stages"]) == {"calibrate", "effect", "export", "validate"}
    assert manifest["stages"]["export"]["result"]["linear_layers"]


def test_a_second_build_does_nothing_and_another_ratio_calibrates_and_exports_nothing(
    cli: Cli, spare: Path, recipe: Path, pictures: Path
) -> None:
    options = ("-m", recipe, "--images", pictures, "-t", "onnx", "-o", spare)
    code, _, err = cli("build", *options)
    assert code == 0
    assert [line.split(maxsplit=1)[1] for line in err.splitlines() if line[0] != " "] == ["up to date"] * 4
    code, out, err = cli("build", *options, "--ratio", 0.5, "--json")
    assert code == 0 and json.loads(out)["schedule"] == [{"layer": 2, "ratio": 0.5, "selector": "capa", "options": {}}]
    # On a slow machine, lines of progress stand between: `validate: eager: 3 of 4`.
    done = [line for line in err.splitlines() if line[0] != " " and ": " not in line]
    stages = {line.split()[0]: "up to date" in line for line in done}
    # What scales cost depends on the tokens that are left.
    assert stages == {"calibrate": True, "effect": False, "export": True, "validate": False}
    assert "ratio 0.5 after layer 2: kept 512 of 1024 visual tokens" in err


def test_engines_build_from_the_bundle(cli: Cli, spare: Path) -> None:
    code, out, _ = cli("engine", spare, "-t", "rtx", "--weights", "external", "--json")
    assert code == 0
    engines = json.loads(out)["engines"]
    assert set(engines) == {"visual/visual", "llm/prefill", "llm/decode"}
    assert all(row["weight_copies"] == 0 and row["custom_layers"] == 0 for row in engines.values())
    layers = json.loads((spare / "engines/rtx/llm/decode.layers.json").read_text())
    assert any("model/layers.4/self_attn" in name for layer in layers for name in layer["onnx"])


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
    assert merged["scaled_layers"] is None
    code, _, err = cli("export", "-m", recipe, "-o", tmp_path / "c")
    assert code == ExitCode.PREFLIGHT and "pass --images FOLDER" in err
    assert cli("export", "-m", recipe, "-o", tmp_path / "c", "--images", pictures)[0] == 0
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


def test_interrupt_keeps_finished_stages(
    cli: Cli, recipe: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("capa_export.export.folder.write_onnx", interrupted)
    code, _, err = cli("build", "-m", recipe, "--images", pictures, "-t", "onnx", "-o", tmp_path / "out")
    assert code == ExitCode.INTERRUPTED and "the same command goes on" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "calibration.safetensors",
        "capa_manifest.json",
        "ffn_effect.json",
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


def test_sigterm_ends_as_ctrl_c_does(cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("capa_export.pipeline.build", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    code, _, err = cli("build", "-m", recipe, "-t", "onnx", "-o", tmp_path / "out")
    assert code == ExitCode.TERMINATED and "the same command goes on" in err
    assert signal.getsignal(signal.SIGTERM) is before


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
    code, _, err = cli(*command, "--schedule", "capa@4:0.75")
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


def test_a_bundle_keeps_how_large_pictures_are_seen(
    cli: Cli, spare: Path, recipe: Path, pictures: Path, tmp_path: Path
) -> None:
    manifest = spare / "capa_manifest.json"
    limits = {"min_pixels": None, "max_pixels": None, "max_rows": 64, "max_cols": 64, "max_tiles": 16}
    assert json.loads(manifest.read_text())["recipe"]["pictures"] == limits
    options = ("-m", recipe, "--images", pictures, "-t", "onnx", "-o", spare)
    code, _, err = cli("build", *options, "--max-pixels", 20_000)
    assert code == 0 and "kept 7 of 25 visual tokens of a picture of 896 x 896" in err
    assert "\n              and 6 of 22, the mean of the calibration's prompts" in err
    stages = {line.split()[0]: "up to date" in line for line in err.splitlines() if line[0] != " " and ": " not in line}
    # Other pictures make another calibration, whose scales are in the graphs.
    assert stages == dict.fromkeys(("calibrate", "effect", "export", "validate"), False)
    assert json.loads(manifest.read_text())["recipe"]["pictures"]["max_pixels"] == 20_000
    ask = ("run", spare, "--prompt", "what ?", "--image", pictures / "0.png", "--max-new-tokens", 1, "--json")
    assert json.loads(cli(*ask)[1])["stages"][0]["visual"] == 25
    assert json.loads(cli(*ask, "--max-pixels", 10_000)[1])["stages"][0]["visual"] == 9
    assert json.loads(cli(*ask, "--min-pixels", 19_000)[1])["stages"][0]["visual"] == 25
    code, _, err = cli("build", *options[:-1], tmp_path / "none", "--max-pixels", 9)
    assert code == ExitCode.USAGE and err.count("\n") == 1 and not (tmp_path / "none").exists()
    assert "kept 7 of 25" in cli("plan", "-m", recipe, "--max-pixels", 20_000)[1]


@pytest.mark.parametrize(
    "command",
    [["run", "BUNDLE", "--prompt", "What?"], ["validate", "BUNDLE"], ["evaluate", "BUNDLE", "-d", "PICTURES"]],
)
def test_a_provider_that_is_not_there_is_refused(
    cli: Cli, bundle: Path, pictures: Path, tmp_path: Path, command: list[str]
) -> None:
    places = {"BUNDLE": str(bundle), "PICTURES": str(pictures)}
    words = [places.get(word, word) for word in command] + (["-o", str(tmp_path)] if command[0] == "evaluate" else [])
    preflight(cli, "--provider cuda: ONNX Runtime", *words, "--provider", "cuda")


def test_a_validation_says_which_provider_ran_the_graphs(
    cli: Cli, spare: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's provider does here what CUDA's is asked to."""
    monkeypatch.setattr(providers, "_NAMES", {**providers._NAMES, "cuda": "CPUExecutionProvider"})
    monkeypatch.setattr(providers, "_DEVICES", {**providers._DEVICES, "cuda": "cpu"})
    monkeypatch.setattr(providers, "_OPTIONS", {})
    code, out, err = cli("validate", spare, "--images", pictures, "--provider", "cuda", "--json")
    assert code == ExitCode.OK, err
    assert (
        "ONNX Runtime's cuda provider ran the bundle's graphs, its CPU provider the others." in json.loads(out)["notes"]
    )
