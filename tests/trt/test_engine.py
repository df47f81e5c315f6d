"""Engines: real builds of a small graph with CAPA's kind of nodes, and every way a build can go wrong."""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.config.target import DimRange, ShapeRange, Target, load_target
from capa_export.trt.engine import EngineReport, build_engine, parse_layers, weight_copies

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


def _graph(folder: Path, dtype: str = "float16", text: str = GRAPH) -> Path:
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


@pytest.fixture
def target() -> Target:
    rtx = load_target("rtx")
    engine = rtx.require_engine().model_copy(update={"compute_capabilities": ("8.6",)})
    return rtx.model_copy(update={"engine": engine})


@pytest.fixture
def build(tmp_path: Path, target: Target) -> Callable[..., EngineReport]:
    def call(onnx: Path, **options: object) -> EngineReport:
        settings = {
            "dims": {},
            "shape_inputs": {"num_keep": ShapeRange(min=(0,), opt=(64,), max=(512,))},
            "target": target,
            "weights": "embedded",
            **options,
        }
        return build_engine(onnx, tmp_path / "out" / "tiny.engine", **settings)

    return call


def _left(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "out").iterdir()}


def test_an_engine_and_its_report(tmp_path: Path, build: Callable[..., EngineReport]) -> None:
    ticks: list[float] = []
    report = build(_graph(tmp_path), progress=ticks.append)
    assert report.path.stat().st_size == report.bytes > 400_000
    assert report.seconds > 0
    assert report.peak_rss_bytes is None or report.peak_rss_bytes > 50_000_000
    assert report.runtime_version.startswith("1.")
    assert report.num_layers == sum(report.num_layers_by_type.values()) > 3
    assert (report.num_custom_layers, report.weight_copies, report.warnings) == (0, (), ())
    assert ticks == sorted(ticks)
    assert _left(tmp_path) == {"tiny.engine", "tiny.layers.json", "tiny.log"}
    layers = json.loads(report.layers.read_text(encoding="utf-8"))
    assert len(layers) == report.num_layers
    assert any("mha" in layer["name"] for layer in layers), "no fused attention kernel"
    tensors = [tensor for layer in layers for part in ("inputs", "outputs") for tensor in layer[part]]
    assert {"name": "x", "shape": [1, -1, 256], "dtype": "Half"} in tensors
    assert any(node.startswith("node_of_") for layer in layers for node in layer["onnx"])


def test_external_weights_stay_out_of_the_plan(tmp_path: Path, build: Callable[..., EngineReport]) -> None:
    graph = _graph(tmp_path)
    embedded = build(graph)
    external = build(graph, weights="external")
    weight_bytes = (768 + 256) * 256 * 2
    assert embedded.bytes - external.bytes > 0.8 * weight_bytes
    assert (external.weight_copies, external.num_external_weights, embedded.num_external_weights) == ((), 2, 0)
    assert external.weights is not None
    entries = json.loads(external.weights.read_text(encoding="utf-8"))
    assert entries["qkv"].items() >= {"length": 768 * 256 * 2, "dtype": "FLOAT16", "shape": [768, 256]}.items()
    assert (external.weights.parent / entries["qkv"]["file"]).resolve() == (tmp_path / "tiny.onnx.data").resolve()
    build(graph)
    assert not external.weights.exists(), "it describes an engine that is gone"


def test_an_engine_that_will_be_moved(tmp_path: Path, build: Callable[..., EngineReport]) -> None:
    home, log = tmp_path / "bundle" / "engines" / "rtx", tmp_path / "kept.log"
    report = build(_graph(tmp_path), weights="external", home=home, log=log)
    assert report.weights is not None
    entries = json.loads(report.weights.read_text(encoding="utf-8"))
    assert entries["qkv"]["file"] == "../../../tiny.onnx.data"
    assert report.log == log
    assert log.stat().st_size > 0
    assert _left(tmp_path) == {"tiny.engine", "tiny.layers.json", "tiny.weights.json"}


