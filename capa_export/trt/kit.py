"""A kit: all that builds a bundle's engines on the device itself, with nothing but its own TensorRT and compiler."""

import json
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir

import capa_export
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.machine import available_memory
from capa_export.base.progress import Report, silent
from capa_export.bundle.store import MANIFEST, Bundle, digest_of, file_digest
from capa_export.config.plugins import PluginWish, choose_device_plugins
from capa_export.config.target import Engine, Target, version_parts
from capa_export.config.weights import Weights
from capa_export.graph.contract import NUM_KEEP
from capa_export.job import ONNX, say
from capa_export.kernels.plugins.alias import ensure_parser_library
from capa_export.passes.for_tensorrt import Prepared, prepare
from capa_export.passes.lower import NATIVE
from capa_export.plan.device_memory import onnx_runtime_bytes
from capa_export.run.bundled import bundled_dims
from capa_export.trt import builder
from capa_export.trt.engine import input_shapes, parse_layers, weight_copies, weight_entries
from capa_export.trt.golden import write_golden
from capa_export.trt.stage import GRAPHS, refuse_copies

__all__ = ["build_kit", "write_kit"]

_VERSION = 1
_BUILDER = {
    "trt/builder.py": "builder.py",
    "trt/worker.py": "engine_worker.py",
    "kernels/plugins/alias.py": "parser_library.py",
}

_SCRIPT = """#!/bin/sh
# Builds the engines of this kit on its device: compiles the plugins, then runs TensorRT. ./build.sh --help says more.
exec "${PYTHON:-python3}" "$(dirname "$0")/builder.py" "$@"
"""

_README = """# Engines for {target}, to be built on the device

This folder builds the TensorRT engines of one model on {target} (compute capability {capability}{jetpack}). It needs
TensorRT {version_min} or later, below {version_below}, with its Python module and ONNX parser{compiler}. It needs no
pip, no network and no CUDA toolkit.

    ./build.sh

First it checks that this is the device, that TensorRT is one it knows, and that no file has changed; whatever is
wrong is said in one line, with exit code 5, before anything is built. `./build.sh --check` stops there.

| file | what it is |
|---|---|
| `build.sh`, `builder.py`, `engine_worker.py`, `parser_library.py` | what builds; Python's standard library alone |
| `kit.json` | device, versions, limits of every input, SHA-256 of every file |
| `onnx/` | the graphs, and their weights. `*.lowered.onnx` are for TensorRT before {native} |
| `plugins/` | sources of the plugin library, kernels included, if the engines have plugins |
| `golden/` | what the graphs make of one prompt: vision, prefill and two steps of decode, if it is there |
| `visual/visual.engine`, `llm/prefill.engine`, `llm/decode.engine` | what it makes, with a log each |

The engines are for precision {precision}; their weights are {weights}. {plugins}

{golden}## To try it elsewhere

    ./build.sh --runtime tensorrt_rtx --compute-capability 8.6 --out /tmp/trial [--tensorrt-include DIR] [--lowered]

builds with TensorRT-RTX, which needs no GPU, to show that the kit is whole. Those engines are not for the device.
`PYTHON` names the interpreter, such as that of a virtual environment; DIR holds the headers of any TensorRT from 10.3.
"""


_GOLDEN = """## The golden

`golden/golden.json` lists runs in their order: the graph, its inputs and its outputs, as names of tensors in
`golden/golden.safetensors`. Inputs called `past_key_values.*` are left out: they are what the run before returned as
`present.*`. `kept_positions.*` must be equal; the rest is as close as the precision lets it be. Tensors of bf16 graphs
are stored in FP32.

"""


