"""Binding weights: values, sharing, ranges, and what happens when the disk or the checkpoint is not up to it."""

import errno
import shutil
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnxscript import nn
from safetensors import safe_open
from safetensors.torch import save_file

from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle.store import file_digest
from capa_export.export import bind as bind_module
from capa_export.export.bind import bind, check_disk, write_embedding
from capa_export.model.checkpoint import StoredTensor, open_checkpoint
from capa_export.model.source import tied
from capa_export.model.tensors import unused_tensors

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
TORCH = {FLOAT: torch.float32, FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}


def stored(folder: Path, weights: Mapping[str, torch.Tensor]) -> Mapping[str, StoredTensor]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(dict(weights), folder / "model.safetensors")
    return open_checkpoint(str(folder)).tensors


def graph(weights: Mapping[str, Sequence[int]], dtype: ir.DataType | None) -> ir.Model:
    """A model that casts each of its weights to FP32 and returns it."""
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []
    for i, (name, shape) in enumerate(weights.items()):
        kind = None if dtype is None else ir.TensorType(dtype)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=kind)
        node = ir.node("Cast", [value], {"to": FLOAT.value})
        node.outputs[0].name = f"out{i}"
        node.outputs[0].dtype, node.outputs[0].shape = FLOAT, ir.Shape(shape)
        initializers.append(value)
        nodes.append(node)
    outputs = [node.outputs[0] for node in nodes]
    made = ir.Graph([], outputs, nodes=nodes, opset_imports={"": 21}, name="g")
    for value in initializers:
        assert value.name is not None
        made.initializers[value.name] = value
    return ir.Model(made, ir_version=10)


def run(model: ir.Model, path: Path) -> list[Any]:
    ir.save(model, path)
    return list(ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {}))


def external(model: ir.Model, name: str) -> ir.ExternalTensor:
    tensor = model.graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return tensor


def refusal(folder: Path, weights: Mapping[str, torch.Tensor], model: ir.Model, **options: Any) -> CapaError:
    tensors, out = stored(folder / "ckpt", weights), folder / "out"
    out.mkdir()
    with pytest.raises(CapaError) as info:
        bind([model], tensors, dtype=FLOAT16, data_path=out / "w.data", **options)
    assert "\n" not in str(info.value)
    assert list(out.iterdir()) == []
    assert all(value.const_value is None for value in model.graph.initializers.values())
    return info.value


@pytest.mark.parametrize("source", TORCH, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("target", TORCH, ids=lambda dtype: dtype.name)
def test_values_reach_onnxruntime(tmp_path: Path, source: ir.DataType, target: ir.DataType) -> None:
    torch.manual_seed(0)
    weights = {
        "w": torch.randn(7, 5).to(TORCH[source]),
        "conv": torch.randn(4, 3, 2, 2, 2).to(TORCH[source]),
        "edge": torch.tensor([0.0, -0.0, 6e4, -6e4, 3e-6, 1.0005]).to(TORCH[source]),
    }
    model = graph({"edge": [6], "conv": [4, 24], "w": [7, 5]}, target)
    bind([model], stored(tmp_path / "ckpt", weights), dtype=FLOAT, data_path=tmp_path / "w.data")
    for got, name in zip(run(model, tmp_path / "m.onnx"), ("edge", "conv", "w"), strict=True):
        expected = weights[name].to(TORCH[target]).float().numpy()
        np.testing.assert_array_equal(got, expected.reshape(got.shape))


def test_chunks_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoredTensor.chunks, "__defaults__", (7,))
    weights = {"w": torch.arange(100, dtype=torch.bfloat16).reshape(10, 10)}
    model = graph({"w": [10, 10]}, FLOAT16)
    bind([model], stored(tmp_path, weights), dtype=FLOAT16, data_path=tmp_path / "w.data")
    np.testing.assert_array_equal(external(model, "w").numpy(), weights["w"].float().numpy())


