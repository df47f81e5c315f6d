"""The benchmark's engines, what they are held against, and the peers beside them."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capa_export.base.errors import CapaError
from capa_export.kernels import cuda
from capa_export.model.source import Source
from capa_export.parity.trace import Trace
from capa_export.run.engine import require_engines
from tests.computing_driver import ComputingDriver
from tests.fake_driver import compile_from_ptx
from tests.fake_tensorrt import FakeTensorRT, write_bundle
from tests.models.qwen25vl import random_model, save_model


def test_a_gpu_that_a_runtime_does_not_take(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engines = module("engines")
    specs: list[object] = [object(), object(), None]

    def find_spec(_: str) -> object:
        return specs.pop(0)

    monkeypatch.setattr(engines, "find_spec", find_spec)
    with pytest.raises(CapaError, match=r"tensorrt-rtx cannot build these graphs for compute capability 9\.0"):
        engines.target_for("tensorrt-rtx", "9.0")
    assert engines.target_for("tensorrt-rtx", "8.9").require_engine().compute_capabilities == ("8.9",)
    with pytest.raises(CapaError, match="tensorrt-rtx is not installed"):
        engines.target_for("tensorrt-rtx", "8.9")


def test_engines_are_skipped_without_a_driver(module: Callable[[str], Any], tmp_path: Path) -> None:
    engines = module("engines")
    [row] = module("cases").rows(engines.cases(tmp_path, "tensorrt-rtx", engines.VARIANTS))
    assert "no GPU" in row["skipped"]


def logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 64)).astype(np.float32)


def test_the_gate_on_engines(module: Callable[[str], Any]) -> None:
    reference = module("reference")
    kept = np.arange(304)
    wanted = Trace(logits(), [kept])
    assert reference.figures(Trace(logits() * 1.001, [kept]), wanted)["kept_iou"] == 1
    with pytest.raises(AssertionError, match="cosine"):
        reference.figures(Trace(logits(1), [kept]), wanted)
    with pytest.raises(AssertionError, match="cosine"):
        reference.figures(Trace(logits() * np.nan, [kept]), wanted)
    # Of a flip at the cut, the set is judged; its logits are of other tokens.
    flipped = np.append(kept[:-1], 305)
    assert set(reference.figures(Trace(logits(1), [flipped]), wanted)) == {"kept_iou"}
    with pytest.raises(AssertionError, match="kept_iou"):
        reference.figures(Trace(logits(), [kept + 40]), wanted)


@pytest.fixture
def workload(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The model of a tiny checkpoint in place of the large one, with a head size that there are kernels for."""
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]}
    model = random_model(num_attention_heads=2, num_key_value_heads=1, rope_parameters=rope)
    folder = save_model(tmp_path / "checkpoint", model)

    def checkpoint(_: Path) -> Path:
        return folder

    monkeypatch.setattr(module("reference"), "checkpoint", checkpoint)
    return model


def test_the_reference_is_onnx_runtimes(workload: Any, module: Callable[[str], Any], tmp_path: Path) -> None:
    reference = module("reference")
    graphs = reference.ReferenceGraphs(tmp_path)
    dense, capa = (graphs.reference(dense=dense) for dense in (True, False))
    assert [len(one.kept[0]) for one in (dense, capa)] == [1024 + 48, 256 + 48]
    assert dense.logits.shape == capa.logits.shape == (4, dense.logits.shape[1])
    again = reference.ReferenceGraphs(tmp_path).reference(dense=False)
    model = reference.OnnxModel(graphs.folder)
    own = reference.trace(model, 256, again.tokens)
    np.testing.assert_array_equal(own.logits, again.logits)
    assert reference.figures(own, capa)["cosine"] == pytest.approx(1)


@pytest.mark.trt
@pytest.mark.slow
def test_engines_are_built_for_one_gpu(workload: Any, module: Callable[[str], Any], tmp_path: Path) -> None:
    engines, graphs = module("engines"), module("reference").ReferenceGraphs(tmp_path)
    target = engines.target_for("tensorrt-rtx", "8.9")
    costs = {}
    for variant in (engines.Variant("python", "external"), engines.Variant("none", "external", dense=True)):
        folder = tmp_path / "engines" / variant.name
        costs[variant] = engines._build(
            graphs.folder, folder, target, variant, engines._plugins(variant.plugins, "8.9", tmp_path)
        )
        assert all((folder / f"{name}.engine").is_file() for name in variant.engines.values())
        weights = json.loads((folder / "llm" / "decode.weights.json").read_text(encoding="utf-8"))
        assert all((folder / "llm" / entry["file"]).is_file() for entry in weights.values())
    first, second = costs.values()
    # What has no CAPA nodes is built once.
    assert set(first) > set(second) == {"llm/prefill_s", "llm/prefill_MB"}


@pytest.mark.slow
def test_peers_compiled_or_not_decode_alike(module: Callable[[str], Any], model: Any) -> None:
    peers = module("peers")
    plain = peers.HuggingFaceDecoder(model, "cpu")
    compiled = peers.HuggingFaceDecoder(model, "cpu", partial(torch.compile, backend="eager"))
    torch.testing.assert_close(plain.prefill(), compiled.prefill(), rtol=1e-4, atol=1e-4)
    (seconds, own), (_, other) = plain.decode(3), compiled.decode(3)
    assert len(seconds) == 3
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@pytest.fixture
def computing(monkeypatch: pytest.MonkeyPatch) -> ComputingDriver:
    """A stand-in for the GPU that computes, and TensorRT-RTX in its place."""
    driver = ComputingDriver()
    monkeypatch.setattr("capa_export.kernels.plugins.launcher.compile_kernels", compile_from_ptx)
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeTensorRT(driver))
    return driver


@pytest.mark.parametrize(("has_kernels", "variant"), [(True, 2), (False, 2), (True, 6)])
def test_engines_are_measured_with_tokens_of_either_side(
    module: Callable[[str], Any],
    source: Source,
    computing: ComputingDriver,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    has_kernels: bool,  # noqa: FBT001
    variant: int,
) -> None:
    """Every case runs, and steps of tokens that the device chooses launch the kernels."""
    engines = module("engines")
    for name in ("workload", "engines"):
        monkeypatch.setattr(module(name), "NUM_VISUAL", 64)
    for name, count in {"_STEPS": 5, "_WARM_UP": 2, "_ROUNDS": 1, "_RATIOS": (0.75,)}.items():
        monkeypatch.setattr(engines, name, count)
    joined = engines.VARIANTS[variant].weights == "joined"
    bundle = write_bundle(source, tmp_path, joined=joined)
    computing.open(bundle.folder / "onnx", joined=joined)
    model = engines.EngineModel(require_engines(bundle, "rtx"))
    model.chooses = has_kernels
    [parity, *measures] = engines._measured("tiny", None, engines.VARIANTS[variant], model)
    assert parity[0].endswith("against ONNX Runtime")
    rows = list(module("cases").rows(measures))
    chosen = rows.pop()
    assert [row["result"]["ms"] > 0 for row in rows] == [True] * 3
    if has_kernels:
        assert chosen["result"]["ms"] > 0 and computing.named("cuLaunchKernel")
    else:
        assert chosen["skipped"] == "tokens are chosen on the host" and not computing.named("cuLaunchKernel")
