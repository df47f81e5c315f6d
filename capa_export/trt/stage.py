"""The engine stage: a bundle's engines, or the kit that builds them on the device, and its build there."""

import os
import platform
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import count
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from capa_export.base.code import versions
from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError, ExitCode, how_to_install
from capa_export.base.progress import Report, say, silent
from capa_export.bundle.confined import confined, references
from capa_export.bundle.replacement import SCRATCH
from capa_export.bundle.store import MANIFEST, ONNX, Bundle, file_digest, files_under, run_stage
from capa_export.config.options import BuildOptions
from capa_export.config.pixels import PixelBounds
from capa_export.config.plugins import PluginWish, choose_device_plugins, choose_plugins
from capa_export.config.target import Target
from capa_export.config.weights import Weights, WeightsWish
from capa_export.plan.device_memory import choose_weights, say_weights
from capa_export.plan.plan import check_engine_disk, check_engine_memory
from capa_export.run.bundled import bundled_dims
from capa_export.trt import builder
from capa_export.trt.engines import CHECKER, WORKER, build_graphs, building_environment, read_engines
from capa_export.trt.graphs import GRAPHS, JOINED
from capa_export.trt.kit import write_kit
from capa_export.trt.kit_device import check_device, check_version, read_version
from capa_export.trt.kit_file import KitError, read_kit
from capa_export.trt.kit_switch import places

__all__ = ["build_engines", "build_kit", "check_engines", "check_runtime", "home_of"]

_ENGINE_CODE = ("capa_export.trt.engines",)
"""Modules whose code engines depend on."""
_KIT_CODE = (
    "capa_export.trt.kit",
    "capa_export.trt.worker",
    "capa_export.trt.golden_run",
    "capa_export.trt.kit_inputs",
    "capa_export.kernels.plugins.alias",
)
"""Modules whose code a kit depends on: that which writes it, and that which is in it."""


def check_runtime(target: Target, instead: str = "") -> None:
    """Refuse a target whose builder is not installed, before anything is run; `instead` ends the message."""
    if target.engine is None:
        return
    engine = target.require_engine()
    runtime = engine.runtime
    if engine.built == "with-gpu":
        _require_own_gpu(target)
    if engine.built == "here" and find_spec(runtime.replace("-", "_")) is None:
        raise CapaError(
            f"target {target.name} needs {runtime}, which is not installed: {how_to_install('rtx')}{instead}",
            ExitCode.ENGINE,
        )


def _require_own_gpu(target: Target) -> str:
    """The version of TensorRT here.

    Raises:
        CapaError: it is missing or another than the target takes, or this is not the target's GPU.
    """
    engine = target.require_engine()
    spec = {"target": target.name, **engine.model_dump(mode="json")}
    try:
        check_device(spec)
        if find_spec(engine.runtime) is None:
            raise KitError(f"{engine.runtime} is not installed: {how_to_install('tensorrt')}")
        check_version(spec, have := read_version(engine.runtime, os.environ))
    except KitError as error:
        raise CapaError(
            f"engines for {target.name} are built where its GPU and TensorRT are: {error}; or write a kit for such a "
            "machine with --kit",
            ExitCode.ENGINE,
        ) from error
    return have


def check_engines(dims: ModelDims[Any], target: Target, options: BuildOptions) -> None:
    """Refuse, before anything is run, engines that could not be built.

    Raises:
        CapaError: their plugins cannot be had, or the device does not take such weights.
    """
    if target.engine is None:
        return
    target.require_packed_weights(dims.packings)
    _refuse_library(target, options.plugin_library)
    if target.engine.built != "here":
        here = target.engine.built == "with-gpu"
        choose_device_plugins(options.plugins, options.precision, dims.decoder, python=here)
    else:
        choose_plugins(options.plugins, options.precision, dims.decoder, options.plugin_library)


