"""The engine stage: a bundle's three engines, or the kit that builds them on the device."""

import platform
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from capa_export.base.errors import CapaError, ExitCode, how_to_install
from capa_export.base.progress import Report
from capa_export.bundle.confined import confined
from capa_export.bundle.store import Bundle, file_digest
from capa_export.config.pixels import PixelBounds
from capa_export.config.plugins import Plugins, PluginWish, choose_device_plugins, choose_plugins
from capa_export.config.target import Target
from capa_export.config.weights import Weights, WeightsWish
from capa_export.graph.contract import NUM_KEEP
from capa_export.job import ONNX, Job, run_stage, say, say_weights, tool_versions
from capa_export.plan.device_memory import choose_weights
from capa_export.plan.plan import check_engine_disk, check_engine_memory
from capa_export.run.bundled import bundled_dims
from capa_export.trt.engine import EngineReport, build_engine

__all__ = ["GRAPHS", "build_engines", "check_engines", "check_runtime", "refuse_copies"]

GRAPHS = {"visual/model.onnx": "visual/visual", "llm/prefill.onnx": "llm/prefill", "llm/decode.onnx": "llm/decode"}
"""Engine of each graph."""


def check_runtime(target: Target) -> None:
    """Refuse a target whose builder is not installed, before anything is run."""
    engine = target.require_engine()
    runtime = engine.runtime
    if engine.built == "here" and find_spec(runtime.replace("-", "_")) is None:
        raise CapaError(
            f"target {target.name} needs {runtime}, which is not installed: {how_to_install('rtx')}, "
            "or build with --target onnx",
            ExitCode.ENGINE,
        )


def check_engines(job: Job, target: Target) -> None:
    """Refuse, before anything is run, engines that could not be built.

    Raises:
        CapaError: their plugins cannot be had.
    """
    decoder = job.source.dims.decoder
    _refuse_library(target, job.plugin_library)
    if target.require_engine().built == "on-device":
        choose_device_plugins(job.plugins, job.precision, decoder)
        return
    choose_plugins(job.plugins, job.precision, decoder, job.plugin_library)


def _refuse_library(target: Target, library: Path | None) -> None:
    """Raise where an engine would hold a library that its device cannot load."""
    engine = target.require_engine()
    if library is None:
        return
    if engine.built == "on-device":
        raise CapaError(
            f"--plugin-library: {target.name} compiles its own, from sources that come with the kit", ExitCode.USAGE
        )
    if engine.cpu is not None and engine.cpu != platform.machine():
        raise CapaError(
            f"--plugin-library: {target.name} is {engine.cpu} and this machine {platform.machine()}: what loads here "
            f"would not load there; build on {target.name}, or with --plugins python",
            ExitCode.USAGE,
        )


def build_engines(
    bundle: Bundle,
    target: Target,
    *,
    weights: WeightsWish = "auto",
    report: Report,
    plugins: PluginWish = "auto",
    plugin_library: Path | None = None,
) -> dict[str, Any]:
    """Build the vision, prefill and decode engines of a bundle for a target, or what builds them on the device."""
    _refuse_library(target, plugin_library)
    engine = target.require_engine()
    bundle.verify("export", weights=False)
    precision, dims = bundle.stage("export")["result"]["precision"], bundled_dims(bundle)
    where, reason = choose_weights(dims, precision, weights, target)
    if engine.built == "on-device":
        result = _write_kit(bundle, target, where, plugins, report)
    else:
        result = _build_here(bundle, target, where, plugins, plugin_library, report)
    say_weights(weights, where, reason)
    return result


def _build_here(
    bundle: Bundle,
    target: Target,
    weights: Weights,
    plugins: PluginWish,
    plugin_library: Path | None,
    report: Report,
) -> dict[str, Any]:
    precision = bundle.stage("export")["result"]["precision"]
    target.require_precision(precision)
    chosen = choose_plugins(plugins, precision, bundled_dims(bundle).decoder, plugin_library)
    if not _has_engines(bundle, target, weights):
        # Before the weights are read, which takes as long as they are large.
        _check_room(bundle, weights)
    bundle.verify("export")
    folder = f"engines/{target.name}"
    record = {"kind": chosen.kind, "library_sha256": file_digest(chosen.library) if chosen.library else None}
    key = [tool_versions("tensorrt-rtx"), target.model_dump(mode="json"), weights, bundle.digest("export"), record]

    def work(scratch: Path) -> dict[str, Any]:
        _check_room(bundle, weights)
        engines: dict[str, Any] = {}
        for done, (onnx, name) in enumerate(GRAPHS.items()):
            report(f"engines for {target.name}", done, len(GRAPHS))
            engines[name] = _entry(onnx, _build(bundle, target, scratch / folder, onnx, name, weights, chosen))
        settings = target.require_engine().model_dump(include={"runtime", "compute_capabilities"}, mode="json")
        seen = _largest_pictures(target)
        return {**settings, "weights": weights, "plugins": record, "pictures": seen, "engines": engines}

    result = run_stage(bundle, f"engine/{target.name}", key, [folder], work)
    if chosen.reason:
        say(f"{'':<14}no plugins: {chosen.reason}")
    return result


