"""Plain weights rounded to INT4: the numbers, the eager model that has them, and what depends on them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import shipped
from capa_export.bundle.store import Bundle
from capa_export.calibrate.stage import check_owner
from capa_export.cli import main
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.target import load_target
from capa_export.model.model import Model
from capa_export.model.quantized.tensor import quantization
from capa_export.passes.pack_weights import packed_forms
from tests.building import Building
from tests.conftest import noise
from tests.quantizing import DECODER_LINEARS, FORMATS, quantize

WORD = "int4:32/rtn"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def opened(folder: Path, quantize: str | None = WORD) -> Model:
    return Model(recipe=load_recipe("qwen25vl").with_options(quantize=quantize), checkpoint=str(folder))


def nearest(weight: torch.Tensor, group: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight [out, in] rounded, number by number, and its scales."""
    rows, scales = [], []
    for row in weight.float().tolist():
        own = [torch.tensor(max(map(abs, row[at : at + group])) / 7) for at in range(0, len(row), group)]
        steps = [float(step.bfloat16().half()) or 2.0**-14 for step in own]
        rows.append([max(-7, min(7, round(x / steps[i // group]))) * steps[i // group] for i, x in enumerate(row)])
        scales.append(steps)
    return torch.tensor(rows, dtype=torch.float64).float(), torch.tensor(scales)


def test_the_eager_model_has_the_nearest_numbers_and_all_else_as_it_was(folder: Path) -> None:
    plain, model = opened(folder, None).eager, opened(folder)
    before, after = dict(plain.named_parameters()), dict(model.eager.named_parameters())
    assert before.keys() == after.keys()
    linear = [name for name in before if DECODER_LINEARS.search(name) and "visual" not in name]
    assert len(linear) == 35
    for name, weight in before.items():
        if name in linear:
            expected, scales = nearest(weight.detach())
            assert torch.equal(after[name], expected), name
            step = scales.repeat_interleave(32, 1)
            assert ((after[name] - weight).abs() <= 0.51 * step).all()
        else:
            assert torch.equal(after[name], weight), name
    assert quantization(model.source.tensors.values()) == "35 layers of INT4, rounded to nearest, groups of 32"


def test_zeros_stay_and_what_is_not_finite_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, :32], tensors[name][4, :32] = 0, 1e-9
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    weight = opened(folder).source.tensors["model.layers.1.mlp.up_proj.weight"].mapped()
    assert not weight[3:5, :32].any() and weight[3:5, 32:].any(1).all()
    tensors[name][5, 6] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    building = Building.of(opened(folder).recipe, Bundle(tmp_path / "out"), folder, ffn=False)
    with pytest.raises(CapaError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_scale holds NaN or infinity"):
        building.export()


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("int4:48", "--quantize int4:48: groups of 48 are multiplied nowhere; take one of 32, 64, 128"),
        ("int8", "--quantize int8: must be none, int4, or int4 with a group, as int4:64"),
        ("int4:64", "--quantize int4:64: groups of 64 inputs do not divide intermediate_size, 96; choose another"),
    ],
)
def test_other_words_are_refused(folder: Path, word: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["export", str(folder), "--out", str(folder / "out")], ["plan", str(folder)]):
        assert main([*command, "--model", "qwen25vl", "--quantize", word]) == ExitCode.USAGE
        err = capsys.readouterr().err
        assert problem in err and len(err.strip().splitlines()) == 1
    assert not (folder / "out" / "onnx").exists()


def test_what_is_quantized_already_is_refused(folder: Path) -> None:
    quantize(folder, FORMATS["AutoAWQ"])
    with pytest.raises(CapaError, match=r"quantized already \(AutoAWQ, 4 bits.*leave --quantize away"):
        _ = opened(folder).source


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--weights", "external"], "--weights external: as inputs of an engine, INT4 weights would be dequantized"),
        (["--weights", "in-place"], "--weights in-place reads the checkpoint's own weights, and --quantize int4:32"),
        (["--target", "{target}"], "target old does not take INT4 weights; build with --quantize none"),
    ],
)
def test_what_cannot_be_with_int4_is_refused_before_anything_runs(
    folder: Path, options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = folder.parent / "old.toml"
    shipped_text = (shipped("engines") / "rtx.toml").read_text()
    target.write_text(shipped_text.replace('weight_types = ["int4"]\n', ""))
    assert load_target(str(target)).require_engine().weight_types == ()
    out = folder.parent / "out"
    given = [option.format(target=target) for option in options]
    common = ["--model", "qwen25vl", "--quantize", WORD, "--out", str(out)]
    assert main(["build", str(folder), *common, *given]) == ExitCode.USAGE
    assert problem in capsys.readouterr().err
    assert not [path for path in out.rglob("*") if path.suffix not in (".lock", "")]


@pytest.fixture
def building(folder: Path, tmp_path: Path) -> Building:
    data: dict[str, Any] = load_recipe("qwen25vl").model_dump()
    data["prune"] = {"schedule": [{"layer": 2, "ratio": 0.75}]}
    data["ffn"] = {"eta": 0.5, "budget": 100}
    data["parity"] |= {"prompts": 1, "steps": 2, "accuracy_samples": 1}
    noise(224, 224).save(tmp_path / "picture.png")
    return Building.of(
        Recipe.model_validate({**data, "quantize": WORD}),
        Bundle(tmp_path / "out"),
        folder,
        images=tmp_path / "picture.png",
    )


def test_calibration_and_export_are_those_of_the_rounded_model(building: Building) -> None:
    calibration = building.calibrate()
    assert calibration.checkpoint_digest == building.model.digest
    plain = opened(Path(building.checkpoint), None)
    assert building.model.digest != plain.digest
    with pytest.raises(CapaError, match="measured on another checkpoint"):
        check_owner(calibration, plain, Path("calibration"))
    building.export()
    rounded = building.bundle.stage("export")
    expanded = replace(building, recipe=building.recipe.with_options(quantize="none"))
    assert expanded.calibrate().digest() != calibration.digest()
    expanded.export()
    assert building.bundle.stage("export")["result"]["alpha"] != rounded["result"]["alpha"]
    assert building.bundle.stage("export")["result"]["packing"] is None


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_layer_by_layer_and_with_parts_in_fp32(building: Building, precision: Any) -> None:
    fp32_layers = () if precision == "fp32" else ("1.mlp",)
    building.recipe = building.recipe.with_options(fp32_layers=fp32_layers)
    building.options = replace(building.options, precision=precision, layer_by_layer=True)
    parity = building.build()
    assert parity.passed, [check.failure for error in parity.export_error for check in error.checks]
    graph = ir.load(building.bundle.folder / "onnx/llm/decode.onnx").graph
    assert len(packed_forms(graph)) == 34
    kinds = {value.dtype for name, value in graph.initializers.items() if name.endswith("weight_scale")}
    assert kinds == {ir.DataType.FLOAT, {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}.get(precision)} - {
        None
    }
