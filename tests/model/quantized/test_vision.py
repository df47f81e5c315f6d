"""The products of a vision tower's blocks rounded by themselves, in every family."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.weight_types import PackedLayers
from capa_export.bundle.store import Bundle
from capa_export.cli import main
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.model.model import Model
from capa_export.model.quantized.rounded import nearest
from capa_export.model.quantized.tensor import quantization
from capa_export.passes.pack_weights import packed_forms
from capa_export.plan.flops import parameters
from capa_export.plan.plan import dry_run
from capa_export.run.bundled import bundled_dims
from tests.building import Building
from tests.conftest import noise
from tests.models import FAMILIES
from tests.quantizing import FORMATS, quantize

BLOCKS = re.compile(r"(?:visual\.blocks|vision_tower\.(?:vision_model\.)?encoder\.layers?)\.(\d+)\.")


def opened(folder: Path, word: str | None, recipe: str = "qwen25vl", **options: Any) -> Model:
    return Model(recipe=load_recipe(recipe).with_options(quantize_vision=word, **options), checkpoint=str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_eager_model_has_the_nearest_numbers_in_its_blocks_and_all_else_as_it_was(
    family: str, tmp_path: Path
) -> None:
    folder = FAMILIES[family].save_model(tmp_path, FAMILIES[family].random_model())
    plain, model = opened(folder, None, family), opened(folder, "int8", family)
    before, after = dict(plain.eager.named_parameters()), dict(model.eager.named_parameters())
    assert before.keys() == after.keys()
    dims, form, rounded = model.source.dims, PackedLayers(kind="int8", group=None), list[torch.Size]()
    for name, weight in before.items():
        found = BLOCKS.search(name)
        if found and int(found[1]) < dims.vision.num_blocks and weight.ndim == 2:
            numbers, scales, _ = nearest(weight.detach().numpy().copy(), form)
            assert torch.equal(after[name], torch.from_numpy(numbers.astype("float32") * scales)), name
            rounded.append(weight.shape)
        else:
            assert torch.equal(after[name], weight), name
    assert sorted(rounded) == sorted([*dims.vision.block_products] * dims.vision.num_blocks)
    words = f"{len(rounded)} products of the vision tower in INT8, rounded to nearest, one scale an output"
    assert quantization(model.source.tensors) == words
    assert model.source.dims.packings == {"--quantize-vision": form} and not plain.source.dims.packings
    assert model.digest != plain.digest
    total, of_all = parameters(dims), parameters(plain.source.dims)
    numbers_of = sum(outputs * inputs for outputs, inputs in rounded)
    scales_of = sum(outputs for outputs, _ in rounded)
    assert of_all.bytes_of_tower(2) - total.bytes_of_tower(2) == numbers_of - 2 * scales_of


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--quantize-vision", "int4"], "--quantize-vision int4: must be none, int8 or fp8"),
        (["--quantize-vision", "fp8"], "target rtx does not take FP8 weights: compute capability 8.0"),
        (["--quantize-vision", "int8", "--target", "orin"], "build with --quantize-vision none, or"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    checkpoint: Path, tmp_path: Path, options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for command in (["build", str(checkpoint), "--out", str(out)], ["plan", str(checkpoint)]):
        assert main([*command, "--model", "qwen25vl", *options]) == ExitCode.USAGE
        err = capsys.readouterr().err
        assert problem in err and len(err.strip().splitlines()) == 1
    assert not [path for path in out.rglob("*") if path.suffix not in (".lock", "")]


def test_a_tower_that_is_quantized_already_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    quantize(folder, FORMATS["AutoAWQ"])
    assert opened(folder, "int8").source.dims.packings.keys() == {"--quantize", "--quantize-vision"}
    with pytest.raises(CapaError, match="quantized already"):
        _ = opened(folder, "int8", quantize="int8").source


def building_of(folder: Path, tmp_path: Path, family: str, **options: Any) -> Building:
    data: dict[str, Any] = load_recipe(family).model_dump()
    data["prune"] = {"schedule": [{"layer": 2, "ratio": 0.75}]}
    data["parity"] |= {"prompts": 1, "steps": 2, "accuracy_samples": 1}
    noise(112, 84).save(tmp_path / "picture.png")
    recipe, images = Recipe.model_validate(data | options), tmp_path / "picture.png"
    return Building.of(recipe, Bundle(tmp_path / "out"), folder, images=images, precision="fp16", ffn=False)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen25vl", {"quantize": "int4:32/rtn", "quantize_head": "int8", "quantize_vision": "int8"}),
        ("qwen3vl", {"quantize_vision": "fp8"}),
        pytest.param("internvl3", {"quantize_vision": "int8"}, marks=pytest.mark.exhaustive),
        pytest.param(
            *("llava15", {"quantize_vision": "int8", "fp32_layers": ("visual.1.mlp",)}), marks=pytest.mark.exhaustive
        ),
    ],
)
def test_a_build_passes_its_gates(
    family: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = FAMILIES[family].save_model(tmp_path / "checkpoint", FAMILIES[family].random_model())
    building = building_of(folder, tmp_path, family, **options)
    building.options = replace(building.options, layer_by_layer=family == "internvl3")
    parity = building.build()
    assert parity.passed, [check.failure for error in parity.export_error for check in error.checks]
    assert parity.quantization_error is not None and parity.quantization_error.kl > 0
    dims = building.model.source.dims
    forms = packed_forms(ir.load(building.bundle.folder / "onnx/visual/model.onnx").graph)
    count = dims.vision.num_blocks * len(dims.vision.block_products)
    assert len(forms) == count and {form.kind for form in forms.values()} == {options["quantize_vision"]}
    assert f"{count} of the vision tower kept in 8 bits" in capsys.readouterr().err
    assert bundled_dims(building.bundle).packings == dims.packings


def test_a_plan_counts_it(checkpoint: Path) -> None:
    options: dict[str, Any] = {"out": None, "precision": "fp16", "ffn": False}
    plain, found = (
        dry_run(load_recipe("qwen25vl").with_options(quantize_vision=word), str(checkpoint), **options)
        for word in (None, "int8")
    )
    products = json.loads(json.dumps(opened(checkpoint, "int8").source.dims.vision.block_products))
    less = 3 * sum(outputs * inputs - 2 * outputs for outputs, inputs in products)
    assert plain["files"]["onnx weights"] - found["files"]["onnx weights"] == less
