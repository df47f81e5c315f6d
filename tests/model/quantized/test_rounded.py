"""Plain weights rounded to INT4: the numbers, the eager model that has them, and what depends on them."""

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import shipped
from capa_export.base.weight_types import PackedLayers
from capa_export.bundle.store import Bundle
from capa_export.calibrate.sums import check_owner
from capa_export.cli import main
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.target import load_target
from capa_export.export import graphs
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
    assert quantization(model.source.tensors) == "35 layers of INT4, rounded to nearest, groups of 32"


def nearest_of(kind: str, row: list[float], top: float) -> list[float]:
    """The numbers of the type, times their scale, that are nearest to those of a group; ties are even."""
    if kind == "int8":
        step = float(torch.tensor(max(map(abs, row)) / 127).bfloat16().half())
        return [max(-127, min(127, round(x / step))) * step for x in row]
    if kind == "fp8":
        step = float(torch.tensor(max(map(abs, row)) / 448).bfloat16().half())
        scaled = (torch.tensor(row) / step).clamp(-448, 448)
        return [float(x) * step for x in scaled.to(torch.float8_e4m3fn).float()]
    outer = 2.0 ** math.ceil(math.log2(top / 6 / 448))
    step = float(torch.tensor(max(map(abs, row)) / 6 / outer).to(torch.float8_e4m3fn).float()) * outer
    # Zero, and of E2M1 the numbers whose last bit is zero, come first: they win ties.
    grid = [0.0, 1.0, 2.0, 4.0, 0.5, 1.5, 3.0, 6.0]
    return [math.copysign(min(grid, key=lambda g, x=x: abs(abs(x) / step - g)) * step, x) for x in row]


@pytest.mark.parametrize(
    ("kind", "group", "named"),
    [("int8", None, "one scale an output"), ("fp8", None, "one scale an output"), ("nvfp4", 16, "groups of 16")],
)
def test_every_type_has_its_nearest_numbers(kind: str, group: int | None, named: str, folder: Path) -> None:
    plain, source = opened(folder, None).source, opened(folder, kind).source
    name = "model.layers.1.mlp.down_proj.weight"
    whole = torch.from_numpy(plain.tensors[name].mapped().astype("float32"))
    rows = whole.split(group, 1) if group else (whole,)
    top = float(whole.abs().max())
    expected = torch.cat([torch.tensor([nearest_of(kind, row, top) for row in part.tolist()]) for part in rows], 1)
    found = torch.from_numpy(source.tensors[name].mapped())
    # A number between two has either; in FP32 and in FP64 its quotient is not the same.
    assert ((found - expected).abs() > 1e-6 * expected.abs()).float().mean() < 2e-3
    assert 0 < (found - whole).norm() / whole.norm() < {"int8": 0.01, "fp8": 0.04, "nvfp4": 0.12}[kind]
    assert quantization(source.tensors) == f"35 layers of {kind.upper()}, rounded to nearest, {named}"
    assert source.dims.decoder.packed == PackedLayers(kind=kind, group=group)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("word", ["int4:32/rtn", "int8", "fp8", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_read_is_what_its_numbers_stand_for(word: str, dtype: torch.dtype, folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    stored = file.read_bytes()
    tensors = opened(folder, word).source.quantized
    assert len(tensors) == 35
    for name, tensor in tensors.items():
        assert np.array_equal(tensor.mapped(), tensor.quantized().dequantized()), name
    # The elements were mapped, and rounded where they are.
    assert file.read_bytes() == stored


@pytest.mark.parametrize("word", [None, "int4:32/rtn", "int8", "nvfp4"])
def test_the_disk_is_asked_for_what_is_written(
    word: str | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(graphs, "check_disk", lambda _, size: asked.append(size))
    building = Building.of(opened(folder, word).recipe, Bundle(tmp_path / "out"), folder, ffn=False)
    building.export()
    onnx = tmp_path / "out" / "onnx"
    models = {path: ir.load(path) for path in onnx.rglob("*.onnx")}
    values = [(path.parent, value.const_value) for path, model in models.items() for value in _weights(model)]
    stored = {(folder, tensor.offset): tensor.length for folder, tensor in values}
    assert asked == [sum(stored.values()) + load_file(onnx / "llm" / "embedding.safetensors")["embedding"].nbytes]


def _weights(model: ir.Model) -> Iterator[Any]:
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value


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
        ("int4:032", "--quantize int4:032: must be none, int4"),
        ("int5", "--quantize int5: must be none, int4, int8, fp8, nvfp4, or int4 with a group, as int4:64; int4 may"),
        ("fp8/rtn", "--quantize fp8/rtn: fp8 is always rounded to nearest; say it alone"),
        ("fp8:32", "--quantize fp8:32: FP8 has one scale an output; say fp8 alone"),
        ("nvfp4:32", "--quantize nvfp4:32: NVFP4 has groups of 16; say nvfp4 alone"),
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


@pytest.mark.parametrize(("form", "word", "group"), [("FP8", "fp8", None), ("NVFP4", "nvfp4", 16)])
def test_what_has_the_type_already_stays_in_it(form: str, word: Any, group: int | None, folder: Path) -> None:
    expected = quantize(folder, FORMATS[form])
    kept, expanded = opened(folder, word).source, opened(folder, None).source
    assert not kept.rounds and not expanded.block_forms() and expanded.dims.decoder.packed is None
    assert len(kept.block_forms()) == 35
    assert kept.dims.decoder.packed == PackedLayers(kind=word, group=group)
    for name, weight in expected.items():
        (own,) = [tensor for other, tensor in kept.tensors.items() if name.endswith(other.removeprefix("model."))]
        assert torch.equal(torch.from_numpy(own.mapped()), weight), name
    with pytest.raises(CapaError, match=r"quantized already \(ModelOpt"):
        _ = opened(folder, "int8").source


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
    target.write_text(re.sub(r"weight_types = .*\n", "", shipped_text))
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


@pytest.mark.parametrize(
    ("precision", "word"),
    [
        *(("fp16", WORD), ("bf16", "fp8")),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (("fp16", "nvfp4"), ("fp32", "int8"), ("bf16", WORD), ("fp32", WORD))
        ),
    ],
)
def test_layer_by_layer_and_with_parts_in_fp32(building: Building, precision: Any, word: str) -> None:
    fp32_layers = () if precision == "fp32" else ("1.mlp",)
    building.recipe = building.recipe.with_options(fp32_layers=fp32_layers, quantize=word)
    building.options = replace(building.options, precision=precision, layer_by_layer=True)
    parity = building.build()
    assert parity.passed, [check.failure for error in parity.export_error for check in error.checks]
    graph = ir.load(building.bundle.folder / "onnx/llm/decode.onnx").graph
    assert {form.kind for form in packed_forms(graph).values()} == {word.partition(":")[0]}
    assert len(packed_forms(graph)) == 34
    kinds = {value.dtype for name, value in graph.initializers.items() if name.endswith("weight_scale")}
    if word == "nvfp4":
        assert kinds == {ir.DataType.FLOAT8E4M3FN}
        return
    assert kinds == {ir.DataType.FLOAT, {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}.get(precision)} - {
        None
    }
