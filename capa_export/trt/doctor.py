"""Looks, before anything is built or run, for all that would fail late."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import onnx_ir as ir

from capa_export.base.errors import CapaError, how_to_install
from capa_export.base.precision import FORMATS
from capa_export.bundle.store import ONNX, Bundle
from capa_export.config.target import Engine, Target, version_parts
from capa_export.graph.contract import PIXEL_VALUES
from capa_export.graph.functions import DOMAIN, PLUGIN
from capa_export.kernels.plugins.alias import ensure_parser_library
from capa_export.passes.lower import NATIVE
from capa_export.plan.device_memory import choose_weights, device_memory, devices_with_room
from capa_export.plan.flops import kv_cache
from capa_export.trt.builder import SWITCHES, switches
from capa_export.trt.graphs import GRAPHS
from capa_export.trt.kit_device import read_version
from capa_export.trt.kit_file import KitError

__all__ = ["Finding", "examine"]

TENSORRT_TOPK_LIMIT = 3840
"""The largest K of TensorRT's own TopK."""

_SWITCHED_FROM = ((10, 13), (10, 15), (11, 0))
"""Versions of TensorRT from which a kit sets other switches."""
_PICTURES = {"smallest": (8, 8), "largest": (4200, 4200), "widest": (4200, 60), "tallest": (60, 4200)}
"""Pixels: from far below to far above what any image processor lets through, and strips."""