def write_kit(
    bundle: Bundle,
    target: Target,
    folder: Path,
    *,
    weights: Weights = "embedded",
    plugins: PluginWish = "auto",
    report: Report = silent,
) -> dict[str, str]:
    """Write the kit of a bundle for a target; large files are links to the bundle's.

    Args:
        bundle: with its ONNX files.
        target: a device that builds for itself.
        folder: the kit, which must not exist yet; nothing is left of one that is not finished.
        weights: whether the large weights are in the engines, or inputs of the networks.
        plugins: what computes the CAPA nodes.
        report: progress.

    Returns:
        SHA-256 of every file, by its name in the kit.

    Raises:
        CapaError: the target does not build on the device, or does not take the bundle's precision or the plugins.
    """
    settings = target.require_engine()
    if settings.built != "on-device":
        raise CapaError(f"target {target.name} is built here: it takes no kit", ExitCode.USAGE)
    export = bundle.stage("export")
    precision = export["result"]["precision"]
    target.require_precision(precision)
    dims = bundled_dims(bundle)
    native = choose_device_plugins(plugins, precision, dims.decoder).kind == "native"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".kit-") as scratch:
        kit = Path(scratch) / "kit"
        kit.mkdir()
        report("kit: graphs", 0, 3)
        known = _write_graphs(bundle, kit)
        engines = {
            name: _engine(bundle, target, kit, onnx, name, weights=weights, native=native)
            for onnx, name in GRAPHS.items()
        }
        if native:
            report("kit: plugins", 1, 3)
            _write_plugins(kit / "plugins", settings)
        has_golden = onnx_runtime_bytes(dims) <= available_memory()
        if has_golden:
            report("kit: golden", 2, 3)
            (kit / "golden").mkdir()
            write_golden(kit / "golden", bundle)
        else:
            needed, free = onnx_runtime_bytes(dims) / 1e9, available_memory() / 1e9
            say(f"{'':<14}no golden: running the graphs takes {needed:.1f} GB of memory, {free:.1f} GB are free")
        _write_builder(kit, target.name, settings, precision, weights, native=native, golden=has_golden)
        files = sorted(path for path in kit.rglob("*") if path.is_file())
        digests = {name: known.get(name) or file_digest(kit / name) for name in _names(files, kit)}
        manifest = {
            "version": _VERSION,
            "tool": f"capa-export {capa_export.__version__}",
            "target": target.name,
            "precision": precision,
            "weights": weights,
            "plugins": "native" if native else "none",
            "compute_capability": settings.compute_capabilities[0],
            "lowered_below": ".".join(map(str, NATIVE)),
            **settings.model_dump(include={"runtime", "version_min", "version_below", "jetpack", "cpu"}),
            "engines": engines,
            "files": digests,
        }
        text = json.dumps({**manifest, "digest": digest_of(manifest)}, indent=1) + "\n"
        (kit / builder.KIT).write_text(text, encoding="utf-8")
        digests[builder.KIT] = file_digest(kit / builder.KIT)
        kit.rename(folder)
    return digests


def _names(files: list[Path], kit: Path) -> list[str]:
    return [path.relative_to(kit).as_posix() for path in files]


