"""Builds one TensorRT engine in a process of its own: `python -m capa_export.trt.worker SPEC.json`.

TensorRT may abort the process and keeps what it allocated; neither must reach the caller. The spec is what the builder
of kits writes; standard error is the log. But for Python plugins it needs the standard library and TensorRT alone, so
that a kit can carry it to a device where nothing else is installed.
"""

# The bindings carry no types.
# pyright: reportAttributeAccessIssue=false, reportUnknownParameterType=false, reportUntypedBaseClass=false

import ctypes
import importlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

__all__ = ["BuildError", "main"]

_NEW_LOGGER = 11
"""The first TensorRT whose logger has its functions in other places; all of TensorRT-RTX counts as later."""


class BuildError(Exception):
    """Why there is no engine, in one line."""


def main(spec_path: str) -> int:
    """Build what the spec says; the result, or the reason why there is none, goes where the spec says."""
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    try:
        result = _build(importlib.import_module(spec["runtime"]), spec)
    except BuildError as error:
        result = {"error": str(error)}
    Path(spec["result"]).write_text(json.dumps(result), encoding="utf-8")
    return int("error" in result)


def _build(trt: Any, spec: dict[str, Any]) -> dict[str, Any]:
    _check_version(trt, spec)
    log = _logger(trt)
    # First, or TensorRT has nowhere to say why it does not load a library.
    builder = trt.Builder(log)
    plugins = spec["plugins"]["kind"] if spec["plugins"]["count"] else "none"
    _register_plugins(trt, plugins, spec["plugins"]["library"], log)
    # TensorRT-RTX and TensorRT from 11 on know no other networks, and need no flag.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    _parse(trt, spec, network, log)
    config = builder.create_builder_config()
    # The names, types and origins of the fused layers, which land in the log and nowhere else without a GPU.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # FP32 is computed as FP32: scores, and whatever is an FP32 graph.
    config.clear_flag(trt.BuilderFlag.TF32)
    # Branches side by side need their memory all at once: of a vision tower's attention scores, tens of gigabytes.
    config.max_aux_streams = 0
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # No allocation while an engine runs, or its runs could not be captured in a CUDA graph.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if spec["compute_capabilities"]:
        config.num_compute_capabilities = len(spec["compute_capabilities"])
        for index, capability in enumerate(spec["compute_capabilities"]):
            known = getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""), None)
            if known is None:
                raise BuildError(f"{spec['runtime']} {trt.__version__} does not know compute capability {capability}")
            config.set_compute_capability(known, index)
    if plugins == "native":
        # Only in the engine that needs it: a second one with the same library would not load beside it.
        config.plugins_to_serialize = [spec["plugins"]["library"]]
    for limits in spec["profiles"]:
        config.add_optimization_profile(_profile(builder, network, limits))
    with Path(spec["plan"]).open("wb") as file:
        _write_plan(trt, builder, network, config, file, log)
    Path(spec["layers"]).write_text(log.layers, encoding="utf-8")
    return {"version": trt.__version__, "warnings": log.warnings, "peak_rss_bytes": _peak_rss_bytes()}


def _check_version(trt: Any, spec: dict[str, Any]) -> None:
    minimum, below = spec["version_min"], spec["version_below"]
    have, least, first_unknown = (_parts(version) for version in (trt.__version__, minimum, below))
    if not least <= have < first_unknown:
        raise BuildError(f"{spec['runtime']} is {trt.__version__}; the target takes >={minimum},<{below}")


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Sends messages to standard error, and keeps the errors, the warnings and the list of fused layers."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.layers = ""

        def log(self, severity: Any, msg: str) -> None:
            if msg.startswith("Layers:"):
                self.layers += msg + "\n"
            elif severity <= trt.ILogger.INFO:
                print(f"[{severity.name}] {msg}", file=sys.stderr, flush=True)
                if severity == trt.ILogger.WARNING:
                    self.warnings.append(msg)
                elif severity < trt.ILogger.WARNING:
                    self.errors.append(msg)

    return Log()


