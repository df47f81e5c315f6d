"""TensorRT-RTX multiplies with weights of few bits as they are stored, for every GPU that a plan is for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from capa_export.bundle.store import Bundle
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.target import load_target
from capa_export.trt.stage import build_engines
from tests.building import Building
from tests.models.qwen25vl import random_model, save_model
from tests.quantizing import FORMATS, quantize

pytestmark = pytest.mark.trt


@pytest.fixture(scope="module")
def checkpoint_of_many_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose head is large enough that TensorRT has a fused product for it."""
    return save_model(tmp_path_factory.mktemp("many"), random_model(vocab_size=1024))


@pytest.mark.parametrize(
    ("form", "target", "dtype", "head", "num_packed"),
    [
        ("int4:32/rtn", "rtx", "Int4", "int4:32", 35),
        ("AutoAWQ", "rtx", "Int4", "none", 34),
        ("int8", "rtx", "Int8", "int8", 35),
        ("fp8", "spark", "FP8", "fp8", 35),
        ("none", "rtx", "Int8", "int8", 1),
    ],
)
def test_every_packed_weight_is_part_of_a_product(
    form: str, target: str, dtype: str, head: Any, num_packed: int, checkpoint_of_many_tokens: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint_of_many_tokens, tmp_path / "checkpoint"))
    data = load_recipe("qwen25vl").model_dump() | {"prune": {"schedule": [{"layer": 2, "ratio": 0.75}]}}
    data["quantize_head"] = head
    if form in FORMATS:
        quantize(folder, FORMATS[form])
    else:
        data["quantize"] = form
    building = Building.of(Recipe.model_validate(data), Bundle(tmp_path / "out"), folder, ffn=False)
    building.export()
    # The layers of a model whose head alone is packed may be shared.
    weights = "auto" if num_packed > 1 else "external"
    options: Any = {"report": building.report, "plugins": "none", "weights": weights}
    result = build_engines(building.bundle, load_target(target), **options)
    assert result["weights"] == ("embedded" if num_packed > 1 else "external")
    for engine in ("prefill", "decode"):
        path = building.bundle.folder / f"engines/{target}/llm/{engine}.layers.json"
        layers = json.loads(path.read_text(encoding="utf-8"))
        dequantizing = [one for one in layers if any("DequantizeLinear" in node for node in one["onnx"])]
        assert {one["type"] for one in dequantizing} == {"runtime_fusion"}
        assert all(any(part["dtype"] == dtype for part in one["constants"]) for one in dequantizing)
        # Projections that read the same norm become one product.
        products = {node for one in dequantizing for node in one["onnx"] if node.endswith("/Gemm")}
        assert len(products) == num_packed
        assert ("lm_head/Gemm" in products) is (head != "none")
