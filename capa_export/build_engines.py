"""The engine stage: a bundle's three engines, or the kit that builds them on the device."""

import json
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from capa_export.bundle import Bundle, file_digest
from capa_export.dims import ModelDims
from capa_export.dry_run import check_engine_disk, check_engine_memory
from capa_export.engine import EngineReport, build_engine
from capa_export.errors import CapaError, ExitCode
from capa_export.families import load_family
from capa_export.job import ONNX, run_stage, say, tool_versions
from capa_export.plugins.choice import Plugins, PluginWish, choose_plugins
from capa_export.progress import Report
from capa_export.recipe import recipe_of
from capa_export.target import Target

__all__ = ["GRAPHS", "build_engines", "bundle_dims", "check_runtime", "has_engines"]

GRAPHS = {"visual/model.onnx": "visual/visual", "llm/prefill.onnx": "llm/prefill", "llm/decode.onnx": "llm/decode"}
"""Engine of each graph."""


def check_runtime(target: Target) -> None:
    """Refuse a target whose builder is not installed, before anything is run."""
    runtime = target.require_engine().runtime
    if find_spec(runtime.replace("-", "_")) is None:
        raise CapaError(
            f"target {target.name} needs {runtime}, which is not installed: pip install capa-export[rtx], "
            "or build with --target onnx",
            ExitCode.ENGINE,
        )


def build_engines(
    bundle: Bundle,
    target: Target,
    *,
    weights: Literal["embedded", "external"],
    report: Report,
    plugins: PluginWish = "auto",
    plugin_library: Path | None = None,
) -> dict[str, Any]:
    """Build the vision, prefill and decode engines of a bundle for a target."""
    export = bundle.stage("export")
    precision = export["result"]["precision"]
    target.require_precision(precision)
    chosen = choose_plugins(plugins, precision, plugin_library)
    if not has_engines(bundle, target, weights):
        # Before the files are read, which takes as long as they are large; damaged ones are what comes out then.
        with suppress(OSError, ValueError):
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
        return {"weights": weights, "plugins": record, "engines": engines}

    result = run_stage(bundle, f"engine/{target.name}", key, [folder], work)
    if chosen.reason:
        say(f"{'':<14}no plugins: {chosen.reason}")
    return result


def _build(
    bundle: Bundle,
    target: Target,
    folder: Path,
    onnx: str,
    name: str,
    weights: Literal["embedded", "external"],
    plugins: Plugins,
) -> EngineReport:
    values = target.require_engine().values
    stages = len(bundle.manifest["recipe"]["prune"]["schedule"])
    # Outside the scratch folder, since it must outlive a failed build.
    log = bundle.folder / f"{name.replace('/', '-')}.{target.name}.log"
    try:
        built = build_engine(
            bundle.folder / ONNX / onnx,
            folder / f"{name}.engine",
            dims={},
            shape_inputs={"num_keep": values["num_keep"].repeated(stages)} if name == "llm/prefill" else {},
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
    if built.weight_copies:
        raise CapaError(
            f"{onnx}: the engine would copy weights at every run ({built.weight_copies[0]}); "
            "this is a defect of the graph, please report it",
            ExitCode.ENGINE,
        )
    return built


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
        "runtime": built.runtime_version,
        "warnings": list(built.warnings),
    }


def has_engines(bundle: Bundle, target: Target, weights: str) -> bool:
    """Whether a build for this target has been through, with weights in the same place."""
    record = bundle.manifest["stages"].get(f"engine/{target.name}")
    return record is not None and record["result"]["weights"] == weights


def bundle_dims(bundle: Bundle) -> ModelDims[Any]:
    """The dimensions of a bundle's model."""
    path = bundle.folder / ONNX / "llm" / "config.json"
    family = load_family(recipe_of(bundle.manifest, bundle.folder).family)
    return family.model_dims(json.loads(path.read_text(encoding="utf-8")), where=str(path))


def _check_room(bundle: Bundle, weights: Literal["embedded", "external"]) -> None:
    """Refuse engines that memory or disk has no room for."""
    dims = bundle_dims(bundle)
    precision = bundle.stage("export")["result"]["precision"]
    check_engine_memory(dims, precision, weights)
    if weights == "embedded":
        check_engine_disk(dims, precision, bundle.folder)
