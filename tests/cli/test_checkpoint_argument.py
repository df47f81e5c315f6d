"""The checkpoint as an argument: its config.json says which recipe is for it."""

import json
from pathlib import Path

import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import shipped
from tests.building import Building
from tests.cli.conftest import Cli, preflight
from tests.models import FAMILIES
from tests.models.internvl3 import QWEN3, save_original

ORIGINALS = {"InternVL3": {}, "InternVL3.5": QWEN3}


@pytest.mark.parametrize("decoder", ORIGINALS.values(), ids=ORIGINALS)
def test_the_authors_layout_becomes_a_bundle(
    cli: Cli, tmp_path: Path, pictures: Path, decoder: dict[str, object]
) -> None:
    """Calibrated, exported and validated against the eager model, in place too; then asked, without the checkpoint."""
    checkpoint = save_original(tmp_path / "published", FAMILIES["internvl3"].random_model(text=decoder))
    name = "internvl35" if decoder else "internvl3"
    assert json.loads(cli("plan", checkpoint, "--json")[1])["model"] == name
    text = (shipped("graphs") / f"{name}.toml").read_text(encoding="utf-8")
    text = text.replace("prompts = 32", "prompts = 2").replace("steps = 16", "steps = 2\naccuracy_samples = 2")
    (tmp_path / "small.toml").write_text(text, encoding="utf-8")
    options = ("--images", pictures, "--samples", 2, "--precision", "fp32", "-t", "onnx", "--weights", "in-place")
    # Random weights keep no answer.
    options += ("--accept-method-loss",)
    code, out, err = cli("build", checkpoint, "-m", tmp_path / "small.toml", *options, "-o", tmp_path / "out")
    assert code == 0, err
    assert "parity: passed" in out
    manifest = json.loads((tmp_path / "out" / "capa_manifest.json").read_text())
    assert manifest["checkpoint"]["source"] == str(checkpoint)
    assert set(manifest["checkpoint"]["sha256"]) == {"config.json", "model.safetensors"}
    (tmp_path / "published" / "config.json").unlink()
    picture = next(iter(sorted(pictures.glob("*.png"))))
    code, out, err = cli("run", tmp_path / "out", "--image", picture, "--prompt", "what color is the star ?")
    assert code == 0, err
    assert out.strip()


def test_a_second_build_finds_everything_done(cli: Cli, tmp_path: Path, pictures: Path) -> None:
    checkpoint = save_original(tmp_path / "published", FAMILIES["internvl3"].random_model())
    command = ("calibrate", checkpoint, "--images", pictures, "--samples", 2, "-o", tmp_path / "out")
    assert cli(*command)[0] == 0
    assert "up to date" in cli(*command)[2]


def test_every_stage_takes_it(cli: Cli, checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    """`checkpoint` is a small Qwen2.5-VL of five layers; its recipe prunes after layer 3."""
    out = tmp_path / "out"
    code, shown, err = cli("plan", checkpoint, "--json")
    assert code == 0, err
    assert json.loads(shown)["model"] == "qwen25vl" and json.loads(shown)["checkpoint"] == str(checkpoint)
    assert cli("calibrate", checkpoint, "--images", pictures, "--samples", 2, "-o", out)[0] == 0
    assert cli("export", checkpoint, "-o", out)[0] == 0
    assert cli("export", "--checkpoint", checkpoint, "-o", out)[0] == 0
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"image": str(pictures / "0.png"), "question": "what ?", "answer": "red"}))
    asked = ("evaluate", checkpoint, "--data", questions, "--method", "dense", "-o", tmp_path / "answers")
    assert cli(*asked, "--max-new-tokens", 2)[0] == 0


def test_tune_takes_it(cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Building] = []

    def stop(building: Building, *_: object) -> None:
        asked.append(building)
        raise CapaError("that will do")

    monkeypatch.setattr("capa_export.study.tune.stage.tune", stop)
    preflight(cli, "that will do", "tune", checkpoint, "--budget", 0.9, "-o", tmp_path / "tuned.toml")
    assert [(building.recipe.name, building.checkpoint) for building in asked] == [("qwen25vl", str(checkpoint))]


def test_a_recipe_goes_with_it(cli: Cli, recipe: Path, checkpoint: Path) -> None:
    shown = json.loads(cli("plan", checkpoint, "-m", recipe, "--json")[1])
    assert (shown["model"], shown["checkpoint"]) == ("small", str(checkpoint))


def test_a_recipe_for_another_model_is_refused(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    preflight(cli, "this recipe is for", "plan", checkpoint, "-m", "internvl3")
    preflight(cli, "this recipe is for", "export", checkpoint, "-m", "llava15", "-o", tmp_path / "out")
    assert not (tmp_path / "out" / "onnx").exists()


@pytest.mark.parametrize("command", ["build", "plan", "calibrate", "export", "tune", "evaluate"])
def test_nothing_given_is_refused(cli: Cli, command: str) -> None:
    needed = {"plan": [], "tune": ["-o", "x.toml", "--budget", "0.5"], "evaluate": ["-o", "x", "--data", "q.jsonl"]}
    options = needed.get(command, ["-o", "x"])
    code, out, err = cli(command, *options)
    assert code == ExitCode.USAGE and not out
    assert "name a checkpoint, a folder or a hub id, or a recipe with --model" in err
    code, _, err = cli(command, "one", "--checkpoint", "two", *options)
    assert code == ExitCode.USAGE and "the checkpoint is given twice: one, and --checkpoint two" in err


def test_models_names_what_each_recipe_takes(cli: Cli) -> None:
    takes = {line.split()[0]: line.partition("; takes ")[2].split(", ") for line in cli("models")[1].splitlines()}
    assert "nvidia/Cosmos-Reason1-7B" in takes["qwen25vl"] and "nvidia/Cosmos-Reason2-8B" in takes["qwen3vl"]
    assert {"OpenGVLab/InternVL3-8B", "OpenGVLab/InternVL3-8B-hf"} < set(takes["internvl3"])
    assert "OpenGVLab/InternVL3_5-8B-HF" in takes["internvl35"] and takes["tiny-qwen25vl"] == [""]


def test_what_is_no_checkpoint_is_refused(cli: Cli, tmp_path: Path) -> None:
    preflight(cli, "nowhere: no such folder; pass a folder that holds config.json", "plan", "nowhere")
    preflight(cli, "config.json: not found", "plan", tmp_path)
    code, _, err = cli("plan", "tiny-qwen25vl")
    assert code == ExitCode.USAGE and "is a recipe, not a checkpoint; say --model tiny-qwen25vl" in err
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    preflight(cli, "model_type is 'bert', and no recipe is for that; supported: internvl,", "plan", tmp_path)
    code, _, err = cli("calibrate", tmp_path, tmp_path, "-o", tmp_path / "out")
    assert code == ExitCode.USAGE and "calibrate takes one checkpoint" in err