def _register_plugins(trt: Any, kind: str, library: str, log: Any) -> None:
    if kind == "python":
        from capa_export.kernels.plugins.python_plugins import register

        register(trt)
        return
    if kind != "native":
        return
    _check_headers(trt, library)
    if trt.get_plugin_registry().load_library(library) is None:
        reason = _first_line(log.errors, "TensorRT gives no reason")
        raise BuildError(f"{library}: does not load as a plugin library: {reason}")


def _check_headers(trt: Any, library: str) -> None:
    """Refuse a library that would call TensorRT's logger by the layout of another version, and crash."""
    try:
        headers = ctypes.CDLL(library).capaTensorRTHeaders()
    except (OSError, AttributeError):
        # It does not load, which TensorRT says, or is not ours.
        return
    newer = trt.__name__ == "tensorrt_rtx" or _parts(trt.__version__)[0] >= _NEW_LOGGER
    if newer != (headers >= 100 * _NEW_LOGGER):
        wanted = f"{_NEW_LOGGER} or later" if newer else "10"
        raise BuildError(
            f"{library}: compiled against TensorRT {headers // 100}.{headers % 100}; {trt.__name__} {trt.__version__} "
            f"takes libraries of headers of {wanted}"
        )


def _parse(trt: Any, spec: dict[str, Any], network: Any, log: Any) -> None:
    parser = trt.OnnxParser(network, log)
    if not parser.parse(Path(spec["onnx"]).read_bytes(), spec["beside"]):
        reasons = [_reason(parser.get_error(index)) for index in range(parser.num_errors)]
        raise BuildError(_first_line(reasons + log.errors, "the parser gave no reason"))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)
    # Where the parser finds no plugin, it takes the function body and says nothing; and the other way round.
    if found != spec["plugins"]["count"]:
        raise BuildError(f"{found} plugin layers where there should be {spec['plugins']['count']}")


def _reason(error: Any) -> str:
    where = f"{error.node_name()} ({error.node_operator()}): " if error.node_operator() else ""
    # "Invalid Node - <name>" says nothing that the name does not.
    return where + re.sub(r"^Invalid Node - .*\n", "", error.desc())


def _first_line(messages: "Sequence[str]", otherwise: str) -> str:
    return next((line for message in messages for line in message.splitlines() if line.strip()), otherwise)


def _profile(builder: Any, network: Any, limits: dict[str, Any]) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            if tensor.name not in limits["shape_inputs"]:
                raise BuildError(f"the values of input {tensor.name} are sizes: give their range")
            profile.set_shape_input(tensor.name, *limits["shape_inputs"][tensor.name])
        else:
            # Weights that became inputs have one shape.
            profile.set_shape(tensor.name, *limits["shapes"].get(tensor.name, [tuple(tensor.shape)] * 3))
    return profile


def _write_plan(trt: Any, builder: Any, network: Any, config: Any, file: "BinaryIO", log: Any) -> None:
    errors: list[str] = []

    def write(data: bytes) -> int:
        try:
            return file.write(data)
        except OSError as error:
            # TensorRT asks for no reason and goes on.
            errors.append(f"the plan cannot be written: {error.strerror}")
            return 0

    if hasattr(builder, "build_serialized_network_to_stream"):
        # Written as it is made: held whole, it would take its size in memory once more.
        class Plan(trt.IStreamWriter):
            def write(self, data: bytes) -> int:
                return write(data)

        # True even where the plan could not be written.
        built = builder.build_serialized_network_to_stream(network, config, Plan())
    else:
        plan = builder.build_serialized_network(network, config)
        built = plan is not None
        if built:
            write(plan)
    if not built or errors:
        raise BuildError(_first_line(errors or log.errors, "the builder gave no reason"))


def _peak_rss_bytes() -> int | None:
    """Peak resident set of this process; None where the system does not tell it apart from the parent's."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii")) if status.exists() else None
    return int(found[1]) * 1024 if found else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
