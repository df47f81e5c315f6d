"""The golden as Polygraphy reads it: what went into each graph, what came out, and the commands that take both.

Polygraphy itself is not needed to write it: every kit has it, and the device that makes use of it is another machine.
"""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx_ir as ir

from capa_export.base.code import versions
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.machine import available_memory
from capa_export.bundle.store import ONNX, Bundle, run_stage
from capa_export.graph.contract import NUM_KEEP
from capa_export.passes.join_decode import filled
from capa_export.plan.device_memory import onnx_runtime_bytes
from capa_export.run.bundled import bundled_dims
from capa_export.trt.golden import Run, golden_bounds, in_blocks, run_golden
from capa_export.trt.graphs import GRAPHS

__all__ = ["INPUTS", "POLYGRAPHY", "PolygraphyKit", "check_polygraphy", "store_polygraphy", "write_polygraphy"]

POLYGRAPHY = "polygraphy"
_NAMES = {graph: PurePosixPath(engine).name for graph, engine in GRAPHS.items()}
"""What the files of each graph are called."""
INPUTS = "kit_inputs.py"
"""File of a kit that adds the weights to a graph's inputs, where they are inputs."""

_README = """# The golden, for Polygraphy

`NAME.inputs.json` and `NAME.outputs.json` are what went into vision tower, prefill and a first step of decode for one
prompt, and what ONNX Runtime on a CPU made of it; `NAME.shapes` says the shapes that TensorRT builds for, without which
Polygraphy would take 1 for every length. `pip install polygraphy onnx-graphsurgeon` brings what these commands need, to
be run in the folder of {where}. `POLYGRAPHY_USE_TENSORRT_RTX=1` takes TensorRT-RTX in TensorRT's place.

{note}{commands}
"""
_SECTIONS = {
    "onnxrt": "ONNX Runtime computes the golden:",
    "engine": "The engines compute it, those that failed (`NAME.engine.unchecked`) too:",
    "trt": "TensorRT computes it, with an engine that Polygraphy builds:",
    "reduce": "The smallest part of a graph of which TensorRT makes something else than ONNX Runtime:",
    "inspect": "What is in the files:",
}
_LINKS = """Polygraphy reads no weights that have a second name on the disk, as those of bundles with kits have here:
`cp -r onnx COPY` makes files of their own.

"""
_LOWERED = """TensorRT before {native} takes `*.lowered.onnx`.

"""
_PLUGINS = """TensorRT builds the CAPA nodes of its own layers here, for Polygraphy registers no plugins; before
{native} it takes none of the graphs, only the engines.

"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolygraphyKit:
    """What commands for a kit have to know."""

    engines: Mapping[str, Mapping[str, Any]]
    """Of each engine what `kit.json` says."""
    external: bool
    """Whether the weights are inputs."""
    plugins: bool
    """Whether the graphs have nodes that ONNX Runtime does not know."""
    native: str
    """The first TensorRT that takes the graphs which are not lowered."""

    def engine_of(self, graph: str) -> str:
        """Name of the engine that serves a graph."""
        return next(name for name, engine in self.engines.items() if graph in engine["profiles"])


def check_polygraphy(precision: str) -> None:
    """Refuse graphs that Polygraphy has no arrays of, before they are written."""
    if precision == "bf16":
        raise CapaError(
            "--polygraphy: Polygraphy's files hold NumPy's arrays, which have no bf16; export with --precision fp16",
            ExitCode.USAGE,
        )


def store_polygraphy(bundle: Bundle) -> None:
    """Write the golden of a bundle's graphs to its folder `polygraphy`.

    Raises:
        CapaError: the graphs are bf16, or running them takes more memory than is free.
    """
    precision = bundle.said("export", "precision")
    check_polygraphy(precision)

    def work(scratch: Path) -> dict[str, Any]:
        needed, free = onnx_runtime_bytes(bundled_dims(bundle), exact=True), available_memory()
        if needed > free:
            raise CapaError(
                f"--polygraphy: running the graphs takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            )
        write_polygraphy(scratch / POLYGRAPHY, run_golden(bundle), golden_bounds(bundle))
        return {"precision": precision}

    key = [versions("onnxruntime", code_of=[__name__]), bundle.digest("export")]
    run_stage(bundle, POLYGRAPHY, key, [POLYGRAPHY], work)


def write_polygraphy(
    folder: Path, runs: Sequence[Run], bounds: Mapping[str, Any], kit: PolygraphyKit | None = None
) -> None:
    """Write inputs and outputs of the first run of each graph, and the commands.

    Args:
        folder: to write into, which is made; `polygraphy` of a bundle, or `golden/polygraphy` of a kit.
        runs: of the golden.
        bounds: how close engines must come.
        kit: the kit that the folder is in, if it is in one.
    """
    folder.mkdir(parents=True)
    first = {file: (inputs, outputs) for file, inputs, outputs in reversed(runs)}
    commands: dict[str, list[str]] = {}
    for file, name in _NAMES.items():
        # A kit's decode is the engines', a bundle's is as it is exported.
        inputs, outputs = _of_engine(folder.parents[1], kit, file, *first[file]) if kit else first[file]
        (folder / f"{name}.inputs.json").write_text(json.dumps([_encoded(inputs)]), encoding="utf-8")
        (folder / f"{name}.outputs.json").write_text(json.dumps(_results(outputs)), encoding="utf-8")
        limits = kit.engines[kit.engine_of(file)]["profiles"][file] if kit else _fixed(inputs)
        (folder / f"{name}.shapes").write_text(_shapes(limits) + "\n", encoding="utf-8")
        for section, command in _commands(file, name, bounds, kit):
            commands.setdefault(section, []).append(command)
    note = _LINKS
    if kit:
        note = (_PLUGINS if kit.plugins else _LOWERED).format(native=kit.native)
    sections = [
        "\n    ".join([f"{title}\n", *commands[one], ""]) for one, title in _SECTIONS.items() if one in commands
    ]
    where = "the bundle" if kit is None else "the kit"
    (folder / "README.md").write_text(
        _README.format(where=where, note=note, commands="\n\n".join(sections)), encoding="utf-8"
    )


def _of_engine(
    folder: Path, kit: PolygraphyKit, file: str, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A run of a graph as the engine of a kit has it that serves it."""
    blocks, rows = in_blocks(inputs, outputs)
    entry = kit.engines[kit.engine_of(file)]
    if len(entry["profiles"]) == 1:
        return blocks, rows
    graph = ir.load(folder / entry["onnx"]).graph
    return filled(graph.inputs, blocks), filled(graph.outputs, rows)


