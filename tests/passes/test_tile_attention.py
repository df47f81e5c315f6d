"""Attention in tiles against attention in one call, and which graphs get it."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from capa_export.export.graphs import write_onnx
from capa_export.model.prompt import Prompter
from capa_export.model.source import Source
from capa_export.passes import tile_attention as tiled
from capa_export.passes.attention_bytes import attention_bytes
from capa_export.run import onnx as onnx_model
from capa_export.run.onnx import OnnxModel
from tests.conftest import noise

DTYPES = {"float": np.float32, "float16": np.float16}


def plain(dtype: str, *, causal: bool) -> onnx.ModelProto:
    text = (
        f'<ir_version: 11, opset_import: ["": 23]> graph ({dtype}[B, H, N, d] x, {dtype}[B, G, N, d] key, '
        f"{dtype}[B, G, N, d] value) => ({dtype}[B, H, N, d] y) {{ query = Neg (x) "
        f"y = Attention <is_causal = {int(causal)}, scale = 0.5> (query, key, value) }}"
    )
    return onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0].astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("length", "tile"), [(37, 1), (37, 2 * 4 * 37 * 8), (37, 2 * 4 * 37 * 37), (64, 2 * 4 * 64 * 16), (1, 1)]
)
def test_tiles_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, *, dtype: str, causal: bool, length: int, tile: int
) -> None:
    """Tiles of one row, of rows that do not divide the length, of all rows, and of rows that do divide it."""
    monkeypatch.setattr(tiled, "_TILE", tile)
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 4, length, 16), "key": (2, 2, length, 16), "value": (2, 2, length, 16)}
    feed = {name: rng.standard_normal(shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}
    model = plain(dtype, causal=causal)
    rewritten = ir.from_proto(model)
    assert tiled.TileAttentionPass()(rewritten).modified
    assert [node.domain for node in rewritten.graph] == ["", "capa.cpu"]
    assert not tiled.TileAttentionPass()(rewritten).modified
    expected = run(model, feed)
    # The same products in another blocking: an ulp or two of the largest value, 2^-24 or 2^-11 of it each.
    tolerance = {"float": 1e-6, "float16": 2e-3}[dtype]
    np.testing.assert_allclose(
        run(ir.to_proto(rewritten), feed), expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )
    assert attention_bytes(model, shapes) == 4 * 8 * length**2


def test_a_masked_attention_stays() -> None:
    text = (
        '<ir_version: 11, opset_import: ["": 23]> graph (float[1, 2, 9, 4] x, float[9, 9] mask) '
        "=> (float[1, 2, 9, 4] y) { y = Attention <is_causal = 0> (x, x, x, mask) }"
    )
    model = onnx.parser.parse_model(text)
    assert attention_bytes(model, {}) == 0
    rewritten = ir.from_proto(model)
    assert not tiled.TileAttentionPass()(rewritten).modified
    assert ir.to_proto(rewritten).SerializeToString() == ir.to_proto(ir.from_proto(model)).SerializeToString()
    assert [node.op_type for node in rewritten.graph] == ["Attention"]


@pytest.mark.parametrize(("precision", "in_place"), [("fp32", False), ("fp16", False), ("bf16", False), ("fp32", True)])
def test_a_prompt_above_the_limit_runs_in_tiles(
    source: Source,
    prompter: Prompter,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    in_place: bool,
) -> None:
    """The files stay as they are, later prompts stay in tiles, and the results are those of the shipped graphs."""
    write_onnx(source, precision, tmp_path, prune_layers=(2,), scales={}, in_place=in_place)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.onnx*")}
    large, small = (prompter("what color is the star ?", [noise(size, size)]) for size in (420, 112))
    as_shipped = [OnnxModel(tmp_path, threads=1).prefill(prompt, [9]) for prompt in (large, small)]
    # Four query heads attend over the prompt, two over the picture's 900 patches.
    monkeypatch.setattr(onnx_model, "_ATTENTION_LIMIT", 4 * 4 * len(large.input_ids) ** 2 - 1)
    monkeypatch.setattr(tiled, "_TILE", 4 * len(large.input_ids) * 50)
    model = OnnxModel(tmp_path, threads=1)
    model.load(small)
    assert not any(in_tiles for _, in_tiles in model._sessions.values())
    in_tiles = [model.prefill(prompt, [9]) for prompt in (large, small)]
    assert {file for file, (_, tiles) in model._sessions.items() if tiles} == {"visual/model.onnx", "llm/prefill.onnx"}
    # bf16 weights compute in FP32 on a CPU; half has 11 bits, and five layers add up.
    tolerance = 1e-2 if precision == "fp16" else 1e-5
    for run, expected in zip(in_tiles, as_shipped, strict=True):
        np.testing.assert_array_equal(run.kept[0], expected.kept[0])
        np.testing.assert_allclose(run.logits, expected.logits, rtol=0, atol=tolerance * np.abs(expected.logits).max())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.onnx*")} == before
