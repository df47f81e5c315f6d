"""The validate stage: what is asked of it, golden samples in the place of a checkpoint, and a fault in a bundle."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle.store import Bundle
from capa_export.cli import main
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.parity.golden import GOLDEN
from capa_export.report.schema import ParityReport, read_parity
from tests.building import Building
from tests.conftest import noise, recorded
from tests.models.qwen25vl import random_model, save_model
from tests.planted import plant_in_decoder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate(((224, 224), (140, 196))):
        noise(*size, index).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def built(checkpoint: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two golden samples, and a checkpoint that is gone since."""
    data = load_recipe("qwen25vl").model_dump()
    data["prune"] = {"schedule": [{"layer": 2, "ratio": 0.75}]}
    data["ffn"] = {"eta": 0.5, "budget": 100}
    data["parity"] |= {"prompts": 3, "steps": 3, "accuracy_samples": 2}
    folder = tmp_path_factory.mktemp("stage")
    own = shutil.copytree(checkpoint, folder / "checkpoint")
    building = Building.of(Recipe(**data), Bundle(folder / "bundle"), own, images=pictures)
    parity = building.build(store_golden=2)
    assert parity.passed, parity.failures
    shutil.rmtree(own)
    return folder / "bundle"


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Bundle:
    return Bundle(shutil.copytree(built, tmp_path / "bundle"))


def validated(
    bundle: Bundle, pictures: Path | None = None, checkpoint: Path | None = None, **wanted: Any
) -> ParityReport:
    given = None if checkpoint is None else str(checkpoint)
    building = Building.recorded(bundle, checkpoint=given, images=pictures)
    return building.validate(**wanted)


def plant(bundle: Bundle, file: str, change: Callable[[ir.Model], None]) -> None:
    """Change a graph, and its recorded hash."""
    path = bundle.folder / "onnx" / file
    model = ir.load(path)
    change(model)
    ir.save(model, path)
    recorded(bundle)


def epsilon(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.name == "model/layers.1/post_attention_layernorm/RMSNormalization")
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)


def test_golden_samples_stand_for_the_checkpoint(bundle: Bundle) -> None:
    live = read_parity(bundle.folder / "parity.json")
    golden = validated(bundle, golden=True)
    assert golden.passed and (live.oracle, golden.oracle) == ("eager", "golden")
    assert golden.num_prompts == 2
    assert [row.reference for row in golden.export_error] == [
        "eager CAPA fp32",
        "eager CAPA fp16",
        "the golden samples' processors",
    ]
    assert golden.method_error == live.method_error
    assert any("2 stored golden samples" in note for note in golden.notes)
    assert read_parity(bundle.folder / "parity.json") == golden
    assert "Passed" in (bundle.folder / "report.html").read_text()