def _refuse_library(target: Target, library: Path | None) -> None:
    """Raise where an engine would hold a library that its device cannot load."""
    engine = target.require_engine()
    if library is None:
        return
    if engine.built != "here":
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
    precision, dims = bundle.said("export", "precision"), bundled_dims(bundle)
    target.require_packed_weights(dims.packings)
    where, reason = choose_weights(dims, precision, weights, target)
    if engine.built == "on-device":
        result = _write_kit(bundle, target, where, plugins, report)
    elif engine.built == "with-gpu":
        result = _build_with_gpu(bundle, target, where, plugins, report)
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
    precision = bundle.said("export", "precision")
    target.require_precision(precision)
    chosen = choose_plugins(plugins, precision, bundled_dims(bundle).decoder, plugin_library)
    if not _has_engines(bundle, target, weights):
        # Before the weights are read, which takes as long as they are large.
        check_runtime(target)
        _check_room(bundle, weights)
    bundle.verify("export")
    folder = f"engines/{target.name}"
    record = {"kind": chosen.kind, "library_sha256": file_digest(chosen.library) if chosen.library else None}
    made_by = versions("tensorrt-rtx", code_of=_ENGINE_CODE)
    key = [made_by, target.model_dump(mode="json"), weights, bundle.digest("export"), record]

    def work(scratch: Path) -> dict[str, Any]:
        _check_room(bundle, weights)
        built = count()
        # Outside the scratch folder, since it must outlive a failed build.
        graphs = JOINED if weights == "joined" else GRAPHS
        logs = {
            name: confined(bundle.folder, f"{name.replace('/', '-')}.{target.name}.log") for name in graphs.values()
        }
        engines = build_graphs(
            bundle.folder / ONNX,
            graphs,
            scratch / folder,
            target,
            weights=weights,
            plugins=chosen,
            home=bundle.folder / folder,
            logs=logs,
            say=lambda _: report(f"engines for {target.name}", next(built), len(logs)),
        )
        settings = target.require_engine().model_dump(include={"runtime", "compute_capabilities"}, mode="json")
        seen = _largest_pictures(target)
        return {**settings, "weights": weights, "plugins": record, "pictures": seen, "engines": engines}

    result = run_stage(bundle, f"engine/{target.name}", key, [folder], work)
    if chosen.reason:
        say(f"{'':<14}no plugins: {chosen.reason}")
    return result


def _build_with_gpu(
    bundle: Bundle, target: Target, weights: Weights, plugins: PluginWish, report: Report
) -> dict[str, Any]:
    """Write the kit, and build it in the bundle; its golden run is held to the gates."""
    have = _require_own_gpu(target)
    result = _write_kit(bundle, target, weights, plugins, report)
    if not result["engines"] or {one["runtime"] for one in result["engines"].values()} != {have}:
        _check_room(bundle, weights)
        build_kit(bundle.folder / result["kit"], home=bundle, python_plugins=True, report=report)
    return bundle.stage(f"engine/{target.name}")["result"]


def _write_kit(bundle: Bundle, target: Target, weights: Weights, plugins: PluginWish, report: Report) -> dict[str, Any]:
    from capa_export.kernels.plugins.native import digest_sources

    bundle.verify("export")
    folder = f"engines/{target.name}"
    settings = target.model_dump(mode="json")
    made_by = [versions("triton", code_of=_KIT_CODE), digest_sources()]
    key = [made_by, settings, weights, bundle.digest("export"), plugins, find_spec("triton") is None]

    def work(scratch: Path) -> dict[str, Any]:
        digests = write_kit(bundle, target, scratch / folder, weights=weights, plugins=plugins, report=report)
        sha256 = {f"{folder}/{name}": digest for name, digest in digests.items()}
        seen = _largest_pictures(target)
        built = target.require_engine().built
        return {"kit": folder, "built": built, "weights": weights, "pictures": seen, "engines": {}, "sha256": sha256}

    return run_stage(bundle, f"engine/{target.name}", key, [folder], work)


def _largest_pictures(target: Target) -> dict[str, int]:
    """What the target's engines take; a bundle may have been exported for another's."""
    return PixelBounds().on_target(target).model_dump(exclude_none=True)


