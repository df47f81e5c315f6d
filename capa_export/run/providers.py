"""ONNX Runtime's execution providers: the one that is asked for is the one that runs, or it is an error."""

from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

import numpy as np

from capa_export.base.errors import CapaError, ExitCode
from capa_export.config.provider import Provider

__all__ = ["check_used", "require_one_runtime", "require_provider", "run_bound", "used_provider"]

_NAMES: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
_DEVICES: Mapping[str, str] = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda", "nv-tensorrt-rtx": "cuda"}
"""Where a provider keeps what it computed."""
_OPTIONS: Mapping[str, Mapping[str, str]] = {"cuda": {"use_tf32": "0"}}
"""TF32 would round what is to be FP32."""


def require_provider(provider: str) -> None:
    """Refuse a provider that this installation of ONNX Runtime does not have.

    Raises:
        CapaError: it is none, or not there.
    """
    import onnxruntime

    if provider not in _NAMES:
        raise CapaError(f"--provider {provider}: must be one of {', '.join(get_args(Provider))}", ExitCode.USAGE)
    there = onnxruntime.get_available_providers()
    if _NAMES[provider] not in there:
        known = [name for name, full in _NAMES.items() if full in there]
        raise CapaError(
            f"--provider {provider}: ONNX Runtime {onnxruntime.__version__} has {', '.join(known)} here; {_remedy()}",
            ExitCode.PREFLIGHT,
        )


def _remedy() -> str:
    """What brings a GPU's providers: both packages write the same files, and the last one installed wins."""
    command = "pip install --force-reinstall --no-deps onnxruntime-gpu"
    try:
        version("onnxruntime-gpu")
    except PackageNotFoundError:
        return f'for a GPU run `pip install "onnxruntime-gpu[cuda,cudnn]"`, then `{command}`'
    return f"onnxruntime was installed over onnxruntime-gpu: run `{command}`"


def require_one_runtime(engine: str | None, provider: str) -> None:
    """Refuse engines and a provider of ONNX Runtime at once, and a provider that is not here.

    Raises:
        CapaError: it is so.
    """
    if engine is not None and provider != "cpu":
        raise CapaError(
            f"--engine {engine} and --provider {provider} name two runtimes; leave one of them out", ExitCode.USAGE
        )
    require_provider(provider)


def used_provider(provider: str) -> list[tuple[str, dict[str, str]]]:
    """What ONNX Runtime is told; nodes that the provider has no kernel for are the CPU's."""
    names = [provider] if provider == "cpu" else [provider, "cpu"]
    return [(_NAMES[name], dict(_OPTIONS.get(name, {}))) for name in names]


def check_used(provider: str, session: Any, where: object) -> None:
    """Refuse a session that fell back to another provider, as ONNX Runtime does where a library is missing.

    Raises:
        CapaError: it did.
    """
    used = session.get_providers()
    if used[0] != _NAMES[provider]:
        raise CapaError(
            f"{where}: {_NAMES[provider]} did not start, ONNX Runtime fell back to {used[0]}; check the GPU's driver, "
            "and that its CUDA and TensorRT are those that onnxruntime-gpu was built for",
            ExitCode.PREFLIGHT,
        )


def run_bound(session: Any, feed: Mapping[str, Any], provider: str, kept: Collection[str] = ()) -> dict[str, Any]:
    """The outputs of a run; those that are `kept` stay on the provider's device as `OrtValue`.

    Args:
        session: of ONNX Runtime.
        feed: arrays, or what an earlier run left on the device.
        provider: of the session.
        kept: outputs that only a later run reads.
    """
    binding = session.io_binding()
    for name, value in feed.items():
        if isinstance(value, np.ndarray):
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        else:
            binding.bind_ortvalue_input(name, value)
    names = [entry.name for entry in session.get_outputs()]
    for name in names:
        binding.bind_output(name, _DEVICES[provider] if name in kept else "cpu")
    session.run_with_iobinding(binding)
    found = dict(zip(names, binding.get_outputs(), strict=True))
    return {name: value if name in kept else value.numpy() for name, value in found.items()}
