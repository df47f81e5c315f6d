"""Writes kits: folders with all that builds a bundle's engines on its device."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.machine import available_memory
from capa_export.base.progress import Report, say, silent
from capa_export.bundle.store import ONNX, Bundle, file_digest
from capa_export.config.plugins import PluginKind, PluginWish, choose_device_plugins
from capa_export.config.target import Engine, Target, version_parts
from capa_export.config.weights import Weights
from capa_export.passes.for_tensorrt import prepare
from capa_export.passes.lower import NATIVE
from capa_export.plan.device_memory import onnx_runtime_bytes
from capa_export.run.bundled import bundled_dims
from capa_export.trt.builder import CHECKER, SWITCHES, WORKER
from capa_export.trt.golden import golden_bounds, run_golden, write_golden
from capa_export.trt.graphs import GRAPHS, JOINED, find_profiles, served_graphs, write_manifest, write_weights
from capa_export.trt.kit_file import KIT
from capa_export.trt.kit_switch import UNCHECKED
from capa_export.trt.polygraphy import INPUTS, POLYGRAPHY, PolygraphyKit, write_polygraphy

__all__ = ["write_kit"]

_BUILDER = {
    "trt/builder.py": "builder.py",
    "base/parent.py": "parent.py",
    "trt/kit_file.py": "kit_file.py",
    "trt/kit_device.py": "kit_device.py",
    "trt/kit_switch.py": "kit_switch.py",
    "trt/worker.py": WORKER,
    "trt/golden_run.py": CHECKER,
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
| `build.sh` and what ends in `.py` | what builds; Python's standard library alone |
| `kit.json` | device, versions, limits of every input, SHA-256 of every file |
| `onnx/` | the graphs, and their weights. `*.lowered.onnx` are for TensorRT before {native} |
| `plugins/` | sources of the plugin library, kernels included, if the engines have plugins |
| `golden/` | what the graphs make of one prompt: vision, prefill and two steps of decode, if it is there |
| {engines} | what it makes, with a log each |

The engines are for precision {precision}; their weights are {weights}. {plugins}

{golden}## Switches against wrong code

From 10.13 on TensorRT fuses FP16 products that share an input, and for one prompt at a time the result is wrong
(NVIDIA/TensorRT-Edge-LLM issues 40, 105, 151 and 185). The build turns that off by the environment variable
`{variable}` and says so. A variable that is set is left as it is: `{variable}='SWITCHES' ./build.sh` tries others.

To see whether a later version has it mended, build once with the variable set and empty, `{variable}= ./build.sh`,
{mended}

## To try it elsewhere

    ./build.sh --runtime tensorrt_rtx --compute-capability 8.6 --out /tmp/trial [--tensorrt-include DIR] [--lowered]

builds with TensorRT-RTX, which needs no GPU, to show that the kit is whole. Those engines are not for the device.
`PYTHON` names the interpreter, such as that of a virtual environment; DIR holds the headers of TensorRT 11
or later, or of TensorRT-RTX.
"""


_MENDED = """and see the golden run pass: then the switches are needed no more. If it fails, the engines that were there
before are there still."""

_UNKNOWN = "and see whether the engines answer as the bundle does: this kit has no golden to tell."

_GOLDEN = """## The golden run

Before an engine gets its name, all of them are run on what is in `golden/`. Logits and features must lie as close to
those of the golden as the gates of the bundle's recipe ask of every prompt: logits by {logits}, features
by {hidden}. The same token must come first, unless two tie, and one in {share} of the kept
positions may be another. `kit.json` has these bounds. Where one fails, `build.sh` ends with exit code 5 and names
engine and output; the engines stay as `NAME{unchecked}`, and what was there before is there still. Then

1. build with other switches, as below: what is far off, or NaN, is most likely wrong code;
2. build with another TensorRT of the range;
3. where the bundle is, `capa-export validate BUNDLE --bisect` says whether the graphs themselves are at fault, and
   which part should be in FP32.

`golden/golden.json` lists runs in their order: the graph, its inputs and its outputs, as names of tensors in
`golden/golden.safetensors`. Inputs called `past_key_values.*` are left out: they are what the runs before returned as
`present.*`, all of a prompt's rows of prefill and one row of a step. Decode takes them one behind the other at the
start of blocks of 256 rows, of which `past_lengths` count; what stands in the others is any finite number. Tensors of
bf16 graphs are stored in FP32. {polygraphy}

"""