def build_kit(
    kit: Path,
    *,
    tensorrt_include: Path | None = None,
    runtime: str | None = None,
    compute_capability: str | None = None,
    lowered: bool = False,
    out: Path | None = None,
    home: Bundle | None = None,
    python_plugins: bool = False,
    report: Report = silent,
) -> dict[str, Any]:
    """Build the engines of a kit as its own `build.sh` does, and look through them for copies of weights.

    Nothing that the kit brings is run, whoever wrote it: builder, worker and sources of plugins are those of this
    package.

    Args:
        kit: the folder.
        tensorrt_include: folder of TensorRT's headers; None looks where packages put them.
        runtime: in a trial, the module to build with; the device is then not looked at.
        compute_capability: in a trial, the GPU to build for.
        lowered: in a trial, whether to take the graphs for older TensorRT.
        out: in a trial, where the engines go.
        home: the bundle that the kit lies in, if it is known.
        python_plugins: whether it may ask for those of Python, as a kit that was not written to be sent.
        report: progress.

    Returns:
        What the manifest of a bundle says of engines built here: where weights are, and what each engine took.

    Raises:
        CapaError: this is not the device, a file or TensorRT is missing or another, the kit reads what is not in it,
            the bundle that it lies in is signed, or TensorRT refused.
    """
    from capa_export.kernels.plugins.native import write_sources

    spec = _read_kit(kit)
    home = None if out is not None else home or home_of(kit)
    if home is not None:
        home.require_unsigned()
    done = count()

    def tell(line: str) -> None:
        step = next(done)
        report(line, step, step + 1)

    name = kit.resolve().relative_to(home.folder.resolve()).as_posix() if home is not None else ""
    with nullcontext() if home is None else home.scratch(name) as scratch, building_environment() as environment:
        built = builder.build(
            kit,
            tensorrt_include=tensorrt_include,
            runtime=runtime,
            compute_capability=compute_capability,
            lowered=lowered,
            out=out,
            place=scratch and scratch / name,
            worker=WORKER,
            checker=CHECKER,
            write_plugins=write_sources,
            python_plugins=python_plugins,
            environment=environment,
            say=tell,
        )
        engines = read_engines(built, kit)
        result = {
            "runtime": (runtime or spec["runtime"]).replace("_", "-"),
            "compute_capabilities": [compute_capability] if compute_capability else spec["compute_capabilities"],
            "weights": spec["weights"],
            "plugins": {"kind": spec["plugins"]},
            "engines": engines,
        }
        if home is not None and scratch is not None:
            _record(home, name, result)
    return result


def home_of(kit: Path, verify_key: Path | None = None) -> Bundle | None:
    """The bundle that a kit lies in, if it does and lists it.

    Args:
        kit: the folder.
        verify_key: file of the public key that must have signed the bundle.

    Raises:
        CapaError: the bundle is damaged, or not signed with that key.
    """
    folder = kit.resolve().parent.parent
    if not (folder / MANIFEST).is_file():
        return None
    bundle = Bundle.open(folder, verify_key=verify_key)
    stage = bundle.manifest["stages"].get(f"engine/{kit.resolve().name}", {})
    return bundle if "kit" in stage.get("result", {}) else None


def _read_kit(kit: Path) -> dict[str, Any]:
    """What a kit says; what its graphs and tables read is in it.

    Raises:
        CapaError: there is no kit, or it is damaged, or reads other files.
    """
    try:
        spec = read_kit(kit)
    except KitError as error:
        raise CapaError(str(error), ExitCode.ENGINE) from error
    for name in spec["files"]:
        # The builder says of a pipe that it is missing; to open it would be to wait for ever.
        for read in references(kit / name) if (kit / name).is_file() else ():
            if normpath(PurePosixPath(name).parent / read) not in spec["files"]:
                raise CapaError(f"{kit / name}: reads {read}, which is no file of this kit", ExitCode.ENGINE)
    return spec


def _record(home: Bundle, kit: str, result: dict[str, Any]) -> None:
    """Put what was built into a kit of a bundle, which says so from then on: its engines can be run from there."""
    stages, scratch = home.manifest["stages"], home.folder / SCRATCH
    stage = stages[f"engine/{PurePosixPath(kit).name}"]
    stage["result"] |= result
    made = files_under(scratch, kit)
    stage["files"] |= {name: file_digest(scratch / name) for name in made if name.endswith(".engine")}
    home.replace(made, drops={f"{kit}/{name}" for name in places(result["engines"])}.difference(made), stages=stages)


def _has_engines(bundle: Bundle, target: Target, weights: str) -> bool:
    """Whether a build for this target has been through, with weights in the same place."""
    stage = f"engine/{target.name}"
    return stage in bundle.manifest["stages"] and bundle.said(stage, "weights") == weights


def _check_room(bundle: Bundle, weights: Weights) -> None:
    """Refuse engines that memory or disk has no room for."""
    dims = bundled_dims(bundle)
    precision = bundle.said("export", "precision")
    check_engine_memory(dims, precision, weights)
    check_engine_disk(dims, precision, weights, bundle.folder)
