"""TensorRT-RTX multiplies with weights of few bits as they are stored, for every GPU that a plan is for."""

import json
import shutil
from math import prod
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
    ("form", "target", "dtype", "head", "num_packed", "weights"),
    [
        # `make test` keeps numbers of each type, and weights joined and embedded.
        pytest.param(*("int4:32/rtn", "rtx", "Int4", "int4:32", 35, "joined"), marks=pytest.mark.exhaustive),
        ("AutoAWQ", "rtx", "Int4", "none", 34, "embedded"),
        ("int8", "rtx", "Int8", "int8", 35, "joined"),
        pytest.param(*("int8", "rtx", "Int8", "int8", 35, "embedded"), marks=pytest.mark.exhaustive),
        ("fp8", "spark", "FP8", "fp8", 35, "embedded"),
        # The layers of a model whose head alone is packed may be shared.
        pytest.param(*("none", "rtx", "Int8", "int8", 1, "external"), marks=pytest.mark.exhaustive),
    ],
)
def test_every_packed_weight_is_part_of_a_product(
    form: str,
    target: str,
    dtype: str,
    head: Any,
    num_packed: int,
    weights: str,
    checkpoint_of_many_tokens: Path,
    tmp_path: Path,
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
    options: Any = {"report": building.report, "plugins": "none", "weights": weights}
    result = build_engines(building.bundle, load_target(target), **options)
    engines = result["engines"]
    assert all(one["weight_copies"] == one["cache_copies"] == 0 for one in engines.values())
    assert [one["serves"] for one in engines.values()] == [
        ["visual/model.onnx"],
        *(
            [["llm/prefill.onnx", "llm/decode.onnx"]]
            if weights == "joined"
            else [["llm/prefill.onnx"], ["llm/decode.onnx"]]
        ),
    ]
    for engine in ("decoder",) if weights == "joined" else ("prefill", "decode"):
        path = building.bundle.folder / f"engines/{target}/llm/{engine}.layers.json"
        layers = json.loads(path.read_text(encoding="utf-8"))
        dequantizing = [one for one in layers if any("DequantizeLinear" in node for node in one["onnx"])]
        # A profile of one token may have small products elementwise, with what is before them.
        assert {one["type"] for one in dequantizing} - {"kgen"} == {"runtime_fusion"}
        for one in dequantizing:
            sizes = [prod(part["shape"]) for part in one["constants"] if part["dtype"] == dtype]
            # No weight is written.
            assert sizes and all(abs(prod(part["shape"])) < min(sizes) for part in one["outputs"])
        # Projections that read the same norm become one product.
        products = {node for one in dequantizing for node in one["onnx"] if node.endswith("/Gemm")}
        assert len(products) == num_packed
        assert ("lm_head/Gemm" in products) is (head != "none")
