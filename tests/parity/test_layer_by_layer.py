"""A validation layer by layer gives the verdict of one in memory, and leaves no FP32 graphs on the disk."""

import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from capa_export.base.errors import ExitCode
from capa_export.bundle.store import Bundle, file_digest
from capa_export.cli import main
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.model.model import Model
from capa_export.report.schema import ParityReport, read_parity
from tests.building import Building
from tests.conftest import noise


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate(((224, 224), (140, 196), (84, 112))):
        noise(*size, index).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def built(checkpoint: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = load_recipe("qwen25vl").model_dump()
    data["prune"] = {"schedule": [{"layer": 2, "ratio": 0.75}]}
    data["ffn"] = {"eta": 0.5, "budget": 100}
    data["parity"] |= {"prompts": 3, "steps": 3, "accuracy_samples": 3}
    folder = tmp_path_factory.mktemp("built") / "bundle"
    building = Building.of(Recipe(**data), Bundle(folder), checkpoint, images=pictures)
    assert building.build(store_golden=2).passed
    return folder


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Bundle:
    return Bundle(shutil.copytree(built, tmp_path / "bundle"))


def validated(bundle: Bundle, checkpoint: Path, pictures: Path, *, layers: bool | None, **wanted: Any) -> ParityReport:
    building = Building.recorded(bundle, checkpoint=checkpoint, images=pictures, layer_by_layer=layers)
    return building.validate(**wanted)


def test_the_verdict_is_that_of_one_in_memory(
    bundle: Bundle, checkpoint: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Bundle(shutil.copytree(bundle.folder, bundle.folder.with_name("other")))
    whole = validated(other, checkpoint, pictures, layers=False, seed=1)
    # Neither the eager model nor a copy of the graphs is made.
    monkeypatch.setattr(Model, "eager", property(lambda _: pytest.fail("loaded")))
    monkeypatch.setattr("capa_export.export.graphs.write_onnx", lambda *_, **__: pytest.fail("written"))
    parts = validated(bundle, checkpoint, pictures, layers=True, seed=1)
    assert parts.passed, parts.failures
    assert any("layer by layer" in note for note in parts.notes)
    assert parts.method_error == whole.method_error
    assert [row.stages for row in parts.selection] == [row.stages for row in whole.selection]
    for own, wanted in zip(parts.export_error, whole.export_error, strict=True):
        for name in ("artefact", "reference", "prompts", "steps"):
            assert getattr(own, name) == getattr(wanted, name)
        assert [check.name for check in own.checks] == [check.name for check in wanted.checks]
        # The noise is the eager model's own, and so the same but for the order of sums.
        assert own.noise == pytest.approx(wanted.noise, rel=1e-2)


def test_models_that_do_not_fit_go_layer_by_layer(
    bundle: Bundle,
    checkpoint: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("capa_export.parity.validation.validation_bytes", lambda *_: 1 << 60)
    assert validated(bundle, checkpoint, pictures, layers=None, seed=1).passed
    assert "layer by layer: eager models and graphs take" in capsys.readouterr().err


def test_a_fault_is_found_and_named(bundle: Bundle, checkpoint: Path, pictures: Path) -> None:
    path = bundle.folder / "onnx" / "llm" / "prefill.onnx"
    model = ir.load(path)
    node = next(node for node in model.graph if node.name == "model/layers.1/post_attention_layernorm/RMSNormalization")
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
    ir.save(model, path)
    stages = bundle.manifest["stages"]
    stages["export"]["files"]["onnx/llm/prefill.onnx"] = file_digest(path)
    bundle.update(stages=stages)
    parity = validated(bundle, checkpoint, pictures, layers=True, bisect=True)
    assert not parity.passed and parity.bisection is not None
    assert (parity.bisection.layer, parity.bisection.block) == ("layers.1", "post_attention_layernorm")


def test_golden_samples_need_no_more_than_a_slice(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(bundle.folder), "--layer-by-layer"]) == ExitCode.OK, capsys.readouterr().err
    parity = read_parity(bundle.folder / "parity.json")
    assert parity.passed and parity.oracle == "golden"
    assert any("in slices" in note for note in parity.notes)