_WEIGHTS: Mapping[Weights, str] = {
    "embedded": "in the engines",
    "joined": "in the engines, those of the decoder once, in one that is prefill and decode",
    "external": "inputs: `*.weights.json` says where their bytes lie",
}
_PLUGINS = {
    "native": "The CAPA nodes are plugins; the library is in the engines, and beside them as `libcapa_plugins.so`.",
    "python": "The CAPA nodes are plugins in Python: capa-export builds and runs these engines, `build.sh` does not.",
    "none": "They have no plugins: TensorRT's own layers compute the CAPA nodes.",
}
_FOR_POLYGRAPHY = "`golden/polygraphy/` has them for Polygraphy, with\nits commands."
_NO_BF16 = "Polygraphy takes none of\nthem: its arrays are NumPy's, which have no bf16."


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
    if settings.built == "here":
        raise CapaError(f"target {target.name} is built here: it takes no kit", ExitCode.USAGE)
    export = bundle.stage("export")
    precision = export["result"]["precision"]
    target.require_precision(precision)
    dims = bundled_dims(bundle)
    here = settings.built == "with-gpu"
    kind = choose_device_plugins(plugins, precision, dims.decoder, python=here).kind
    native = kind == "native"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".kit-") as scratch:
        kit = Path(scratch) / "kit"
        kit.mkdir()
        report("kit: graphs", 0, 3)
        known = _link_weights(bundle, kit)
        engines = {
            name: _engine(bundle, target, kit, served, name, weights=weights, plugins=kind != "none")
            for name, served in served_graphs(JOINED if weights == "joined" else GRAPHS).items()
        }
        if native:
            report("kit: plugins", 1, 3)
            _write_plugins(kit / "plugins", settings)
        bounds: dict[str, Any] | None = None
        needed, free = onnx_runtime_bytes(dims, exact=True), available_memory()
        if needed <= free:
            report("kit: golden", 2, 3)
            (kit / "golden").mkdir()
            runs, bounds = run_golden(bundle), golden_bounds(bundle)
            write_golden(kit / "golden", runs)
            if precision != "bf16":
                external = weights == "external"
                about = PolygraphyKit(
                    engines=engines, external=external, plugins=kind != "none", native=".".join(map(str, NATIVE))
                )
                write_polygraphy(kit / "golden" / POLYGRAPHY, runs, bounds, about)
                if external:
                    shutil.copyfile(Path(__file__).with_name(INPUTS), kit / "golden" / POLYGRAPHY / INPUTS)
        else:
            told = f"{needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
            say(f"{'':<14}no golden: running the graphs takes {told}")
        _write_builder(kit, target.name, settings, precision, weights, kind, engines, bounds)
        files = sorted(path for path in kit.rglob("*") if path.is_file())
        digests = {name: known.get(name) or file_digest(kit / name) for name in _names(files, kit)}
        write_manifest(
            kit,
            target,
            precision=precision,
            weights=weights,
            plugins=kind,
            lowered_below=".".join(map(str, NATIVE)),
            **settings.model_dump(include={"jetpack", "cpu"}),
            engines=engines,
            files=digests,
            golden=bounds,
        )
        digests[KIT] = file_digest(kit / KIT)
        kit.rename(folder)
    return digests


def _names(files: list[Path], kit: Path) -> list[str]:
    return [path.relative_to(kit).as_posix() for path in files]


def _link_weights(bundle: Bundle, kit: Path) -> dict[str, str]:
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
    served: Sequence[str],
    name: str,
    *,
    weights: Weights,
    plugins: bool,
) -> dict[str, Any]:
    """Write the graph for newer and for older TensorRT; returns what the builder has to know."""
    onnx = served[0]
    source, place = bundle.folder / ONNX / onnx, kit / ONNX / onnx
    options: dict[str, Any] = {
        "external_weights": weights == "external",
        "plugins": plugins,
        "joined": len(served) > 1,
    }
    prepared = prepare(source, place, **options)
    lowered = place.with_suffix(".lowered.onnx")
    older = prepare(source, lowered, **options, version=version_parts(target.require_engine().version_min))
    assert older == prepared, "the same weights serve both"
    if weights == "external":
        write_weights(kit / f"{name}.weights.json", place, kit / name, prepared.weights)
    return {
        "onnx": f"{ONNX}/{onnx}",
        "lowered": lowered.relative_to(kit).as_posix(),
        "capa_nodes": prepared.num_nodes,
        "plugins": prepared.num_plugins,
        "profiles": find_profiles(bundle.folder / ONNX, served, target),
    }


def _write_plugins(folder: Path, settings: Engine) -> None:
    from capa_export.kernels.plugins.native import write_sources

    write_sources(folder, settings.compute_capabilities)


def _write_builder(
    kit: Path,
    target: str,
    settings: Engine,
    precision: str,
    weights: Weights,
    plugins: PluginKind,
    engines: Iterable[str],
    bounds: Mapping[str, Any] | None,
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
        compiler=", its headers, and g++" if plugins == "native" else "",
        native=".".join(map(str, NATIVE)),
        golden=_golden_text(bounds, bf16=precision == "bf16") if bounds else "",
        mended=_MENDED if bounds else _UNKNOWN,
        variable=SWITCHES,
        precision=precision,
        weights=_WEIGHTS[weights],
        plugins=_PLUGINS[plugins],
        engines=", ".join(f"`{name}.engine`" for name in engines),
    )
    (kit / "README.md").write_text(readme, encoding="utf-8")


def _golden_text(bounds: Mapping[str, Any], *, bf16: bool) -> str:
    close = {
        part: f"a cosine of {bounds[part]['cosine']:g} and a norm within {bounds[part]['norm_ratio']:g}"
        for part in ("logits", "hidden")
    }
    return _GOLDEN.format(
        unchecked=UNCHECKED, share=round(1 / bounds["share"]), polygraphy=_NO_BF16 if bf16 else _FOR_POLYGRAPHY, **close
    )