Verdict = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look gave."""

    check: str
    verdict: Verdict
    """A note: what this machine cannot do. A warning: what will fail for some inputs. A problem: for all."""
    detail: str
    remedy: str = ""


def examine(target: Target, bundle: Bundle | None, memory: int | None = None) -> list[Finding]:
    """Everything that can be told of this machine, of a target, and of a bundle's graphs against it.

    Args:
        target: the device.
        bundle: to examine too.
        memory: bytes of the device, where one of the target's is meant.

    Raises:
        CapaError: the bundle has no ONNX files, or they are not what was built.
    """
    if bundle is not None:
        bundle.verify("export", weights=False)
    found = [*_tools(target), *_kernels(target), *_gpu(target)]
    if bundle is not None:
        for graph in sorted(GRAPHS):
            found += _graph(bundle.folder / ONNX / graph, bundle.folder)
        found += [*_memory(target, bundle, memory), *_pictures(target, bundle)]
    return found


def _tools(target: Target) -> Iterator[Finding]:
    engine = target.engine
    if engine is None:
        yield Finding("runtime", "ok", f"{target.name} takes the ONNX files: no engine is built")
        return
    wanted = f">={engine.version_min},<{engine.version_below}"
    if engine.built != "here":
        if engine.built == "on-device":
            yield Finding("runtime", "ok", f"{engine.runtime} {wanted} is the device's own; build writes a kit for it")
        else:
            yield _own_runtime(engine, wanted)
        yield from _switches(engine.compute_capabilities[0], version_parts(engine.version_below))
        if version_parts(engine.version_min) < NATIVE:
            below = ".".join(map(str, NATIVE))
            yield Finding(
                "operators", "ok", f"{engine.runtime} before {below} gets lowered graphs, without bodies beside plugins"
            )
        return
    runtime = _own_runtime(engine, wanted)
    yield runtime
    if runtime.remedy:
        return
    with TemporaryDirectory() as folder:
        lacks = ensure_parser_library(Path(folder))
    yield Finding("parser", "ok", f"finds plugins{', with a link that this wheel lacks' if lacks else ''}")


def _own_runtime(engine: Engine, wanted: str) -> Finding:
    """The runtime that builds here."""
    try:
        # TensorRT comes in packages of several names, one for each CUDA, with one module.
        have = version(engine.runtime) if engine.built == "here" else read_version(engine.runtime, os.environ)
    except PackageNotFoundError:
        return Finding("runtime", "problem", f"{engine.runtime} is not installed", how_to_install("rtx"))
    except KitError:
        detail = f"{engine.runtime} is not installed: build --kit writes a kit for a machine that has {wanted}"
        return Finding("runtime", "note", detail, how_to_install("tensorrt"))
    fits = version_parts(engine.version_min) <= version_parts(have) < version_parts(engine.version_below)
    detail = f"{engine.runtime} {have}, the target takes {wanted}"
    remedy = "" if fits else f'pip install "{engine.runtime}{wanted}"'
    return Finding("runtime", "ok" if fits else "problem", detail, remedy)


def _switches(capability: str, below: tuple[int, ...]) -> Iterator[Finding]:
    """What a kit turns off in which TensorRT, since it makes wrong code there."""
    of_each = {version: switches(version, capability, one_prompt=True) for version in _SWITCHED_FROM if version < below}
    told = "; ".join(f"from {'.'.join(map(str, version))} {found}" for version, found in of_each.items())
    yield Finding("wrong code", "ok", f"the kit sets {SWITCHES} against fusions that compute wrongly: {told}")


def _kernels(target: Target) -> Iterator[Finding]:
    from capa_export.kernels.plugins.native import find_headers

    if target.engine is None:
        return
    if find_spec("triton") is None:
        yield Finding(
            "kernels",
            "note",
            "triton is not installed: no plugins",
            how_to_install("tensorrt" if target.engine.built == "with-gpu" else "rtx"),
        )
    else:
        from capa_export.kernels.compile import COMPUTE_CAPABILITIES

        wanted = target.engine.compute_capabilities
        if missing := [one for one in wanted if one not in COMPUTE_CAPABILITIES]:
            yield Finding("kernels", "note", f"no cubin for SM {', '.join(missing)}: the driver compiles the PTX there")
        else:
            yield Finding("kernels", "ok", f"cubins for SM {', '.join(wanted)}")
    if target.engine.built != "here":
        held = "the kit holds their sources; its build.sh" if target.engine.built == "on-device" else "--plugins native"
        yield Finding("native plugins", "ok", f"{held} needs TensorRT's headers and g++")
        return
    try:
        folder, tensorrt = find_headers(None, platform.machine())
    except CapaError as error:
        yield Finding("native plugins", "note", f"cannot be built here: {error}")
    else:
        yield Finding("native plugins", "ok", f"can be built here: headers of TensorRT {tensorrt} in {folder}")


def _gpu(target: Target) -> Iterator[Finding]:
    from capa_export.kernels.cuda import require_gpu

    if target.engine is None or target.engine.built == "on-device":
        return
    try:
        gpu = require_gpu()
    except CapaError as error:
        can = "built here, not run" if target.engine.built == "here" else "neither built nor run here"
        yield Finding("gpu", "note", f"engines can be {can}: {error}")
        return
    fits = gpu.compute_capability in target.engine.compute_capabilities
    yield Finding(
        "gpu",
        "ok" if fits else "note",
        f"{gpu.name}, SM {gpu.compute_capability}, {gpu.memory_bytes / 1e9:.0f} GB"
        + ("" if fits else f"; the target's engines are for SM {', '.join(target.engine.compute_capabilities)}"),
    )


def _graph(path: Path, folder: Path) -> Iterator[Finding]:
    """The traps of TensorRT's parser, in one file."""
    import onnx

    name = path.relative_to(folder).as_posix()
    model = ir.load(path)
    problems = [
        Finding(name, "problem", f"{node.name}: K is {k}, TensorRT's TopK ends at {TENSORRT_TOPK_LIMIT}")
        for node in _all_nodes(model)
        if node.op_type == "TopK" and (k := _constant(node.inputs[1])) is not None and k > TENSORRT_TOPK_LIMIT
    ]
    problems += [
        Finding(
            name,
            "warning",
            f"{node.name}: its K is known at run time only; TensorRT's TopK ends at {TENSORRT_TOPK_LIMIT}",
        )
        for node in _all_nodes(model)
        if node.op_type == "TopK" and _constant(node.inputs[1]) is None
    ]
    for function in model.functions.values():
        if onnx.defs.has(function.name):
            problems.append(
                Finding(name, "problem", f"function {function.name}: TensorRT takes the ONNX operator of that name")
            )
        problems += [
            Finding(name, "problem", f"{node.op_type} inside {function.name}: TensorRT takes no plugin there")
            for node in function
            if node.domain == DOMAIN
        ]
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    problems += [
        Finding(name, "problem", f"{node.name}: lacks {key}, so that no plugin is found", "export it again")
        for node in nodes
        for key in PLUGIN
        if key not in node.attributes
    ]
    yield from problems or [Finding(name, "ok", f"{len(nodes)} CAPA nodes, each with a plugin's name and a body")]


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _constant(value: ir.Value | None) -> int | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else int(tensor.numpy().item())


