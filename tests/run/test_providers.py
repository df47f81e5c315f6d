"""The provider that is asked for is the one that runs, and whoever asks for one that is not there is told."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.run import providers
from capa_export.run.providers import check_used, require_one_runtime, require_provider, used_provider


def test_a_provider_that_is_not_installed_is_refused_with_what_would_do() -> None:
    with pytest.raises(CapaError, match=r"--provider cuda: ONNX Runtime \S+ has cpu here; .*onnxruntime-gpu") as caught:
        require_provider("cuda")
    assert caught.value.code is ExitCode.PREFLIGHT
    with pytest.raises(CapaError, match="--provider rocm: must be one of cpu, cuda, tensorrt, nv-tensorrt-rtx"):
        require_provider("rocm")
    require_provider("cpu")


def test_a_package_for_the_cpu_that_lies_over_the_gpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "version", lambda name: "1.31.1")
    with pytest.raises(CapaError, match="pip install --force-reinstall --no-deps onnxruntime-gpu"):
        require_provider("cuda")


def test_engines_and_a_provider_are_two_runtimes() -> None:
    with pytest.raises(CapaError, match="--engine rtx and --provider cuda name two runtimes") as caught:
        require_one_runtime("rtx", "cuda")
    assert caught.value.code is ExitCode.USAGE
    require_one_runtime("rtx", "cpu")


def test_a_session_that_fell_back_is_refused() -> None:
    fallen = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    with pytest.raises(CapaError, match=r"decode\.onnx: CUDAExecutionProvider did not start, .* fell back to CPU"):
        check_used("cuda", fallen, "decode.onnx")
    check_used("cpu", fallen, "decode.onnx")


def test_fp32_on_cuda_is_fp32() -> None:
    (cuda, options), (cpu, _) = used_provider("cuda")
    assert (cuda, cpu) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options == {"use_tf32": "0"}


def test_what_is_kept_goes_into_the_next_run_as_it_is(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    path = tmp_path / "double.onnx"
    text = """<ir_version: 10, opset_import: ["" : 22]>
    g (float[N] x) => (float[N] twice, float[N] below) { twice = Add(x, x)  below = Neg(twice) }"""
    onnx.save(onnx.parser.parse_model(text), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = providers.run_bound(session, {"x": np.arange(6, dtype=np.float32)[::2]}, "cpu", kept=["twice"])
    assert found["below"].tolist() == [0, -4, -8]
    again = providers.run_bound(session, {"x": found["twice"]}, "cpu")
    assert again["twice"].tolist() == [0, 8, 16]
