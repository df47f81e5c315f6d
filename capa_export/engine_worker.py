"""Builds one TensorRT-RTX engine in a process of its own: `python -m capa_export.engine_worker SPEC.json`.

TensorRT may abort the process and keeps what it allocated; neither must reach the caller. The spec is what
`capa_export.engine` writes; standard error is the log.
"""

# The bindings carry no types.
# pyright: reportAttributeAccessIssue=false, reportUnknownParameterType=false, reportUntypedBaseClass=false

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import tensorrt_rtx as trt

from capa_export.errors import CapaError, ExitCode
from capa_export.external_weights import externalize_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

__all__ = ["main"]


class _Log(trt.ILogger):
    """Sends messages to standard error, and keeps the errors, the warnings and the list of fused layers."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.layers = ""

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if msg.startswith("Layers:"):
            self.layers += msg + "\n"
        elif severity <= trt.ILogger.INFO:
            print(f"[{severity.name}] {msg}", file=sys.stderr, flush=True)
            if severity == trt.ILogger.WARNING:
                self.warnings.append(msg)
            elif severity < trt.ILogger.WARNING:
                self.errors.append(msg)


class _Plan(trt.IStreamWriter):
    """Writes the plan as it is made: held whole, it would take its size in memory once more."""

    def __init__(self, file: "BinaryIO") -> None:
        super().__init__()
        self._file = file
        self.error = ""

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            # TensorRT asks for no reason and goes on.
            self.error = f"the plan cannot be written: {error.strerror}"
            return 0


def main(spec_path: str) -> int:
    """Build what the spec says; the result, or the reason why there is none, goes where the spec says."""
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    try:
        result = _build(spec)
    except CapaError as error:
        result = {"error": str(error)}
    Path(spec["result"]).write_text(json.dumps(result), encoding="utf-8")
    return int("error" in result)


def _build(spec: dict[str, Any]) -> dict[str, Any]:
    _check_version(spec["version_min"], spec["version_below"])
    log = _Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    weights = _parse(spec, network, log)
    config = builder.create_builder_config()
    # The names, types and origins of the fused layers, which land in the log and nowhere else without a GPU.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(spec["compute_capabilities"])
    for index, capability in enumerate(spec["compute_capabilities"]):
        config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + capability.replace(".", "")), index)
    config.add_optimization_profile(_profile(builder, network, spec))
    with Path(spec["plan"]).open("wb") as file:
        plan = _Plan(file)
        # True even where the plan could not be written.
        if not builder.build_serialized_network_to_stream(network, config, plan) or plan.error:
            reasons = [plan.error] if plan.error else log.errors
            raise CapaError(_first_line(reasons, "the builder gave no reason"), ExitCode.ENGINE)
    Path(spec["layers"]).write_text(log.layers, encoding="utf-8")
    return {
        "version": trt.__version__,
        "weights": weights,
        "warnings": log.warnings,
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def _check_version(minimum: str, below: str) -> None:
    have, least, first_unknown = (_parts(version) for version in (trt.__version__, minimum, below))
    if not least <= have < first_unknown:
        raise CapaError(f"tensorrt_rtx is {trt.__version__}; the target takes >={minimum},<{below}", ExitCode.ENGINE)


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _parse(spec: dict[str, Any], network: trt.INetworkDefinition, log: _Log) -> list[dict[str, Any]]:
    model = ir.load(spec["onnx"])
    weights = [asdict(weight) for weight in externalize_weights(model)] if spec["weights"] == "external" else []
    for node in model.graph.all_nodes():
        if node.op_type == "Attention":
            # Without it, attention with no fused kernel (FP32) fails; where there is one, it is used all the same.
            node.attributes.add(ir.AttrInt64("TRT_decomposable", 1))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(ir.to_proto(model).SerializeToString(), spec["onnx"]):
        reasons = [_reason(parser.get_error(index)) for index in range(parser.num_errors)]
        raise CapaError(_first_line(reasons + log.errors, "the parser gave no reason"), ExitCode.ENGINE)
    return weights


def _reason(error: trt.ParserError) -> str:
    where = f"{error.node_name()} ({error.node_operator()}): " if error.node_operator() else ""
    # "Invalid Node - <name>" says nothing that the name does not.
    return where + re.sub(r"^Invalid Node - .*\n", "", error.desc())


def _first_line(messages: "Sequence[str]", otherwise: str) -> str:
    return next((line for message in messages for line in message.splitlines() if line.strip()), otherwise)


def _profile(builder: trt.Builder, network: trt.INetworkDefinition, spec: dict[str, Any]) -> trt.IOptimizationProfile:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            if tensor.name not in spec["shape_inputs"]:
                raise CapaError(f"the values of input {tensor.name} are sizes: give their range", ExitCode.ENGINE)
            profile.set_shape_input(tensor.name, *spec["shape_inputs"][tensor.name])
        else:
            # Weights that became inputs have one shape.
            profile.set_shape(tensor.name, *spec["shapes"].get(tensor.name, [tuple(tensor.shape)] * 3))
    return profile


def _peak_rss_bytes() -> int | None:
    """Peak resident set of this process; None where the system does not tell it apart from the parent's."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii")) if status.exists() else None
    return int(found[1]) * 1024 if found else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
