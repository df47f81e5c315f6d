"""What the stages refuse, what makes them run again, and that the bundle's answers are the eager model's."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file, save_file

from capa_export import pipeline
from capa_export.base import code
from capa_export.base.code import digest_code
from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle.lock import LOCK
from capa_export.bundle.store import Bundle, file_digest
from capa_export.calibrate.sums import Calibration
from capa_export.cli import main
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.target import load_target
from capa_export.data.conversation import conversations
from capa_export.model.checkpoint import Checkpoint
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.model.families import qwen25vl
from capa_export.model.generation import GenerationOptions, eos_token_ids
from capa_export.model.prompt import Prompter
from capa_export.plan import plan as dry_run
from capa_export.plan.flops import parameters
from capa_export.trt.stage import build_engines
from tests.building import Building, answer
from tests.conftest import noise
from tests.targets import one_gpu


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """The shipped one, made small; random weights are linear nowhere near 0.96."""
    data = load_recipe("qwen25vl").model_dump()
    data["prune"] = {"schedule": [{"layer": 2, "ratio": 0.75}]}
    data["ffn"] = {"eta": 0.5, "budget": 100}
    data["parity"] |= {"prompts": 2, "steps": 3, "accuracy_samples": 2}
    return Recipe(**data)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate(((224, 224), (140, 196))):
        noise(*size, index).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def building(recipe: Recipe, checkpoint: Path, pictures: Path, tmp_path: Path) -> Building:
    """On a checkpoint of its own, which a test may change."""
    own = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    return Building.of(recipe, Bundle(tmp_path / "out"), own, images=pictures)


def ran(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Stages of the latest call that did something."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line[0] != " "]
    return {line.split()[0] for line in lines if "up to date" not in line}


def change(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_graph_that_went_wrong_fails_whatever_its_precision(building: Building, precision: Any) -> None:
    building = building.again(precision=precision)
    assert building.build().passed
    path = building.bundle.folder / "onnx/llm/prefill.onnx"
    model = ir.load(path)
    for node in model.graph:
        if node.op_type == "RMSNormalization":
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.3)
    ir.save(model, path)
    stages = building.bundle.manifest["stages"]
    stages["export"]["files"]["onnx/llm/prefill.onnx"] = file_digest(path)
    building.bundle.update(stages=stages)
    assert not building.again().validate().passed


def test_what_prompts_depend_on_runs_everything_again(building: Building, capsys: pytest.CaptureFixture[str]) -> None:
    building = building.again(precision="fp32")
    building.build()
    assert ran(capsys) == {"calibrate", "effect", "export", "validate"}
    building.again().build()
    assert ran(capsys) == set()
    processor = Path(building.checkpoint) / "preprocessor_config.json"
    processor.write_text(json.dumps({**json.loads(processor.read_text()), "image_mean": [0.0, 0.0, 0.0]}))
    building.again().build()
    assert ran(capsys) == {"calibrate", "effect", "export", "validate"}


def test_changed_code_runs_again_what_it_made(
    building: Building, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = set[str]()
    monkeypatch.setattr(
        code, "digest_code", lambda *names: digest_code(*names) + str(sorted(changed.intersection(names)))
    )
    building = building.again(precision="fp32")
    building.build()
    ran(capsys)
    for module, stages in {
        "capa_export.parity.against_eager": {"validate"},
        "capa_export.export.folder": {"export", "validate"},
        "capa_export.calibrate.effect": {"effect", "validate"},
        "capa_export.calibrate.measurement": {"calibrate", "effect", "validate"},
    }.items():
        changed.add(module)
        building.again().build()
        assert ran(capsys) == stages


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"temperature": "hot"}, "temperature: Input should be a valid number"),
        ({"repetition_penalty": 0}, r"repetition_penalty must be above 0, not 0\.0; download it again, or correct it"),
        ({"do_sample": True, "top_p": 7}, r"top_p must be from 0 to 1, not 7\.0; download it again, or correct it"),
    ],
    ids=str,
)
def test_a_broken_generation_config_is_refused_before_anything_runs(
    building: Building, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], problem: str
) -> None:
    (Path(building.checkpoint) / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **settings}))
    for refused in (building.build, building.export):
        with pytest.raises(CapaError, match=rf"generation_config\.json: {problem}"):
            refused()
    assert ran(capsys) == set()


def test_a_setting_out_of_range_that_has_no_effect_is_none_of_ours(building: Building) -> None:
    settings = {"eos_token_id": 1, "do_sample": False, "top_p": 7}
    (Path(building.checkpoint) / "generation_config.json").write_text(json.dumps(settings))
    building.again(ffn=False).export()


def test_a_new_export_outdates_engines_and_parity(building: Building) -> None:
    building.build(one_gpu())
    assert set(building.bundle.manifest["stages"]) == {"calibrate", "effect", "export", "engine/rtx", "validate"}
    building.again(precision="fp32").export()
    assert set(building.bundle.manifest["stages"]) == {"calibrate", "effect", "export"}
    assert not (building.bundle.folder / "parity.json").exists()
    assert not list(building.bundle.folder.rglob("*.engine"))


def test_parity_is_never_measured_with_another_alpha(building: Building, pictures: Path, tmp_path: Path) -> None:
    building.calibrate()
    building.export()
    (tmp_path / "one").mkdir()
    shutil.copy(pictures / "0.png", tmp_path / "one")
    building.again(images=tmp_path / "one").calibrate()
    with pytest.raises(CapaError, match="changed since the export"):
        building.again().validate()


def test_a_foreign_calibration_does_not_replace_the_good_one(building: Building, tmp_path: Path) -> None:
    building.calibrate()
    good = (building.bundle.folder / "calibration.safetensors").read_bytes()
    foreign = replace(Calibration.load(building.bundle.folder), checkpoint_digest="another")
    foreign.save(tmp_path / "foreign.safetensors")
    with pytest.raises(CapaError, match=r"foreign\.safetensors: measured on another checkpoint"):
        building.again(calibration=tmp_path / "foreign.safetensors").calibrate()
    assert (building.bundle.folder / "calibration.safetensors").read_bytes() == good


def test_a_head_is_only_tied_where_the_config_says_so(building: Building) -> None:
    change(Path(building.checkpoint), lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CapaError, match=r"tensor lm_head\.weight is missing"):
        building.again(ffn=False).export()


def test_a_superfluous_tensor_is_refused_without_calibration_too(building: Building) -> None:
    change(Path(building.checkpoint), lambda tensors: tensors.update({"lora_A": np.ones(2, np.float32)}))
    with pytest.raises(CapaError, match="tensor lora_A has no place"):
        building.again(ffn=False).export()


def test_an_engine_that_copies_weights_is_refused(building: Building, monkeypatch: pytest.MonkeyPatch) -> None:
    building.calibrate()
    building.export()
    monkeypatch.setattr("capa_export.trt.layers.weight_copies", lambda layers, _: list(layers))
    with pytest.raises(CapaError, match=r"^visual/model\.onnx: the engine would copy weights at every run") as raised:
        build_engines(building.bundle, one_gpu(), weights="embedded", report=building.model.report)
    assert raised.value.code == ExitCode.ENGINE
    assert not (building.bundle.folder / "engines").exists()


def test_the_bundle_says_what_the_eager_model_says(
    building: Building, model: Any, prompter: Prompter, pictures: Path
) -> None:
    building = building.again(precision="fp32", ffn=False)
    building.calibrate()
    building.export()
    [result] = answer(
        building.bundle,
        conversations("what color is the star ?", [pictures / "1.png"]),
        options=GenerationOptions(max_new_tokens=8),
    )
    prompt = prompter("what color is the star ?", [noise(140, 196, 1)])
    embeds, position_ids = qwen25vl.eager_inputs(model, prompt)
    eager = Eager(model)
    run = eager.prefill(EagerInputs(embeds, position_ids), torch.from_numpy(prompt.is_visual), EagerPlan(keep={2: 9}))
    tokens, logits = [], run.logits
    eos = eos_token_ids(building.bundle.folder / "onnx" / "llm")
    while len(tokens) < 8 and (token := int(logits.argmax())) not in eos:
        tokens.append(token)
        logits = eager.step(run, token, run.next_position + len(tokens) - 1)
    assert len(tokens) > 2
    assert result["answer"] == prompter.decode(tokens)
    assert result["stages"] == [{"layer": 2, "where": "after layer 2", "kept": 9, "visual": 35}]


def test_the_digests_that_are_taken_meanwhile_are_those_of_the_files(building: Building) -> None:
    export = building.again(ffn=False)
    export.export()
    folder, manifest = Path(building.checkpoint), building.bundle.manifest
    expected = {path.name: file_digest(path) for path in (folder / "config.json", *folder.glob("*.safetensors"))}
    assert manifest["checkpoint"]["sha256"] == export.model.digests == expected
    written = manifest["stages"]["export"]["files"]
    assert {file: file_digest(building.bundle.folder / file) for file in written} == written
    building.bundle.verify("export")


def test_a_checkpoint_that_did_not_change_is_hashed_once(building: Building, monkeypatch: pytest.MonkeyPatch) -> None:
    building.again(ffn=False).export()
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "sha256", lambda *_: pytest.fail("reads the weights"))
        building.again(ffn=False, precision="fp32").export()
    change(Path(building.checkpoint), lambda tensors: tensors.update({"lm_head.weight": -tensors["lm_head.weight"]}))
    building.bundle.verify("export")
    known = building.bundle.manifest["checkpoint"]["sha256"]
    building.again(ffn=False, precision="fp32").export()
    assert building.bundle.manifest["checkpoint"]["sha256"] != known


def test_each_stage_by_itself_keeps_others_out(building: Building, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, held = Bundle.replace, list[bool]()

    def noted(bundle: Bundle, *outputs: Any, **entries: Any) -> None:
        held.append((bundle.folder / LOCK).exists())
        replace(bundle, *outputs, **entries)

    monkeypatch.setattr(Bundle, "replace", noted)
    for stage in (building.calibrate, building.export):
        stage()
        assert held and all(held)
        assert not (building.bundle.folder / LOCK).exists()
        held.clear()


def test_engines_that_would_not_fit_are_refused_before_anything_is_made(
    building: Building, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dry_run, "available_memory", lambda: 1100 << 20)
    reason = r"take 1\.2 GB of memory to build, 1\.2 GB are available; build with --weights external"
    with pytest.raises(CapaError, match=reason) as raised:
        building.again(ffn=False).build(one_gpu())
    assert raised.value.code == ExitCode.PREFLIGHT
    assert not building.bundle.folder.exists()
    building.again(ffn=False).export()
    with pytest.raises(CapaError, match=reason):
        build_engines(building.bundle, one_gpu(), weights="embedded", report=building.model.report)
    assert "engine/rtx" not in building.bundle.manifest["stages"]
    build_engines(building.bundle, one_gpu(), weights="external", report=building.model.report)
    monkeypatch.setattr(Bundle, "verify", lambda *_, weights=True: weights and pytest.fail("reads all files first"))
    with pytest.raises(CapaError, match=reason):
        build_engines(building.bundle, one_gpu(), weights="embedded", report=building.model.report)
    assert building.bundle.stage("engine/rtx")["result"]["weights"] == "external"
    plan = ["plan", "--model", "qwen25vl", "--checkpoint", building.checkpoint, "--schedule", "capa@2:0.75"]
    capsys.readouterr()
    assert main(plan) == ExitCode.PREFLIGHT
    output = capsys.readouterr()
    assert "a build would be refused: engines with embedded weights take 1.2 GB" in output.out
    assert "a build would be refused: engines with embedded weights take 1.2 GB" in output.err


def refusals(building: Building, **changes: Any) -> list[str]:
    """Of a plan of the building on a machine with all the memory and none of the disk."""
    options: dict[str, Any] = {
        "ffn": building.options.ffn,
        "target": load_target("onnx"),
        "layer_by_layer": True,
        **changes,
    }
    recipe, checkpoint = options.pop("recipe", building.recipe), options.pop("checkpoint", building.checkpoint)
    precision = options.pop("precision", building.options.precision)
    return dry_run.dry_run(recipe, checkpoint, building.bundle.folder, precision, **options)["refusals"]


@pytest.mark.parametrize("ffn", [True, False])
def test_only_what_would_not_run_again_takes_no_disk(
    building: Building, tmp_path: Path, monkeypatch: Any, *, ffn: bool
) -> None:
    made = building.again(ffn=ffn)
    made.calibrate()
    made.export()
    monkeypatch.setattr(dry_run, "available_memory", lambda: 1 << 60)
    monkeypatch.setattr(dry_run, "free_bytes", lambda _: 0)
    assert refusals(made) == []
    fewer = building.recipe.model_copy(update={"ffn": building.recipe.ffn.model_copy(update={"eta": 0.999})})
    other = shutil.copytree(building.checkpoint, tmp_path / "other")
    for changes in (
        {"precision": "fp32"},
        {"ffn": not ffn},
        {"checkpoint": str(other)},
        {"recipe": building.recipe.with_options(ratio=0.5)},
        {"recipe": building.recipe.with_options(fp32_layers=("0.mlp",))},
        *([{"recipe": fewer}] if ffn else []),
    ):
        assert "ONNX files and engines take 0.0 GB" in "".join(refusals(made, **changes)), changes
    monkeypatch.setattr(pipeline, "calibrate", lambda *_: None)
    monkeypatch.setattr(pipeline, "_validated", lambda *_: None)
    made.again(layer_by_layer=True).build()
    change(Path(building.checkpoint), lambda tensors: tensors.update({"lm_head.weight": -tensors["lm_head.weight"]}))
    with pytest.raises(CapaError, match="ONNX files and engines take"):
        made.again(layer_by_layer=True).build()


def test_engines_of_another_kind_take_disk(building: Building, monkeypatch: pytest.MonkeyPatch) -> None:
    building.again(ffn=False).export()
    monkeypatch.setattr(dry_run, "available_memory", lambda: 1 << 60)
    monkeypatch.setattr(dry_run, "free_bytes", lambda _: 0)
    plan: dict[str, Any] = {"ffn": False, "target": load_target("rtx")}
    assert refusals(building, **plan, weights="external") == []
    assert "or build with --weights external, which takes 0.0 GB" in "".join(
        refusals(building, **plan, weights="embedded")
    )


def test_the_copy_that_a_validation_in_memory_writes_takes_disk(
    building: Building, monkeypatch: pytest.MonkeyPatch
) -> None:
    building.again(ffn=False).export()
    memory, copy = 1 << 60, 4 * parameters(building.model.source.dims).total
    monkeypatch.setattr(dry_run, "available_memory", lambda: memory)
    monkeypatch.setattr(dry_run, "free_bytes", lambda _: copy - 1)
    for layer_by_layer in (None, False):
        (refusal,) = refusals(building, ffn=False, layer_by_layer=layer_by_layer)
        assert "engines, and their copy in FP32 while they are validated, take" in refusal
        assert "or pass --layer-by-layer, which takes 0.0 GB" in refusal
    assert refusals(building, ffn=False, layer_by_layer=True) == []
    monkeypatch.setattr(dry_run, "free_bytes", lambda _: copy)
    assert refusals(building, ffn=False) == []


def test_engines_that_the_disk_cannot_hold_are_refused(building: Building, monkeypatch: pytest.MonkeyPatch) -> None:
    building.again(ffn=False).export()
    usage = shutil.disk_usage(building.bundle.folder)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CapaError, match="bytes are needed, 100000 are free") as raised:
        build_engines(building.bundle, one_gpu(), weights="embedded", report=building.model.report)
    assert raised.value.code == ExitCode.PREFLIGHT
    assert not (building.bundle.folder / "engines").exists()
