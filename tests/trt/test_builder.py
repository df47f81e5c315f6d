"""Kits built where they are written: a small graph with CAPA's kind of nodes, and every way a build can go wrong."""

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread, main_thread
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.config.target import DimRange, Target
from capa_export.trt.engines import build_graphs
from capa_export.trt.graphs import write_graphs
from capa_export.trt.kit_file import read_kit
from tests.targets import one_gpu

GRAPH = """
<ir_version: 10, opset_import: ["": 24, "capa": 1]>
tiny (DTYPE[1, sequence, 256] x, int64[1] num_keep, DTYPE[768, 256] qkv, DTYPE[256, 256] out, DTYPE[256] norm)
    => (DTYPE[kept, 256] y) {
    flat = Constant <value = int64[2] {-1, 256}> ()
    heads = Constant <value = int64[4] {1, -1, 4, 64}> ()
    x_TD = Reshape (x, flat)
    normed = RMSNormalization <axis = -1> (x_TD, norm)
    all = Gemm <transB = 1> (normed, qkv)
    q_TD, k_TD, v_TD = Split <axis = 1, num_outputs = 3> (all)
    q_THd = Reshape (q_TD, heads)
    k_THd = Reshape (k_TD, heads)
    v_THd = Reshape (v_TD, heads)
    q = Transpose <perm = [0, 2, 1, 3]> (q_THd)
    k = Transpose <perm = [0, 2, 1, 3]> (k_THd)
    v = Transpose <perm = [0, 2, 1, 3]> (v_THd)
    mixed = Attention <is_causal = 1> (q, k, v)
    mixed_T = Transpose <perm = [0, 2, 1, 3]> (mixed)
    mixed_TD = Reshape (mixed_T, flat)
    sum = Gemm <transB = 1> (mixed_TD, out)
    y = capa.Front (sum, num_keep)
}
<domain: "capa", opset_import: ["": 24]>
Front (x, count) => (y) {
    zero = Constant <value = int64[1] {0}> ()
    y = Slice (x, zero, count, zero)
}
"""


def tiny_graph(folder: Path, dtype: str = "float16", text: str = GRAPH) -> Path:
    """Write the graph with random weights beside it."""
    model = ir.from_onnx_text(text.replace("DTYPE", dtype))
    random = np.random.default_rng(0)
    weights = model.graph.inputs[2:]
    del model.graph.inputs[2:]
    for value in weights:
        array = random.standard_normal(value.shape.numpy()).astype(value.dtype.numpy())
        value.const_value = ir.Tensor(array, name=value.name)
        model.graph.register_initializer(value)
    path = folder / "tiny.onnx"
    ir.save(model, path, external_data="tiny.onnx.data", size_threshold_bytes=1024)
    return path


NUM_KEEP = {"num_keep": DimRange(min=0, opt=64, max=512)}
Build = Callable[..., dict[str, Any]]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def call(onnx: Path, target: Target | None = None, **options: Any) -> dict[str, Any]:
        settings = {"target": target or one_gpu(values=NUM_KEEP), "weights": "embedded", **options}
        return build_graphs(onnx.parent, {onnx.name: "tiny"}, tmp_path / "out", **settings)["tiny"]

    return call


UNBUILT = {"kit.json", "tiny.onnx", "tiny.log"}
"""All that lies in a kit whose engine failed."""


def _left(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "out").iterdir()}


def _layers(tmp_path: Path) -> list[dict[str, Any]]:
    return json.loads((tmp_path / "out" / "tiny.layers.json").read_text(encoding="utf-8"))


def test_an_engine_and_its_entry(tmp_path: Path, build: Build) -> None:
    said: list[str] = []
    built = build(tiny_graph(tmp_path), say=said.append)
    assert said == ["building tiny.engine from tiny.onnx"]
    assert (tmp_path / "out" / "tiny.engine").stat().st_size == built["bytes"] > 400_000
    assert built["onnx"] == "tiny.onnx"
    assert built["seconds"] > 0
    assert built["peak_memory_bytes"] > 50_000_000
    assert built["activation_bytes"] > 0
    assert built["runtime"].startswith("1.")
    assert built["layers"] == sum(built["layers_by_type"].values()) > 3
    assert (built["custom_layers"], built["weight_copies"], built["warnings"]) == (0, 0, [])
    assert _left(tmp_path) == {"tiny.engine", "tiny.layers.json", "tiny.log"}
    layers = _layers(tmp_path)
    assert len(layers) == built["layers"]
    assert any("mha" in layer["name"] for layer in layers), "no fused attention kernel"
    tensors = [tensor for layer in layers for part in ("inputs", "outputs") for tensor in layer[part]]
    assert {"name": "x", "shape": [1, -1, 256], "dtype": "Half"} in tensors
    assert any(node.startswith("node_of_") for layer in layers for node in layer["onnx"])