def test_a_fault_fails_on_golden_samples_too(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    plant(bundle, "llm/prefill.onnx", epsilon)
    assert main(["validate", str(bundle.folder)]) == ExitCode.PARITY
    err = capsys.readouterr().err
    assert "fp16 ONNX against eager CAPA fp32" in err and len(err.strip().splitlines()[-1].split("error: ")) == 2
    assert not read_parity(bundle.folder / "parity.json").passed


def test_another_processor_than_the_golden_samples_fails(bundle: Bundle) -> None:
    path = bundle.folder / "onnx" / "visual" / "preprocessor_config.json"
    path.write_text(path.read_text().replace("0.48145466", "0.48"))
    with pytest.raises(CapaError, match=r"preprocessor_config\.json: missing or changed"):
        validated(bundle, golden=True)
    recorded(bundle)
    assert validated(bundle, golden=True).failures == (
        "prompts against the golden samples' processors: onnx/visual/preprocessor_config.json",
    )


def test_what_asks_for_the_eager_model_needs_the_checkpoint(
    bundle: Bundle, pictures: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in (["--samples", "2"], ["--seed", "3"], ["--bisect"], ["--images", str(pictures)]):
        assert main(["validate", str(bundle.folder), *option]) == ExitCode.PREFLIGHT
        assert "which is no folder here" in capsys.readouterr().err, option
    options = ["--checkpoint", str(checkpoint), "--images", str(pictures), "--samples", "2", "--seed", "3"]
    assert main(["validate", str(bundle.folder), *options]) == ExitCode.OK
    parity = read_parity(bundle.folder / "parity.json")
    assert (parity.oracle, parity.num_prompts, parity.seed) == ("eager", 2, 3)


def test_bisect_names_the_layer(bundle: Bundle, pictures: Path, checkpoint: Path) -> None:
    plant(bundle, "llm/prefill.onnx", epsilon)
    parity = validated(bundle, pictures, checkpoint, bisect=True)
    assert not parity.passed and parity.bisection is not None
    assert (parity.bisection.layer, parity.bisection.block) == ("layers.1", "post_attention_layernorm")
    assert parity.bisection.graph == "llm/prefill.onnx" and not parity.bisection.fp32_layers


def test_gates_of_ones_own(bundle: Bundle, tmp_path: Path) -> None:
    gate = tmp_path / "gate.toml"
    gate.write_text("[fp16]\ncosine = 0.99999999\n")
    parity = validated(bundle, golden=True, gate=gate)
    (failure, _) = parity.failures
    assert "cosine" in failure and "below 1" in failure
    for text, problem in (
        ("[fp16]\ncosin = 1\n", "fp16: unknown key cosin; known keys: cosine"),
        ("[fp8]\ncosine = 1\n", "unknown key fp8"),
        ("[fp16]\ncosine = 'x'\n", "fp16"),
        ("[fp16\n", "gate.toml"),
    ):
        gate.write_text(text)
        with pytest.raises(CapaError, match=problem) as error:
            validated(bundle, golden=True, gate=gate)
        assert "\n" not in str(error.value) and error.value.code == ExitCode.USAGE


def test_warnings_are_failures_where_strict(bundle: Bundle, pictures: Path, checkpoint: Path) -> None:
    loose = validated(bundle, pictures, checkpoint)
    assert loose.passed and any("Only 2 different pictures for 3 prompts" in warning for warning in loose.warnings)
    strict = validated(bundle, pictures, checkpoint, strict=True)
    assert not strict.passed and strict.failures == tuple(f"--strict: {warning}" for warning in strict.warnings)


def test_golden_samples_go_with_the_export(bundle: Bundle, pictures: Path, checkpoint: Path) -> None:
    Building.recorded(bundle, checkpoint=checkpoint, images=pictures, precision="bf16").export()
    assert GOLDEN not in bundle.manifest["stages"] and not (bundle.folder / GOLDEN).exists()


def test_a_golden_sample_that_was_changed_is_refused(bundle: Bundle) -> None:
    path = bundle.folder / GOLDEN / "0001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CapaError, match=r"golden/0001\.safetensors"):
        validated(bundle, golden=True)


def test_what_leaves_fp16_is_computed_in_fp32_where_that_is_asked(
    checkpoint: Path, pictures: Path, bundle: Bundle, tmp_path: Path
) -> None:
    """What the recipe or the command line has in FP32 is in FP32 in graph and reference alike.

    The whole decoder is, for which the tower's rounding is then all that is left. Behind a part of it, the rest rounds
    other numbers than it did before: that may come out larger, on whatever processor.
    """
    decoder = ("residual", *map(str, range(5)))
    recipe = Building.recorded(bundle, images=pictures).recipe.with_options(fp32_layers=decoder)
    building = Building.of(recipe, Bundle(tmp_path / "wide"), checkpoint, images=pictures)
    parity = building.build()
    assert parity.passed and set(parity.fp32_layers) == set(decoder)
    plain = read_parity(bundle.folder / "parity.json")

    def of_layers(report: ParityReport, reference: str, figure: str) -> np.ndarray:
        (row,) = (row for row in report.export_error if (row.artefact, row.reference) == ("fp16 ONNX", reference))
        return np.array([getattr(layer, figure) for layer in row.layers])

    # The first is the reference's own, the second the graph's.
    for figure in (("eager CAPA fp16", "noise"), ("eager CAPA fp32", "relative_error")):
        assert (of_layers(parity, *figure) < of_layers(plain, *figure)).all()


@pytest.fixture(scope="module")
def massive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose residual stream reaches 2e5, as Qwen2's does."""
    model = random_model()
    plant_in_decoder(model)
    return save_model(tmp_path_factory.mktemp("massive"), model)


def massive_building(bundle: Bundle, massive: Path, pictures: Path, out: Path) -> Building:
    building = Building.recorded(bundle, checkpoint=massive, images=pictures)
    return building.again(bundle=Bundle(out))


def test_massive_activations_come_out_right(
    bundle: Bundle, massive: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parity = massive_building(bundle, massive, pictures, tmp_path / "out").build()
    assert parity.passed, parity.failures
    assert parity.fp32_layers == ("1.mlp", "residual")
    said = r"audit +1\.mlp in FP32: model\.language_model\.layers\.1\.mlp\S* reaches \S+, \d+% of the largest FP16"
    assert re.search(said, capsys.readouterr().err)


def test_what_an_audit_missed_is_found_by_bisection(
    bundle: Bundle,
    massive: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Calibration pictures may be tamer than what comes; `--auto-fp32` does what the bisection proposes."""
    monkeypatch.setattr("capa_export.export.stage.audit", lambda *_: ((), ()))
    building = massive_building(bundle, massive, pictures, tmp_path / "out")
    failed = building.build(bisect=True)
    assert not failed.passed and failed.bisection is not None
    assert failed.bisection.fp32_layers == ("1.mlp", "residual")
    capsys.readouterr()
    building = massive_building(bundle, massive, pictures, tmp_path / "out")
    parity = building.again(auto_fp32=True).build(bisect=True)
    assert parity.passed and parity.fp32_layers == ("1.mlp", "residual")
    assert "1.mlp, residual in FP32: failed, relative error inf -> passed" in capsys.readouterr().err
    assert building.bundle.manifest["recipe"]["fp32_layers"] == ["1.mlp", "residual"]


def test_golden_samples_of_another_size_of_pictures_are_refused(bundle: Bundle) -> None:
    recipe = {**bundle.manifest["recipe"], "pictures": {"max_pixels": 9999}}
    bundle.update(recipe=recipe)
    with pytest.raises(CapaError, match="its golden samples are of another size of pictures; store them again"):
        validated(bundle, golden=True)