def _encoded(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays as Polygraphy's JSON has them."""

    def encoded(array: np.ndarray) -> dict[str, str]:
        data = io.BytesIO()
        np.save(data, np.ascontiguousarray(array), allow_pickle=False)
        return {"array": base64.b64encode(data.getvalue()).decode(), "polygraphy_class": "ndarray"}

    return {name: encoded(array) for name, array in arrays.items()}


def _results(outputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The outputs of a run as Polygraphy's `RunResults`."""
    values = {name: {"values": one, "polygraphy_class": "LazyArray"} for name, one in _encoded(outputs).items()}
    run = {"outputs": values, "runtime": None, "runner_name": "golden", "polygraphy_class": "IterationResult"}
    return {"lst": [["golden", [run]]], "polygraphy_class": "RunResults"}


def _fixed(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The golden's own shapes as limits."""
    sizes = {NUM_KEEP} & inputs.keys()
    return {
        "shapes": {name: [list(array.shape)] * 3 for name, array in inputs.items()},
        "shape_inputs": {name: [inputs[name].tolist()] * 3 for name in sizes},
    }


def _shapes(limits: Mapping[str, Any]) -> str:
    """Options that say the least, the usual and the largest shape of each input; of sizes their values."""
    ends = {**limits["shapes"], **limits["shape_inputs"]}
    return " ".join(
        f"--trt-{end}-shapes "
        + " ".join(f"{name}:{json.dumps(one[index], separators=(',', ':'))}" for name, one in ends.items())
        for index, end in enumerate(("min", "opt", "max"))
    )


def _commands(file: str, name: str, bounds: Mapping[str, Any], kit: PolygraphyKit | None) -> Iterator[tuple[str, str]]:
    """The commands of a graph, and the section that each is for."""
    onnx = PurePosixPath(kit.engines[kit.engine_of(file)]["onnx"] if kit else f"{ONNX}/{file}")
    home = PurePosixPath("golden", POLYGRAPHY) if kit else PurePosixPath(POLYGRAPHY)
    inputs = f"--load-inputs {home / name}.inputs.json"
    if kit and kit.external:
        inputs = f"--data-loader-script {home / INPUTS}:{name}"
    outputs = f"--load-outputs {home / name}.outputs.json"
    hidden = f"{bounds['hidden']['cosine']:g}"
    logits = "" if name == "visual" else f"logits:{bounds['logits']['cosine']:g} "
    close = f"--compare cosine_similarity --cosine-similarity-threshold {logits}{hidden}"
    trt = f"--trt --strongly-typed $(cat {home / name}.shapes)"
    runs_here = onnx if kit is None else onnx.with_suffix(".lowered.onnx")
    if kit is None or not kit.plugins:
        yield "onnxrt", f"polygraphy run {runs_here} --onnxrt {inputs} {outputs} {close}"
    if kit:
        engine = kit.engine_of(file)
        profiles = list(kit.engines[engine]["profiles"])
        profile = f" --optimization-profile {profiles.index(file)}" if len(profiles) > 1 else ""
        strategy = f"--model-type engine --trt --allocation-strategy runtime{profile}"
        yield "engine", f"polygraphy run {engine}.engine {strategy} {inputs} {outputs} {close}"
    yield "trt", f"polygraphy run {onnx} {trt} {inputs} {outputs} {close}"
    if kit is None or not kit.plugins:
        check = f"polygraphy run polygraphy_debug.onnx --onnxrt {trt} {inputs} --compare cosine_similarity"
        reduce = f"-o {name}.reduced.onnx --mode bisect --no-reduce-inputs {inputs}"
        yield (
            "reduce",
            f"polygraphy debug reduce {runs_here} {reduce} --check {check} --cosine-similarity-threshold {hidden}",
        )
    yield "inspect", f"polygraphy inspect model {onnx} --ignore-external-data --show layers"
    yield "inspect", f"polygraphy inspect data {home / name}.outputs.json"