def _write_kit(bundle: Bundle, target: Target, weights: Weights, plugins: PluginWish, report: Report) -> dict[str, Any]:
    from capa_export.trt.kit import write_kit

    bundle.verify("export")
    folder = f"engines/{target.name}"
    settings = target.model_dump(mode="json")
    key = [tool_versions("triton"), settings, weights, bundle.digest("export"), plugins, find_spec("triton") is None]

    def work(scratch: Path) -> dict[str, Any]:
        digests = write_kit(bundle, target, scratch / folder, weights=weights, plugins=plugins, report=report)
        sha256 = {f"{folder}/{name}": digest for name, digest in digests.items()}
        seen = _largest_pictures(target)
        return {"kit": folder, "weights": weights, "pictures": seen, "engines": {}, "sha256": sha256}

    return run_stage(bundle, f"engine/{target.name}", key, [folder], work)


def _largest_pictures(target: Target) -> dict[str, int]:
    """What the target's engines take; a bundle may have been exported for another's."""
    return PixelBounds().on_target(target).model_dump(exclude_none=True)


def _build(
    bundle: Bundle,
    target: Target,
    folder: Path,
    onnx: str,
    name: str,
    weights: Weights,
    plugins: Plugins,
) -> EngineReport:
    values = target.require_engine().values
    stages = len(bundle.manifest["recipe"]["prune"]["schedule"])
    # Outside the scratch folder, since it must outlive a failed build.
    log = confined(bundle.folder, f"{name.replace('/', '-')}.{target.name}.log")
    try:
        built = build_engine(
            bundle.folder / ONNX / onnx,
            folder / f"{name}.engine",
            dims={},
            shape_inputs={NUM_KEEP: values[NUM_KEEP].repeated(stages)} if name == "llm/prefill" else {},
            target=target,
            weights=weights,
            plugins=plugins,
            home=(bundle.folder / "engines" / target.name / name).parent,
            log=log,
        )
    except KeyboardInterrupt:
        log.unlink(missing_ok=True)
        raise
    built.log.replace((folder / name).with_suffix(".log"))
    refuse_copies(onnx, built.weight_copies)
    return built


def refuse_copies(what: str, copies: Sequence[str]) -> None:
    """Raise where an engine has layers that copy weights."""
    if copies:
        raise CapaError(
            f"{what}: the engine would copy weights at every run ({copies[0]}); "
            "this is a defect of the graph, please report it",
            ExitCode.ENGINE,
        )


def _entry(onnx: str, built: EngineReport) -> Mapping[str, Any]:
    """What the manifest says of an engine."""
    return {
        "onnx": onnx,
        "bytes": built.bytes,
        "seconds": round(built.seconds, 3),
        "peak_memory_bytes": built.peak_rss_bytes,
        "layers": built.num_layers,
        "layers_by_type": built.num_layers_by_type,
        "custom_layers": built.num_custom_layers,
        "weight_copies": len(built.weight_copies),
        "activation_bytes": built.activation_bytes,
        "runtime": built.runtime_version,
        "warnings": list(built.warnings),
    }


def _has_engines(bundle: Bundle, target: Target, weights: str) -> bool:
    """Whether a build for this target has been through, with weights in the same place."""
    record = bundle.manifest["stages"].get(f"engine/{target.name}")
    return record is not None and record["result"]["weights"] == weights


def _check_room(bundle: Bundle, weights: Weights) -> None:
    """Refuse engines that memory or disk has no room for."""
    dims = bundled_dims(bundle)
    precision = bundle.stage("export")["result"]["precision"]
    check_engine_memory(dims, precision, weights)
    if weights == "embedded":
        check_engine_disk(dims, precision, bundle.folder)
