"""A published AWQ checkpoint built from end to end: in four bits as it is, and expanded where that is asked for."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file

from capa_export.base.errors import CapaError
from capa_export.base.weight_types import PackedLayers
from capa_export.bundle.store import Bundle
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.model.generation import GenerationOptions
from capa_export.model.prompt import Turn
from capa_export.plan.plan import dry_run
from capa_export.run.bundled import bundled_dims
from tests.building import Building, answer
from tests.conftest import noise
from tests.quantizing import FORMATS, GROUP, quantize


@pytest.fixture
def building(checkpoint: Path, tmp_path: Path) -> Building:
    data = load_recipe("qwen25vl").model_dump()
    data["prune"] = {"schedule": [{"layer": 2, "ratio": 0.75}]}
    data["ffn"] = {"eta": 0.5, "budget": 100}
    data["parity"] |= {"prompts": 1, "steps": 2, "accuracy_samples": 1}
    noise(224, 224).save(tmp_path / "picture.png")
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    return Building.of(
        Recipe(**data), Bundle(tmp_path / "out"), folder, images=tmp_path / "picture.png", precision="fp16"
    )


WHAT = "35 layers of AutoAWQ, 4 bits, groups of 32, with zero points"
NAME = "model.layers.4.mlp.down_proj.weight"


def held(building: Building, name: str) -> Any:
    """The numbers of an initializer of prefill."""
    weight = ir.load(building.bundle.folder / "onnx/llm/prefill.onnx").graph.initializers[name].const_value
    assert weight is not None
    return weight.numpy().astype(np.float32)


def test_a_bundle_has_its_four_bits_and_says_so(building: Building, capsys: pytest.CaptureFixture[str]) -> None:
    stored = quantize(Path(building.checkpoint), FORMATS["AutoAWQ"])
    assert building.build().passed
    kept = "34 kept in 4 bits, 1 expanded to fp16 (a score reads them whole)"
    assert f"{WHAT}: {kept}; inputs not quantized" in capsys.readouterr().err
    assert building.bundle.manifest["checkpoint"]["quantization"] == WHAT
    scales, zeros = (np.repeat(held(building, f"{NAME}{part}"), GROUP, 0) for part in ("_scale", "_zero"))
    expected = next(weight for name, weight in stored.items() if name.endswith(NAME)).numpy().T
    # Scales are FP16 in the checkpoint; what a zero stands for is rounded to it.
    np.testing.assert_allclose(held(building, f"{NAME}_packed") * scales + zeros, expected, rtol=0, atol=1e-4)
    (told,) = [record["result"]["packing"] for record in [building.bundle.stage("export")]]
    assert (told["packed"], told["group"], told["expanded"]) == (34, GROUP, {"a score reads them whole": 1})
    assert bundled_dims(building.bundle).decoder.packed == PackedLayers(kind="int4", group=GROUP, has_zeros=True)
    answers = answer(building.bundle, [[Turn("user", ["what ?"])]], options=GenerationOptions(max_new_tokens=3))
    assert answers[0]["answer"]


def test_a_bundle_has_expanded_weights_where_that_is_asked_for(
    building: Building, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = quantize(Path(building.checkpoint), FORMATS["AutoAWQ"])
    building.recipe = building.recipe.with_options(quantize="none")
    assert building.build().passed
    assert f"{WHAT}: 35 expanded to fp16 (as asked); inputs not quantized" in capsys.readouterr().err
    onnx = building.bundle.folder / "onnx"
    stored = next(weight for stored, weight in expected.items() if stored.endswith(NAME))
    np.testing.assert_array_equal(held(building, NAME), stored.numpy().astype(np.float16).astype(np.float32))
    for part in ("llm", "visual"):
        assert "quantization_config" not in json.loads((onnx / part / "config.json").read_text())


def test_damaged_scales_are_refused_before_anything_is_written(building: Building) -> None:
    folder = Path(building.checkpoint)
    quantize(folder, FORMATS["AutoAWQ"])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.scales"][1, 2] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CapaError, match=r"layers\.3\.mlp\.up_proj\.scales holds scales that are NaN"):
        building.build()
    assert not [path for path in building.bundle.folder.rglob("*") if path.suffix not in (".lock", "")]


def test_a_plan_reads_the_config_and_refuses_what_a_build_would(building: Building) -> None:
    folder = Path(building.checkpoint)
    options: dict[str, Any] = {"out": None, "precision": "fp16", "ffn": False}
    # What is free now is not the checkpoint's.
    plain: dict[str, Any] = {**dry_run(building.recipe, str(folder), **options), "memory_available": 0}
    quantize(folder, FORMATS["AutoAWQ"])
    expanded = building.recipe.with_options(quantize="none")
    assert {**dry_run(expanded, str(folder), **options), "memory_available": 0} == plain
    packed = dry_run(building.recipe, str(folder), **options)
    layers = 5 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert packed["parameters"]["packed"] == layers
    # Each group has a scale and a zero point.
    less = 2 * layers - layers // 2 - 2 * 2 * (layers // GROUP)
    assert packed["files"]["onnx weights"] == plain["files"]["onnx weights"] - less
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CapaError, match="quant_method: is 'bitsandbytes'"):
        dry_run(building.recipe, str(folder), **options)