def test_external_weights_stay_out_of_the_plan(tmp_path: Path, build: Build) -> None:
    graph = tiny_graph(tmp_path)
    embedded = build(graph)
    (tmp_path / "out").rename(tmp_path / "embedded")
    external = build(graph, weights="external")
    weight_bytes = (768 + 256) * 256 * 2
    assert embedded["bytes"] - external["bytes"] > 0.8 * weight_bytes
    assert external["weight_copies"] == 0
    assert _left(tmp_path) == {"tiny.engine", "tiny.layers.json", "tiny.log", "tiny.weights.json"}
    entries = json.loads((tmp_path / "out" / "tiny.weights.json").read_text(encoding="utf-8"))
    assert entries.keys() == {"qkv", "out"}
    assert entries["qkv"].items() >= {"length": 768 * 256 * 2, "dtype": "FLOAT16", "shape": [768, 256]}.items()
    assert (tmp_path / "out" / entries["qkv"]["file"]).resolve() == (tmp_path / "tiny.onnx.data").resolve()


def test_an_engine_that_will_be_moved(tmp_path: Path, build: Build) -> None:
    home, log = tmp_path / "bundle" / "engines" / "rtx", tmp_path / "kept.log"
    build(tiny_graph(tmp_path), weights="external", home=home, logs={"tiny": log})
    entries = json.loads((tmp_path / "out" / "tiny.weights.json").read_text(encoding="utf-8"))
    assert entries["qkv"]["file"] == "../../../tiny.onnx.data"
    assert not log.exists()
    assert (tmp_path / "out" / "tiny.log").stat().st_size > 0


def test_a_kit_holds_no_copy_of_the_weights(tmp_path: Path) -> None:
    text = GRAPH.replace("int64[1] num_keep", "int64[2] num_keep")
    graph, kit = tiny_graph(tmp_path, text=text), tmp_path / "kit"
    target = one_gpu(values=NUM_KEEP)
    write_graphs(tmp_path, {graph.name: "tiny"}, kit, target, weights="external", plugins="none")
    assert {path.name for path in kit.iterdir()} == {"kit.json", "tiny.onnx", "tiny.weights.json"}
    engine = read_kit(kit)["engines"]["tiny"]
    assert engine["source"] == str(graph)
    sequence = target.dim("sequence")
    limits = engine["profiles"][graph.name]
    assert limits["shapes"]["x"] == [[1, size, 256] for size in (sequence.min, sequence.opt, sequence.max)]
    assert limits["shape_inputs"] == {"num_keep": [[0, 0], [64, 64], [512, 512]]}


def test_fp32_attention_builds_without_a_fused_kernel(tmp_path: Path, build: Build) -> None:
    target = one_gpu(values=NUM_KEEP, dims={"sequence": DimRange(min=1, opt=16, max=32)})
    build(tiny_graph(tmp_path, "float"), target)
    assert not any("mha" in layer["name"] for layer in _layers(tmp_path))


def test_a_gpu_the_builder_refuses_starts_nothing(tmp_path: Path, build: Build) -> None:
    with pytest.raises(CapaError, match=r"compute capability 9\.0; it can for 8\.0"):
        build(tiny_graph(tmp_path), one_gpu(compute_capabilities=("8.6", "9.0")))
    assert not (tmp_path / "out").exists()


def test_a_missing_graph(tmp_path: Path, build: Build) -> None:
    with pytest.raises(CapaError, match=r"absent\.onnx: cannot be read as ONNX") as caught:
        build(tmp_path / "absent.onnx")
    assert caught.value.code is ExitCode.ENGINE


def test_missing_weights(tmp_path: Path, build: Build) -> None:
    graph = tiny_graph(tmp_path)
    (tmp_path / "tiny.onnx.data").unlink()
    with pytest.raises(CapaError, match=r"tiny\.onnx: its weights are missing: .*tiny\.onnx\.data"):
        build(graph)


