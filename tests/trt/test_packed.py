"""TensorRT-RTX multiplies with INT4 weights as they are stored, for every GPU that a plan is for."""

import json
import shutil
from pathlib import Path

import pytest

from capa_export.bundle.store import Bundle
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.target import load_target
from capa_export.trt.stage import build_engines
from tests.building import Building
from tests.quantizing import FORMATS, quantize

pytestmark = pytest.mark.trt


@pytest.mark.parametrize("form", ["int4:32/rtn", "AutoAWQ"])
def test_every_packed_weight_is_part_of_a_product(form: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    data = load_recipe("qwen25vl").model_dump() | {"prune": {"schedule": [{"layer": 2, "ratio": 0.75}]}}
    if form in FORMATS:
        quantize(folder, FORMATS[form])
    else:
        data["quantize"] = form
    building = Building.of(Recipe.model_validate(data), Bundle(tmp_path / "out"), folder, ffn=False)
    building.export()
    rtx = load_target("rtx")
    result = build_engines(building.bundle, rtx, report=building.report, plugins="none")
    assert result["weights"] == "embedded"
    for engine in ("prefill", "decode"):
        path = building.bundle.folder / f"engines/rtx/llm/{engine}.layers.json"
        layers = json.loads(path.read_text(encoding="utf-8"))
        dequantizing = [one for one in layers if any("DequantizeLinear" in node for node in one["onnx"])]
        assert {one["type"] for one in dequantizing} == {"runtime_fusion"}
        assert all(any(part["dtype"] == "Int4" for part in one["constants"]) for one in dequantizing)
        # Projections that read the same norm become one product.
        products = {node for one in dequantizing for node in one["onnx"] if node.endswith("/Gemm")}
        assert len(products) == 34