def test_fp32_attention_builds_without_a_fused_kernel(tmp_path: Path, build: Callable[..., EngineReport]) -> None:
    report = build(_graph(tmp_path, "float"), dims={"sequence": DimRange(min=1, opt=16, max=32)})
    names = [layer["name"] for layer in json.loads(report.layers.read_text(encoding="utf-8"))]
    assert not any("mha" in name for name in names)


def test_a_gpu_the_builder_refuses_starts_nothing(
    tmp_path: Path, build: Callable[..., EngineReport], target: Target
) -> None:
    engine = target.require_engine().model_copy(update={"compute_capabilities": ("8.6", "9.0")})
    with pytest.raises(CapaError, match=r"compute capability 9\.0; it can for 8\.0"):
        build(_graph(tmp_path), target=target.model_copy(update={"engine": engine}))
    assert not (tmp_path / "out").exists()


def test_a_missing_graph(tmp_path: Path, build: Callable[..., EngineReport]) -> None:
    with pytest.raises(CapaError, match=r"absent\.onnx: cannot be read as ONNX") as caught:
        build(tmp_path / "absent.onnx")
    assert caught.value.code is ExitCode.ENGINE


def test_missing_weights(tmp_path: Path, build: Callable[..., EngineReport]) -> None:
    graph = _graph(tmp_path)
    (tmp_path / "tiny.onnx.data").unlink()
    with pytest.raises(CapaError, match=r"tiny\.onnx: its weights are missing: .*tiny\.onnx\.data"):
        build(graph)


def test_weights_that_end_too_soon(tmp_path: Path, build: Callable[..., EngineReport]) -> None:
    graph = _graph(tmp_path)
    (tmp_path / "tiny.onnx.data").write_bytes(b"short")
    with pytest.raises(CapaError, match=r"tiny\.onnx: .*log: .*tiny\.log"):
        build(graph)
    assert _left(tmp_path) == {"tiny.log"}


def test_an_operator_the_parser_refuses_is_named(tmp_path: Path, build: Callable[..., EngineReport]) -> None:
    text = GRAPH.replace("normed = RMSNorm", "unread = NonZero (x_TD)\n    normed = RMSNorm")
    with pytest.raises(CapaError, match=r"NonZero") as caught:
        build(_graph(tmp_path, text=text))
    assert "\n" not in str(caught.value)
    assert "NonZero" in (tmp_path / "out" / "tiny.log").read_text(encoding="utf-8")


def test_a_builder_error_is_quoted(tmp_path: Path, build: Callable[..., EngineReport]) -> None:
    # TensorRT sorts 3840 values at most, and says so when it builds.
    text = GRAPH.replace(
        "y = capa.Front (sum, num_keep)",
        """count = Constant <value = int64[1] {4000}> ()
    best, where = TopK <axis = 0> (sum, count)
    y = capa.Front (best, num_keep)""",
    )
    with pytest.raises(CapaError, match="Error Code") as caught:
        build(_graph(tmp_path, text=text), dims={"sequence": DimRange(min=4000, opt=4096, max=4096)})
    assert "\n" not in str(caught.value)
    assert _left(tmp_path) == {"tiny.log"}


def test_sizes_need_a_range(tmp_path: Path, build: Callable[..., EngineReport]) -> None:
    with pytest.raises(CapaError, match="the values of input num_keep are sizes"):
        build(_graph(tmp_path), shape_inputs={})


def test_limits_of_a_dimension_the_graph_lacks(tmp_path: Path, build: Callable[..., EngineReport]) -> None:
    with pytest.raises(CapaError, match="no dimension step; its dimensions are: sequence"):
        build(_graph(tmp_path), dims={"step": DimRange(min=1, opt=1, max=1)})
    with pytest.raises(CapaError, match="no input num_kept; its inputs are: num_keep, x"):
        build(_graph(tmp_path), shape_inputs={"num_kept": ShapeRange(min=(0,), opt=(1,), max=(2,))})