def _write_graphs(bundle: Bundle, kit: Path) -> dict[str, str]:
    """Link the weights into the kit; returns the SHA-256 of those where the bundle has it."""
    export = bundle.stage("export")
    links = {name: entry["sha256"] for name, entry in export.get("linked", {}).items()}
    recorded: dict[str, str | None] = {**export["files"], **links}
    locations = {
        (Path(onnx).parent / value.const_value.location).as_posix()
        for onnx in GRAPHS
        for value in ir.load(bundle.folder / ONNX / onnx).graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    known: dict[str, str] = {}
    for location in sorted(locations):
        name = f"{ONNX}/{location}"
        _link(bundle.folder / name, kit / name)
        if sha256 := recorded.get(name):
            known[name] = sha256
    return known


def _link(file: Path, place: Path) -> None:
    """A second name for the file; a copy where the disk has no such thing."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file.resolve(), place)
    except OSError:
        shutil.copyfile(file, place)


def _engine(
    bundle: Bundle,
    target: Target,
    kit: Path,
    onnx: str,
    name: str,
    *,
    weights: Weights,
    native: bool,
) -> dict[str, Any]:
    """Write the graph for newer and for older TensorRT; returns what the builder has to know."""
    settings = target.require_engine()
    source, place = bundle.folder / ONNX / onnx, kit / ONNX / onnx
    stages = len(bundle.manifest["recipe"]["prune"]["schedule"])
    values = {NUM_KEEP: settings.values[NUM_KEEP].repeated(stages)} if name == "llm/prefill" else {}
    options: dict[str, Any] = {"external_weights": weights == "external", "plugins": native}
    prepared = prepare(source, place, **options)
    lowered = place.with_suffix(".lowered.onnx")
    older = prepare(source, lowered, **options, version=version_parts(settings.version_min))
    assert older == prepared, "the same weights serve both"
    if weights == "external":
        _write_weights(kit, place, name, prepared)
    return {
        "onnx": f"{ONNX}/{onnx}",
        "lowered": lowered.relative_to(kit).as_posix(),
        "plugins": prepared.num_plugins,
        "shapes": input_shapes(source, {}, values, target),
        "shape_inputs": {key: [limits.min, limits.opt, limits.max] for key, limits in values.items()},
    }


def _write_weights(kit: Path, onnx: Path, name: str, prepared: Prepared) -> None:
    path = kit / f"{name}.weights.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = weight_entries(onnx, path.parent, prepared.weights)
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def _write_plugins(folder: Path, settings: Engine) -> None:
    from capa_export.kernels.plugins.native import write_sources

    write_sources(folder, settings.compute_capabilities)


def _write_builder(
    kit: Path, target: str, settings: Engine, precision: str, weights: str, *, native: bool, golden: bool
) -> None:
    for source, name in _BUILDER.items():
        shutil.copyfile(Path(__file__).parents[1] / source, kit / name)
    script = kit / "build.sh"
    script.write_text(_SCRIPT, encoding="utf-8")
    script.chmod(0o755)
    readme = _README.format(
        target=target,
        capability=settings.compute_capabilities[0],
        jetpack=f", JetPack {settings.jetpack}" if settings.jetpack else "",
        version_min=settings.version_min,
        version_below=settings.version_below,
        compiler=", its headers, and g++" if native else "",
        native=".".join(map(str, NATIVE)),
        golden=_GOLDEN if golden else "",
        precision=precision,
        weights="in the engines" if weights == "embedded" else "inputs: `*.weights.json` says where their bytes lie",
        plugins=(
            "The CAPA nodes are plugins; the library is in the engines, and beside them as `libcapa_plugins.so`."
            if native
            else "They have no plugins: TensorRT's own layers compute the CAPA nodes."
        ),
    )
    (kit / "README.md").write_text(readme, encoding="utf-8")


def build_kit(
    kit: Path,
    *,
    tensorrt_include: Path | None = None,
    runtime: str | None = None,
    compute_capability: str | None = None,
    lowered: bool = False,
    out: Path | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Build the engines of a kit as its own `build.sh` does, and look through them for copies of weights.

    Args:
        kit: the folder.
        tensorrt_include: folder of TensorRT's headers; None looks where packages put them.
        runtime: in a trial, the module to build with; the device is then not looked at.
        compute_capability: in a trial, the GPU to build for.
        lowered: in a trial, whether to take the graphs for older TensorRT.
        out: in a trial, where the engines go.
        report: progress.

    Returns:
        What the manifest of a bundle says of engines built here: where weights are, and what each engine took.

    Raises:
        CapaError: this is not the device, a file or TensorRT is missing or another, or TensorRT refused.
    """
    done = 0

    def tell(line: str) -> None:
        nonlocal done
        report(line, done, done + 1)
        done += 1

    with tempfile.TemporaryDirectory() as links:
        environment = ensure_parser_library(Path(links)) if runtime == "tensorrt_rtx" else {}
        try:
            built = builder.build(
                kit,
                tensorrt_include=tensorrt_include,
                runtime=runtime,
                compute_capability=compute_capability,
                lowered=lowered,
                out=out,
                environment=environment,
                say=tell,
            )
        except builder.KitError as error:
            raise CapaError(str(error), ExitCode.ENGINE) from error
    manifest = json.loads((kit / builder.KIT).read_text(encoding="utf-8"))
    engines = {
        name: _entry(manifest["engines"][name]["onnx"], result, (out or kit) / name, kit / f"{name}.weights.json")
        for name, result in built.items()
    }
    result = {
        "runtime": (runtime or manifest["runtime"]).replace("_", "-"),
        "compute_capabilities": [compute_capability or manifest["compute_capability"]],
        "weights": manifest["weights"],
        "plugins": {"kind": manifest["plugins"]},
        "engines": engines,
    }
    if out is None:
        _note(kit, result)
    return result


def _note(kit: Path, result: dict[str, Any]) -> None:
    """Tell the bundle that a kit lies in, if it does, what was built: its engines can then be run from there."""
    folder = kit.resolve().parents[1]
    if not (folder / MANIFEST).is_file():
        return
    bundle = Bundle.open(folder)
    stages, stage = bundle.manifest["stages"], f"engine/{kit.resolve().name}"
    if "kit" in stages.get(stage, {}).get("result", {}):
        built = [kit / f"{name}.engine" for name in result["engines"]]
        stages[stage]["result"] |= result
        stages[stage]["files"] |= {
            f"{stages[stage]['result']['kit']}/{path.relative_to(kit).as_posix()}": file_digest(path) for path in built
        }
        bundle.update(stages=stages)


def _entry(onnx: str, result: dict[str, Any], engine: Path, weights: Path) -> dict[str, Any]:
    """Turn what TensorRT said of an engine's layers into a table; returns what there is to say of the engine."""
    text = engine.with_suffix(".layers.txt")
    layers = parse_layers(text.read_text(encoding="utf-8"))
    text.unlink()
    table = json.dumps([asdict(layer) for layer in layers], indent=1) + "\n"
    engine.with_suffix(".layers.json").write_text(table, encoding="utf-8")
    inputs = set(json.loads(weights.read_text(encoding="utf-8"))) if weights.exists() else set[str]()
    copies = weight_copies(layers, inputs)
    refuse_copies(str(engine), [layer.name for layer in copies])
    types = Counter(layer.type for layer in layers)
    return {
        "onnx": onnx,
        "bytes": result["bytes"],
        "seconds": result["seconds"],
        "peak_memory_bytes": result["peak_rss_bytes"],
        "layers": len(layers),
        "layers_by_type": dict(sorted(types.items())),
        "custom_layers": types["custom_layer"],
        "weight_copies": len(copies),
        "runtime": result["version"],
        "warnings": result["warnings"],
    }