def test_weights_that_end_too_soon(tmp_path: Path, build: Build) -> None:
    graph = tiny_graph(tmp_path)
    (tmp_path / "tiny.onnx.data").write_bytes(b"short")
    with pytest.raises(CapaError, match=r"tiny\.onnx: .*log: .*tiny\.log"):
        build(graph)
    assert _left(tmp_path) == UNBUILT


def test_an_operator_the_parser_refuses_is_named(tmp_path: Path, build: Build) -> None:
    text = GRAPH.replace("normed = RMSNorm", "unread = NonZero (x_TD)\n    normed = RMSNorm")
    with pytest.raises(CapaError, match=r"NonZero") as caught:
        build(tiny_graph(tmp_path, text=text))
    assert "\n" not in str(caught.value)
    assert "NonZero" in (tmp_path / "out" / "tiny.log").read_text(encoding="utf-8")


def test_a_builder_error_is_quoted(tmp_path: Path, build: Build) -> None:
    # TensorRT sorts 3840 values at most, and says so when it builds.
    text = GRAPH.replace(
        "y = capa.Front (sum, num_keep)",
        """count = Constant <value = int64[1] {4000}> ()
    best, where = TopK <axis = 0> (sum, count)
    y = capa.Front (best, num_keep)""",
    )
    with pytest.raises(CapaError, match="Error Code") as caught:
        build(
            tiny_graph(tmp_path, text=text),
            one_gpu(values=NUM_KEEP, dims={"sequence": DimRange(min=4000, opt=4096, max=4096)}),
        )
    assert "\n" not in str(caught.value)
    assert _left(tmp_path) == UNBUILT


def test_sizes_need_a_range(tmp_path: Path, build: Build) -> None:
    with pytest.raises(CapaError, match="the values of input num_keep are sizes"):
        build(tiny_graph(tmp_path), one_gpu(values={}))


def test_a_version_outside_the_target_s_range(tmp_path: Path, build: Build) -> None:
    with pytest.raises(CapaError, match=r"tensorrt_rtx is .*; the target takes >=1\.99,<2"):
        build(tiny_graph(tmp_path), one_gpu(values=NUM_KEEP, version_min="1.99"))


def _shadow_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Put a module of our own where the worker imports tensorrt_rtx."""
    folder = tmp_path / "shadow"
    folder.mkdir()
    (folder / "tensorrt_rtx.py").write_text(code, encoding="utf-8")
    search_path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", search_path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "raise ModuleNotFoundError(\"No module named 'tensorrt_rtx'\")",
            r'pip install "\.\[rtx\]" in a checkout',
        ),
        (
            "import os, sys; print('terminate called: no kernel', file=sys.stderr, flush=True); os.abort()",
            "died of SIGABRT: terminate called: no kernel",
        ),
        ("import os; os.kill(os.getpid(), 9)", "died of SIGKILL, most likely for want of memory"),
        ("raise RuntimeError('surprise')", "ended with status 1: RuntimeError: surprise"),
    ],
    ids=["missing", "abort", "killed", "exception"],
)
def test_a_worker_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Build, code: str, message: str
) -> None:
    graph = tiny_graph(tmp_path)
    _shadow_tensorrt(tmp_path, monkeypatch, code)
    with pytest.raises(CapaError, match=message) as caught:
        build(graph)
    assert caught.value.code is ExitCode.ENGINE
    assert str(tmp_path / "out" / "tiny.log") in str(caught.value)
    assert _left(tmp_path) == UNBUILT


def test_ctrl_c_kills_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Build) -> None:
    mark, log = tmp_path / "alive", tmp_path / "tiny.log"
    code = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    _shadow_tensorrt(tmp_path, monkeypatch, code)
    # A shell ignores it for what it runs in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        while not (mark.exists() and mark.read_text()):
            time.sleep(0.05)
        signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)

    thread = Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        build(tiny_graph(tmp_path), logs={"tiny": log})
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
    assert not log.exists()
    assert _left(tmp_path) == {"kit.json", "tiny.onnx"}


def test_a_plan_that_cannot_be_written(tmp_path: Path, build: Build) -> None:
    graph = tiny_graph(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(CapaError, match="the plan cannot be written: File too large"):
            build(graph)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _left(tmp_path) == UNBUILT
