"""Builds the engines of a kit: where it was written, or on its device as `python3 builder.py` in the kit.

It needs the standard library and TensorRT, and no GPU code of its own.
"""

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from capa_export.base.parent import tied
    from capa_export.trt.kit_device import check_device, check_version, find_headers, numbers_of, read_version
    from capa_export.trt.kit_file import GOLDEN, KitError, check_files, check_graphs, check_places, read_kit
    from capa_export.trt.kit_switch import LIBRARY, UNCHECKED, claimed, places, replaced
else:
    # Beside this file in a kit, which is to stay as it is.
    sys.dont_write_bytecode = True
    from kit_device import check_device, check_version, find_headers, numbers_of, read_version
    from kit_file import GOLDEN, KitError, check_files, check_graphs, check_places, read_kit
    from kit_switch import LIBRARY, UNCHECKED, claimed, places, replaced
    from parent import tied

__all__ = ["CHECKER", "FAILED", "SWITCHES", "WORKER", "build", "build_engines", "main", "switches"]

WORKER = "engine_worker.py"
"""File of a kit that builds one engine."""
CHECKER = "golden_run.py"
"""File of a kit that holds its engines against its golden."""
FAILED = 5
"""Exit code of whatever keeps an engine from being built."""
_RUNTIMES = ("tensorrt", "tensorrt_rtx")
_GOLDEN_LOG = "golden.log"
SWITCHES = "__LUNOWUD"
"""The environment variable of TensorRT's compiler."""
_SWITCHES = (
    ((10, 13), (10, 15), 0, False, "-peep:match_dual_gemm=off"),
    ((11,), (99,), 100, False, "-peep:match_dual_gemm=off"),
    ((10, 13), (99,), 0, True, "-peep:fc_h_fusion=off"),
    ((10, 15), (99,), 0, False, "-mlir:autotune:num_threads=1 -mlir:collective:fp4=off -cask_fusion:async_policy=1"),
)
"""The first TensorRT, the first that is later, least SM, whether for one prompt only, and what NVIDIA's builder sets.

FP16 products that share an input come out wrong for one prompt (TensorRT-Edge-LLM issues 40, 105, 151, 185).
"""
_EVERY_SWITCH = " ".join(dict.fromkeys(switch for *_, switch in _SWITCHES))
Say = Callable[[str], None]


def main() -> int:
    """Build the kit that this file lies in; returns the exit code."""
    parser = argparse.ArgumentParser(prog="build.sh", description="Build the engines of this kit, on its device.")
    parser.add_argument("--tensorrt-include", type=Path, metavar="DIR", help="folder of TensorRT's headers")
    parser.add_argument("--check", action="store_true", help="only look whether this is the kit's device")
    trial = parser.add_argument_group("trial", "Build elsewhere, to see that the kit is whole. Not for the device.")
    trial.add_argument("--runtime", help="module to build with in place of tensorrt, such as tensorrt_rtx")
    trial.add_argument("--compute-capability", metavar="X.Y", help="GPU to build for with --runtime, such as 8.6")
    trial.add_argument("--lowered", action="store_true", help="take the graphs for older TensorRT")
    trial.add_argument("--out", type=Path, metavar="DIR", help="where the engines of a trial go")
    given = vars(parser.parse_args())
    try:
        with tempfile.TemporaryDirectory() as links:
            environment: Mapping[str, str] = os.environ
            if given["runtime"] == "tensorrt_rtx":
                finder = importlib.import_module("parser_library")
                environment = {**os.environ, **finder.ensure_parser_library(Path(links))}
            for _ in build(Path(__file__).resolve().parent, **given, environment=environment):
                pass
    except KitError as error:
        _say(f"error: {error}")
        return FAILED
    except OSError as error:
        _say(f"error: {error.filename}: {error.strerror}")
        return FAILED
    return 0


def _say(line: str) -> None:
    # A kit of another version may say anything.
    sys.stderr.write("".join(char if char.isprintable() else "?" for char in line) + "\n")
    sys.stderr.flush()