def test_models_share_one_file_and_its_offsets(tmp_path: Path) -> None:
    weights = {"a": torch.randn(600_000), "b": torch.randn(3), "c": torch.randn(700_000)}
    prefill, decode = graph({"b": [3], "a": [600_000]}, FLOAT), graph({"a": [600, 1000], "c": [700_000]}, FLOAT)
    half = graph({"a": [600_000]}, FLOAT16)
    inline = ir.Value(name="inline", const_value=ir.tensor(np.ones(2, np.float32), name="inline"))
    prefill.graph.initializers["inline"] = inline
    calls: list[tuple[str, int, int]] = []
    bind(
        [prefill, decode, half],
        stored(tmp_path / "ckpt", weights),
        dtype=FLOAT,
        data_path=tmp_path / "out" / "w.data",
        progress=lambda *call: calls.append(call),
    )
    first, second = external(prefill, "a"), external(decode, "a")
    assert (first.offset, first.length) == (second.offset, second.length)
    assert list(second.shape) == [600, 1000]
    assert external(half, "a").offset not in {first.offset, external(decode, "c").offset}
    for tensor in (first, external(decode, "c"), external(half, "a")):
        assert tensor.location == "w.data"
        assert tensor.offset is not None and tensor.offset % 4096 == 0
    assert not isinstance(inline.const_value, ir.ExternalTensor)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["w.data"]
    total = 4 * 600_000 + 4 * 3 + 4 * 700_000 + 2 * 600_000
    assert calls[-1][1:] == (total, total)
    assert [name for name, _, _ in calls] == ["b", "a", "c", "a", "a"]
    np.testing.assert_array_equal(second.numpy().ravel(), weights["a"].numpy())


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = stored(tmp_path / "ckpt", {"a": torch.randn(300_000).bfloat16(), "b": torch.randn(5).bfloat16()})
    for name in ("one", "two"):
        model = graph({"b": [5], "a": [300_000]}, FLOAT)
        bind([model], tensors, dtype=FLOAT, data_path=tmp_path / name / "w.data")
        ir.save(model, tmp_path / name / "m.onnx")
        write_embedding({"model.embed_tokens.weight": tensors["a"]}, FLOAT16, tmp_path / name / "e.safetensors")
    for file in ("w.data", "m.onnx", "e.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_initializers_without_a_dtype_take_the_given_one(tmp_path: Path) -> None:
    model = graph({"w": [4]}, None)
    bind([model], stored(tmp_path, {"w": torch.ones(4)}), dtype=BFLOAT16, data_path=tmp_path / "w.data")
    assert external(model, "w").dtype == model.graph.initializers["w"].dtype == BFLOAT16


def test_parameters_of_modules_are_bound(tmp_path: Path) -> None:
    """`nn.Parameter` has a read-only dtype, unlike the `ir.Value` that it is."""
    model = graph({"w": [2]}, FLOAT16)
    parameter = nn.Parameter([3], FLOAT16, name="p")
    model.graph.initializers["p"] = parameter
    tensors = stored(tmp_path, {"w": torch.ones(2), "p": torch.ones(3)})
    bind([model], tensors, dtype=FLOAT, data_path=tmp_path / "w.data")
    assert parameter.dtype == external(model, "p").dtype == FLOAT16


def test_extra_arrays_are_converted_too(tmp_path: Path) -> None:
    model = graph({"w": [4], "model.layers.3.visual_scale": [4]}, FLOAT16)
    scale = np.linspace(0.5, 2, 4, dtype=np.float32)
    bind(
        [model],
        stored(tmp_path, {"w": torch.ones(4)}),
        dtype=FLOAT16,
        data_path=tmp_path / "w.data",
        extra={"model.layers.3.visual_scale": scale},
    )
    np.testing.assert_array_equal(run(model, tmp_path / "m.onnx")[1], scale.astype(np.float16))


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    tensors = stored(tmp_path, {"model.embed_tokens.weight": torch.randn(6, 4), "spare": torch.ones(1)})
    model = graph({"model.embed_tokens.weight": [6, 4], "lm_head.weight": [6, 4]}, FLOAT16)
    bind([model], tied(tensors), dtype=FLOAT16, data_path=tmp_path / "w.data")
    embedding, head = run(model, tmp_path / "m.onnx")
    np.testing.assert_array_equal(embedding, head)
    assert (tmp_path / "w.data").stat().st_size == 6 * 4 * 2
    assert unused_tensors([graph({"lm_head.weight": [6, 4]}, FLOAT16)], tied(tensors)) == ["spare"]
    with_head = {**tensors, "lm_head.weight": tensors["spare"]}
    assert tied(with_head)["lm_head.weight"].name == "spare"
    assert "lm_head.weight" not in tied({})


def test_unused_tensors_are_listed_before_and_after_binding(tmp_path: Path) -> None:
    tensors = stored(tmp_path, {"b": torch.ones(1), "w": torch.ones(2), "a": torch.ones(1)})
    model = graph({"w": [2]}, FLOAT)
    assert unused_tensors([model], tensors) == ["a", "b"]
    bind([model], tensors, dtype=FLOAT, data_path=tmp_path / "w.data")
    assert unused_tensors([model], tensors) == ["a", "b"]


def test_missing_tensors(tmp_path: Path) -> None:
    error = refusal(tmp_path, {"w": torch.ones(2)}, graph({"w": [2], "x": [2], "y": [2]}, FLOAT))
    assert "tensor x (and 1 more) is missing from the checkpoint" in str(error)
    assert error.code == ExitCode.PREFLIGHT


@pytest.mark.parametrize("wanted", [[5], [3, 2], [2, 2], [6, 2]])
def test_wrong_shapes(tmp_path: Path, wanted: list[int]) -> None:
    error = refusal(tmp_path, {"w": torch.ones(2, 3)}, graph({"w": wanted}, FLOAT))
    assert f"tensor w has shape [2, 3], config.json implies {wanted}" in str(error)
    assert error.code == ExitCode.PREFLIGHT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_overflow_names_the_tensor_and_the_way_out(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {"w": torch.tensor([1.0, -131072.0, 70144.0]).to(dtype)}
    error = refusal(tmp_path, weights, graph({"w": [3]}, FLOAT16))
    assert "tensor w reaches 131072, more than 65504" in str(error)
    assert "--precision bf16" in str(error)
    assert error.code == ExitCode.EXPORT


def test_overflow_of_bf16(tmp_path: Path) -> None:
    error = refusal(tmp_path, {"w": torch.tensor([3.4e38])}, graph({"w": [1]}, BFLOAT16))
    assert "the largest BFLOAT16; build with `--precision fp32`" in str(error)


def test_the_largest_fp16_is_no_overflow(tmp_path: Path) -> None:
    model = graph({"w": [2]}, FLOAT16)
    bind([model], stored(tmp_path, {"w": torch.tensor([65504.0, -65519.0])}), dtype=FLOAT16, data_path=tmp_path / "w")
    np.testing.assert_array_equal(external(model, "w").numpy(), np.array([65504, -65504], np.float16))


@pytest.mark.parametrize("dtype", TORCH.values(), ids=str)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite(tmp_path: Path, dtype: torch.dtype, value: str) -> None:
    weights = {"w": torch.tensor([1.0, float(value)]).to(dtype)}
    error = refusal(tmp_path, weights, graph({"w": [2]}, FLOAT))
    assert "model.safetensors: tensor w holds NaN or infinity" in str(error)
    assert error.code == ExitCode.PREFLIGHT


def test_a_disk_too_small_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    error = refusal(tmp_path, {"w": torch.ones(999)}, graph({"w": [999]}, FLOAT))
    assert "bytes are needed, 1000 are free" in str(error)
    check_disk(tmp_path / "not" / "yet", 1000)
    with pytest.raises(CapaError, match="1001 bytes are needed"):
        check_disk(tmp_path / "not" / "yet", 1001)


@pytest.mark.parametrize(("number", "text"), [(errno.ENOSPC, "filled up"), (errno.EIO, "cannot be written")])
def test_a_disk_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, text: str
) -> None:
    def fail(_: object, file: Any) -> None:
        file.write(b"some")
        raise OSError(number, "broken")

    monkeypatch.setattr(bind_module._ConvertedTensor, "tofile", fail)  # pyright: ignore[reportPrivateUsage]
    error = refusal(tmp_path, {"w": torch.ones(9)}, graph({"w": [9]}, FLOAT))
    assert text in str(error)
    assert error.code == ExitCode.EXPORT
    tensors = stored(tmp_path, {"model.embed_tokens.weight": torch.ones(2, 2)})
    with pytest.raises(CapaError, match=text):
        write_embedding(tensors, FLOAT, tmp_path / "out" / "e.safetensors")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_bind_keeps_the_file_of_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "w.data"
    path.write_bytes(b"before")
    tensors = stored(tmp_path, {"w": torch.tensor([1e6])})
    with pytest.raises(CapaError):
        bind([graph({"w": [1]}, FLOAT16)], tensors, dtype=FLOAT16, data_path=path)
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("target", TORCH, ids=lambda dtype: dtype.name)
def test_the_embedding_file(tmp_path: Path, target: ir.DataType) -> None:
    weight = torch.randn(9, 4).bfloat16()
    path = tmp_path / "out" / "embedding.safetensors"
    write_embedding(stored(tmp_path, {"model.embed_tokens.weight": weight}), target, path)
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["embedding"]
        assert torch.equal(file.get_tensor("embedding"), weight.to(TORCH[target]))
    with pytest.raises(CapaError, match=r"model\.embed_tokens\.weight is missing"):
        write_embedding({}, target, path)


def test_memory_stays_at_one_chunk(tmp_path: Path) -> None:
    tensors = stored(tmp_path, {"w": torch.ones(16 << 20, dtype=torch.bfloat16)})
    model = graph({"w": [16 << 20]}, FLOAT)
    tracemalloc.start()
    try:
        bind([model], tensors, dtype=FLOAT, data_path=tmp_path / "w.data")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 64 MiB are written; a chunk and its conversion take 2 + 2 + 4 MiB.
    assert peak < 12 << 20


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    weights = {"a": torch.randn(600_000), "b": torch.randn(3), "c": torch.randn(700_000)}
    tensors = stored(tmp_path / "ckpt", weights)
    model = graph({"b": [3], "a": [600_000], "c": [700_000]}, FLOAT)
    written = bind([model], tensors, dtype=FLOAT, data_path=tmp_path / "w.data")
    assert external(model, "a").offset == 4096, "a gap before it"
    assert written.sha256 == file_digest(tmp_path / "w.data")
    path = tmp_path / "e.safetensors"
    embedding = write_embedding({"model.embed_tokens.weight": tensors["a"]}, FLOAT16, path)
    assert embedding.sha256 == file_digest(path)
    assert written.kept == embedding.kept == ()