def test_a_version_outside_the_target_s_range(
    tmp_path: Path, build: Callable[..., EngineReport], target: Target
) -> None:
    engine = target.require_engine().model_copy(update={"version_min": "1.99"})
    with pytest.raises(CapaError, match=r"tensorrt_rtx is .*; the target takes >=1\.99,<2"):
        build(_graph(tmp_path), target=target.model_copy(update={"engine": engine}))


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[..., EngineReport], code: str, message: str
) -> None:
    graph = _graph(tmp_path)
    _shadow_tensorrt(tmp_path, monkeypatch, code)
    with pytest.raises(CapaError, match=message) as caught:
        build(graph)
    assert caught.value.code is ExitCode.ENGINE
    assert str(tmp_path / "out" / "tiny.log") in str(caught.value)
    assert _left(tmp_path) == {"tiny.log"}


def test_ctrl_c_kills_the_worker_and_leaves_the_old_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[..., EngineReport]
) -> None:
    graph = _graph(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tiny.engine").write_bytes(b"old")
    mark = tmp_path / "alive"
    _shadow_tensorrt(
        tmp_path, monkeypatch, f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )

    def interrupt(_: float) -> None:
        if mark.exists() and mark.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(graph, progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
    assert _left(tmp_path) == {"tiny.engine", "tiny.log"}
    assert (tmp_path / "out" / "tiny.engine").read_bytes() == b"old"


# Two real lines, shortened: [in, out] weights are copied in every step, those of a Gemm are not.
_COPY = (
    "Name: __myl_Move_myl0_2, LayerType: kgen, "
    "Inputs: [ { Name: w, Dimensions: [512,1024], Strides: [1024,1], StrideOrder: [1,0], Datatype: Half, Format: F }], "
    "Constants: [], "
    "Outputs: [ { Name: __mye209_myl0, Dimensions: [512,1024], Strides: [1,512], Datatype: Half, Format: F }], "
    "TacticName: __myl_Move_0xf7, StreamId: 0, Metadata: [ONNX Layer: mlp/MatMul]\x1f[ONNX Layer: mlp/Add]"
)
_GEMM = (
    "Name: mlp/Gemm_myl0_3, LayerType: gemm, "
    "Inputs: [ { Name: x, Dimensions: [-1,512], Strides: [512,1], Datatype: Half, Format: F }, "
    "{ Name: w, Dimensions: [512,1024], Strides: [1,512], Datatype: Half, Format: F }], "
    "Constants: [ { Name: beta, Dimensions: [1], Datatype: Float, Format: F }], "
    "Outputs: [ { Name: y, Dimensions: [-1,1024], Strides: [1024,1], Datatype: Half, Format: F }], "
    "TacticName: t, StreamId: 0, Metadata: "
)


def test_a_weight_copy_is_told_from_a_multiplication() -> None:
    layers = parse_layers(f"Layers:\n{_COPY}\n{_GEMM}\n\nI/O Tensors:\n Name: x, IOMode: Input\n")
    assert [layer.type for layer in layers] == ["kgen", "gemm"]
    assert layers[0].onnx == ("mlp/MatMul", "mlp/Add")
    assert [tensor.name for tensor in layers[1].inputs] == ["x", "w"]
    assert weight_copies(layers, {"w"}) == layers[:1]
    assert weight_copies(layers, set()) == [], "moving activations is no copy of a weight"
    constant = parse_layers(_COPY.replace("Inputs: [ {", "Constants: [ {").replace(", Constants: []", ", Inputs: []"))
    assert weight_copies(constant, set()) == constant


def test_a_plan_that_cannot_be_written(tmp_path: Path, build: Callable[..., EngineReport]) -> None:
    graph = _graph(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(CapaError, match="the plan cannot be written: File too large"):
            build(graph)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _left(tmp_path) == {"tiny.log"}