def build(
    kit: Path,
    *,
    tensorrt_include: Path | None = None,
    check: bool = False,
    runtime: str | None = None,
    compute_capability: str | None = None,
    lowered: bool = False,
    out: Path | None = None,
    place: Path | None = None,
    worker: Sequence[str] | None = None,
    checker: Sequence[str] | None = None,
    write_plugins: Callable[[Path, Sequence[str]], None] | None = None,
    python_plugins: bool = False,
    environment: Mapping[str, str] = os.environ,
    say: Say = _say,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Check device, TensorRT and files, compile the plugins, build every engine, and hold them against the golden.

    What `kit.json` says is data until it is checked. The kit's own code is run where the caller brings none. On the
    device the engines take the places of those before in one step, when all have passed.

    Args:
        kit: the folder.
        tensorrt_include: folder of TensorRT's headers; None looks where packages put them.
        check: stop before anything is built.
        runtime: module to build with in a trial, in place of the kit's; the device is then not looked at.
        compute_capability: GPU to build for in a trial.
        lowered: whether a trial takes the graphs for older TensorRT.
        out: where the engines of a trial go; those of the device go into the kit.
        place: a folder for those of the device, if the caller puts them into the kit.
        worker: arguments of Python that start the building process; None starts the kit's own.
        checker: the same of the process that runs the golden.
        write_plugins: writes the sources of the plugins into a folder, for GPUs; None takes the kit's own.
        python_plugins: whether worker and checker bring those of Python, which a kit may then ask for.
        environment: variables of the building processes.
        say: told what is being done.

    Yields:
        As `build_engines` does.

    Raises:
        KitError: this is not the device, a file or TensorRT is missing or another, TensorRT refused, or an engine
            computes something else than the golden.
    """
    spec = read_kit(kit)
    trial = (runtime, compute_capability, out)
    if any(trial) and not all(trial):
        raise KitError("a trial needs --runtime, --compute-capability and --out, all three")
    if lowered and not runtime:
        raise KitError("--lowered is for a trial, with --runtime; on the device its TensorRT decides")
    module = runtime or spec["runtime"]
    if module not in _RUNTIMES:
        raise KitError(f"no runtime {module!r}; there are {' and '.join(_RUNTIMES)}")
    check_graphs(kit, spec, python=python_plugins)
    check_places((out or kit).resolve(), [_GOLDEN_LOG, *spec["engines"], *places(spec["engines"])])
    if not runtime:
        check_device(spec)
    version = read_version(module, environment)
    if not runtime:
        check_version(spec, version)
        lowered = numbers_of(version) < numbers_of(spec["lowered_below"])
    say(f"checking {len(spec['files'])} files")
    check_files(kit, spec["files"])
    include = None
    if spec["plugins"] == "native":
        include = find_headers(tensorrt_include, None if runtime else version)
    if check:
        say(f"this is {spec['target']}, with {module} {version}")
        return
    capabilities = [compute_capability] if compute_capability else spec["compute_capabilities"]
    spec |= {
        "runtime": module,
        "gpus": spec["compute_capabilities"],
        # TensorRT builds for the GPU that it finds.
        "compute_capabilities": [compute_capability] if compute_capability else [],
        "version_min": version,
        "version_below": f"{numbers_of(version)[0] + 1}",
    }
    with ExitStack() as stack:
        if not out:
            stack.enter_context(claimed(kit, spec["engines"]))
        folder = (out or place or stack.enter_context(replaced(kit, spec["engines"]))).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".build-"))
        library, sources = None, kit / "plugins"
        if include:
            if write_plugins:
                sources = Path(scratch, "plugins")
                write_plugins(sources, capabilities)
            library = _compile(sources, include, Path(scratch), say)
        yield from build_engines(
            *(kit, spec, folder),
            worker=worker or [str(kit / WORKER)],
            library=library,
            lowered=lowered,
            environment=environment,
            # Outside the folder, since they must outlive a failed build.
            logs={} if out else {name: kit / f"{name}.log" for name in spec["engines"]},
            say=say,
        )
        if not out and spec["golden"] is None:
            say("the kit has no golden: what the engines compute is not checked")
        elif not out:
            try:
                _check_golden(kit, spec, folder, checker or [str(kit / CHECKER)], Path(scratch), environment, say)
            except KitError:
                for name in spec["engines"]:
                    (folder / f"{name}.engine").replace(kit / f"{name}{UNCHECKED}")
                    (folder / f"{name}.log").replace(kit / f"{name}.log")
                raise
        if library:
            library.replace(folder / LIBRARY)


def build_engines(
    kit: Path,
    spec: Mapping[str, Any],
    folder: Path,
    *,
    worker: Sequence[str],
    library: Path | None = None,
    lowered: bool = False,
    environment: Mapping[str, str] = os.environ,
    logs: Mapping[str, Path] = {},
    say: Say = _say,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Build every engine of a kit, each in a process of its own.

    Args:
        kit: the folder.
        spec: what its `kit.json` says.
        folder: gets `NAME.engine`, `NAME.log` and, in TensorRT's own words, `NAME.layers.txt`.
        worker: arguments of Python that start the building process.
        library: of the plugins, where they are native.
        lowered: whether to take the graphs for older TensorRT.
        environment: variables of the building processes.
        logs: by engine where its log lies until the engine is whole, if that is elsewhere.
        say: told what is being done.

    Yields:
        An engine's name; and its `onnx`, `serves`, `capa_nodes`, `plan`, `seconds`, `bytes` and what the building
        process says, when it is whole.

    Raises:
        KitError: TensorRT refused or crashed; the log stays.
    """
    common = {key: spec[key] for key in ("runtime", "compute_capabilities", "version_min", "version_below")}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
        for name, engine in spec["engines"].items():
            onnx, path = engine["lowered" if lowered else "onnx"], folder / f"{name}.engine"
            say(f"building {name}.engine from {onnx}")
            path.parent.mkdir(parents=True, exist_ok=True)
            log, start = logs.get(name, path.with_suffix(".log")), time.monotonic()
            log.parent.mkdir(exist_ok=True)
            files = {part: str(Path(scratch, part)) for part in ("plan", "layers", "result")}
            task = {
                **common,
                **files,
                "onnx": str(kit / onnx),
                "beside": str(Path(engine.get("source", kit / onnx)).resolve()),
                "plugins": {
                    "kind": spec["plugins"],
                    "library": library and str(library),
                    "count": engine["plugins"],
                },
                "profiles": list(engine["profiles"].values()),
            }
            switched = {} if SWITCHES in environment else _switched(spec, engine["profiles"], say)
            try:
                result = _run(
                    worker, task, Path(scratch, "task.json"), {**environment, **switched}, log, spec["install"]
                )
            except KitError as error:
                raise KitError(f"{engine.get('source', name)}: {error}; log: {log}") from error
            Path(files["layers"]).replace(path.with_suffix(".layers.txt"))
            log.replace(path.with_suffix(".log"))
            # The plan comes last: where it is, the rest is.
            Path(files["plan"]).replace(path)
            seconds = round(time.monotonic() - start, 3)
            said = {**{key: engine[key] for key in ("onnx", "capa_nodes")}, "serves": list(engine["profiles"])}
            yield name, {**result, **said, "plan": path, "seconds": seconds, "bytes": path.stat().st_size}


def _check_golden(
    kit: Path,
    spec: Mapping[str, Any],
    folder: Path,
    checker: Sequence[str],
    scratch: Path,
    environment: Mapping[str, str],
    say: Say,
) -> None:
    """Run the golden through the engines that were built in a folder for the kit.

    Raises:
        KitError: an engine computes something else, or cannot be run.
    """
    say("running the golden")
    # A table that is none of the kit's files could lead out of it.
    tables = {name: f"{name}.weights.json" for name in spec["engines"]}
    task = {
        **{key: spec[key] for key in ("runtime", "plugins")},
        "bounds": spec["golden"],
        "golden": [str(kit / name) for name in GOLDEN],
        "engines": {
            name: {
                "serves": list(entry["profiles"]),
                "plan": str(folder / f"{name}.engine"),
                "weights": str(kit / tables[name]) if tables[name] in spec["files"] else None,
            }
            for name, entry in spec["engines"].items()
        },
        "result": str(scratch / "golden-result"),
    }
    log = kit / _GOLDEN_LOG
    after = f"the engines are left as NAME{UNCHECKED}; README.md says what to try; log: {log}"
    try:
        found = _run(checker, task, scratch / "golden.json", environment, log, spec["install"])["outputs"]
    except KitError as error:
        raise KitError(f"golden run: {error}; {after}") from error
    for one in found:
        say(f"{one['engine']}.engine: {one['output']}: {_figures(one)}")
    if wrong := [one for one in found if one["problem"]]:
        first, others = wrong[0], f", and {len(wrong) - 1} more" if wrong[1:] else ""
        raise KitError(
            f"{first['engine']}.engine computes something else than the golden: {first['output']}: "
            f"{first['problem']}{others}; {_advice(environment)}; {after}"
        )


def _figures(found: Mapping[str, Any]) -> str:
    if "moved" in found:
        return f"{found['of'] - found['moved']} of {found['of']} as in the golden"
    return f"cosine {found['cosine']:.6f}, norm off by {found['norm_ratio']:.2g}"


def _advice(environment: Mapping[str, str]) -> str:
    """What to try where TensorRT makes wrong code."""
    if SWITCHES in environment:
        return f"it was built with {SWITCHES}={environment[SWITCHES]!r}: unset that, and build again"
    return (
        f"build again with {SWITCHES}='{_EVERY_SWITCH}', or with another TensorRT, and see by capa-export validate "
        "BUNDLE --bisect whether the graphs are at fault"
    )


def switches(version: Sequence[int], capability: str, *, one_prompt: bool) -> str:
    """What turns off the optimizations of a TensorRT that make wrong code.

    Args:
        version: of TensorRT.
        capability: of the GPU, as `8.7`.
        one_prompt: whether the engine takes a batch of one.
    """
    sm = int(capability.replace(".", "")) if capability else 0
    return " ".join(
        switch
        for least, below, least_sm, alone, switch in _SWITCHES
        if least <= tuple(version) < below and sm >= least_sm and (one_prompt or not alone)
    )


def _switched(spec: Mapping[str, Any], profiles: Mapping[str, Mapping[str, Any]], say: Say) -> dict[str, str]:
    """The variable that an engine is built with; nothing for TensorRT-RTX, which is not known to need it."""
    if spec["runtime"] != "tensorrt":
        return {}
    one_prompt = any(least[:1] == [1] for limits in profiles.values() for least, *_ in limits["shapes"].values())
    found = switches(numbers_of(spec["version_min"]), spec["gpus"][0], one_prompt=one_prompt)
    if found:
        say(f"{SWITCHES}={found}")
    return {SWITCHES: found} if found else {}


def _run(
    worker: Sequence[str], task: Mapping[str, Any], file: Path, environment: Mapping[str, str], log: Path, install: str
) -> dict[str, Any]:
    """Build one engine in a process of its own; returns what that says."""
    result = Path(task["result"])
    result.unlink(missing_ok=True)
    file.write_text(json.dumps(task), encoding="utf-8")
    with log.open("wb") as output:
        child = subprocess.Popen(
            tied([sys.executable, *worker, str(file)]),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            child.wait()
        finally:
            # Reached with a live child when the user interrupts.
            child.terminate()
            child.wait()
    if not result.exists():
        raise KitError(_crash(child.returncode, log, install))
    said = json.loads(result.read_text(encoding="utf-8"))
    if "error" in said:
        raise KitError(said["error"])
    return said


def _crash(returncode: int, log: Path, install: str) -> str:
    """Why a process ended without a word."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), "it said nothing")
    if missing := re.match(r"(?:ModuleNotFound|Import)Error: .*\b(tensorrt\w*)", last):
        return f"{missing[1]} is not installed ({last}): {install}"
    if returncode < 0:
        name = signal.Signals(-returncode).name
        cause = ", most likely for want of memory" if -returncode == getattr(signal, "SIGKILL", None) else ""
        return f"its process died of {name}{cause}: {last}"
    return f"its process ended with status {returncode}: {last}"


def _compile(sources: Path, include: Path, scratch: Path, say: Say) -> Path:
    """The plugin library, compiled against the device's headers."""
    say("compiling the plugins")
    library = scratch / LIBRARY
    command = ["/bin/sh", str(sources / "build.sh"), str(include.resolve()), str(library)]
    run = subprocess.run(tied(command), capture_output=True, text=True, check=False)
    if run.returncode:
        lines = (run.stderr or run.stdout).strip().splitlines() or [f"exit code {run.returncode}"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise KitError(f"the plugins do not compile: {first}")
    return library


if __name__ == "__main__":
    sys.exit(main())