def _memory(target: Target, bundle: Bundle, memory: int | None) -> Iterator[Finding]:
    """Room for the build here; and on the device for weights, contexts and the cache of the longest prompt."""
    from capa_export.plan.plan import check_engine_memory
    from capa_export.run.bundled import bundled_dims

    if target.engine is None:
        return
    dims, precision = bundled_dims(bundle), bundle.said("export", "precision")
    stage = f"engine/{target.name}"
    built = bundle.manifest["stages"].get(stage, {}).get("result")
    weights = bundle.said(stage, "weights") if built else choose_weights(dims, precision, "auto", target, memory)[0]
    if target.engine.built == "here":
        try:
            check_engine_memory(dims, precision, weights)
        except CapaError as error:
            yield Finding("build memory", "problem", str(error))
        else:
            yield Finding("build memory", "ok", f"enough for engines with {weights} weights")
    longest, width = target.dim("sequence").max, FORMATS[precision].num_bytes
    cache = kv_cache(dims.decoder, num_visual=0, num_text=longest, schedule=[], element_bytes=width)
    held = device_memory(dims, precision, weights, target, cache, _contexts(built))
    parts = {"weights": held.weights, "activations": held.contexts, f"cache of {longest} tokens": held.kv_cache}
    detail = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in parts.items())
    detail = f"{held.total / 1e9:.1f} GB with {weights} weights: {detail}"
    remedy = "a smaller model, or a target of your own with lower limits in [engine.dims]"
    if memory is not None:
        fits = held.total <= memory
        verdict, room = "ok" if fits else "problem", f"{memory / 1e9:g} GB are given"
        yield Finding("run memory", verdict, f"{detail}; {room}", "" if fits else remedy)
    elif target.devices:
        small = [name for name, fits in devices_with_room(target, held.total).items() if not fits]
        verdict = "problem" if len(small) == len(target.devices) else "note" if small else "ok"
        room = f"too much for {', '.join(small)}" if small else f"every device of {target.name} has room"
        yield Finding("run memory", verdict, f"{detail}; {room}", remedy if verdict == "problem" else "")


def _contexts(built: dict[str, Any] | None) -> int | None:
    """The most that TensorRT reported for one of a bundle's engines, if they are built and it did."""
    sizes = [engine.get("activation_bytes") for engine in (built or {}).get("engines", {}).values()]
    return max(sizes) if sizes and None not in sizes else None


def _pictures(target: Target, bundle: Bundle) -> Iterator[Finding]:
    """The longest prompt that the image processor makes of one picture, against the profile."""
    from PIL import Image

    from capa_export.run.bundled import bundled_prompter

    if target.engine is None:
        return
    prompter = bundled_prompter(bundle)
    graph = ir.load(bundle.folder / ONNX / "visual" / "model.onnx").graph
    (pixels,) = (value for value in graph.inputs if value.name == PIXEL_VALUES)
    for what, size in _PICTURES.items():
        try:
            prompt = prompter("?", [Image.new("RGB", size)])
        except CapaError:
            # The processor refuses it, so it never reaches an engine.
            continue
        sizes = {"sequence": len(prompt.input_ids), "text": len(prompt.text_positions)}
        for dim, length in zip(pixels.shape or (), prompt.pictures[0].patches.shape, strict=True):
            if isinstance(dim, ir.SymbolicDim):
                sizes[str(dim.value)] = length
        yield _against_profile(f"{what} picture", sizes, prompt.num_visual, target)


def _against_profile(check: str, sizes: dict[str, int], visual: int, target: Target) -> Finding:
    limits = {name: target.dim(name) for name in sizes}
    outside = [name for name, size in sizes.items() if not limits[name].min <= size <= limits[name].max]
    if not outside:
        return Finding(check, "ok", f"{visual} visual tokens, within the profile of {target.name}")
    name = outside[0]
    return Finding(
        check,
        "warning",
        f"{visual} visual tokens: {name} is {sizes[name]}, the profile of {target.name} takes "
        f"{limits[name].min} to {limits[name].max}",
        f"build with a smaller --max-pixels, or give [engine.dims] {name} a wider range in a target of your own",
    )
