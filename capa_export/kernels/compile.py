"""Compiles kernels for GPUs that need not be here: `python -m capa_export.kernels.compile JOBS.json` is one process.

A kernel is compiled once per GPU, and, where it matters to it, once per dtype of `real` and per head size.
"""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, Literal

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import ptx_get_version
from triton.compiler import ASTSource

from capa_export.base.code import digest_code
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.files import write_whole
from capa_export.base.parent import tied
from capa_export.base.precision import Precision
from capa_export.base.workers import module_arguments
from capa_export.config.plugins import HEAD_SIZES
from capa_export.kernels.operator import Count, Launch, Operator

__all__ = [
    "COMPUTE_CAPABILITIES",
    "CompiledKernel",
    "compile_kernels",
    "has_real",
    "variant_name",
]

COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "11.0", "12.0", "12.1")
"""From 9.0 on, an image runs on this very compute capability only."""

_ATTRIBUTES: Mapping[type, str] = {int: "i32", float: "fp32"}
_POLL_SECONDS = 0.1

# The default of the first changes with Triton 3.10; the second prints what `_FIGURES` finds.
_ENVIRONMENT = {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
_FIGURES = (r"(\d+) bytes stack", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads", r"Used (\d+) registers")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledKernel:
    """One variant of a kernel for one GPU.

    A launch has `32 * warps` threads and `shared_bytes` of dynamic shared memory. Pointers are multiples of 16.
    """

    operator: str
    """The first of those that launch it."""
    name: str
    """Symbol in the image."""
    variant: str
    """Unique per GPU, and fit for a file name: `merge_rows.fp16`."""
    compute_capability: str
    kind: Literal["cubin", "ptx"]
    """PTX is for GPUs that have no cubin: the driver compiles it."""
    image: bytes
    warps: int
    shared_bytes: int
    null_pointers: int
    """Triton's own parameters behind the kernel's, for memory that these kernels do not use."""
    registers: int
    """Per thread, of the cubin that PTX gives for `compute_capability`."""
    spill_bytes: int
    """Per thread, stores and loads of registers that did not fit."""
    stack_bytes: int
    """Per thread, in local memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """What one process needs to know to compile one variant."""

    module: str
    function: str
    signature: dict[str, str]
    constants: dict[str, int]
    aligned: list[str]
    """Parameters that are multiples of 16."""
    warps: int
    compute_capability: str

    def digest(self, sources: str) -> str:
        """Of all that decides what comes out; `sources` stands for the rest of it."""
        return sha256(json.dumps([sources, asdict(self)]).encode()).hexdigest()[:32]


def variant_name(launch: Launch, dtype: Precision | None, sizes: Mapping[str, int]) -> str:
    """`<kernel>[.<dtype>][.<size>...]`, of what the kernel is compiled for.

    Args:
        launch: of an operator.
        dtype: what `real` is; None where the launch has no such pointer (`has_real`).
        sizes: the operator's compiled sizes.
    """
    compiled_for = [str(value) for name, value in sizes.items() if name.upper() in launch.constants]
    return ".".join([launch.kernel.__name__, *([dtype] if dtype else []), *compiled_for])


def has_real(operator: Operator, launch: Launch) -> bool:
    """Whether any pointer of the launch is to `real`."""
    pointers = _pointers(operator)
    return any(isinstance(arg, str) and pointers.get(arg) == "real" for arg in launch.args)


def compile_kernels(
    operators: Sequence[Operator],
    compute_capabilities: Sequence[str],
    *,
    dtypes: Sequence[Precision] = ("fp16", "bf16", "fp32"),
    head_sizes: Sequence[int] = HEAD_SIZES,
    ptx: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[CompiledKernel]:
    """All variants of all kernels, in processes of their own, as many as there are cores; no GPU is needed.

    What the same Triton compiled before, of the same sources, comes from the user's cache folder.

    Args:
        operators: whose kernels.
        compute_capabilities: GPUs, such as "8.6".
        dtypes: what `real` may be.
        head_sizes: of the models.
        ptx: add PTX for the lowest of the compute capabilities.
        progress: told how many of how many are done.

    Raises:
        CapaError: a compute capability or head size that there are no kernels for, or Triton failed.
    """
    _refuse_unknown("compute capability", compute_capabilities, COMPUTE_CAPABILITIES)
    _refuse_unknown("head size", head_sizes, HEAD_SIZES)
    jobs: dict[tuple[str, str], tuple[str, _Job]] = {}
    for capability, operator, dtype, head_size in product(compute_capabilities, operators, dtypes, head_sizes):
        sizes = {name: {"head_size": head_size}[name] for name in operator.compiled_sizes}
        for launch in operator.launches(operator.symbols(sizes)):
            variant = variant_name(launch, dtype if has_real(operator, launch) else None, sizes)
            job = _job(operator, launch, dtype, capability)
            known = jobs.setdefault((variant, capability), (operator.name, job))
            assert known[1] == job, f"two kernels are called {variant}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capa-export" / "kernels"
    sources = _digest_of_sources()
    files = {key: folder / f"{job.digest(sources)}.json" for key, (_, job) in jobs.items()}
    _run({files[key]: job for key, (_, job) in jobs.items()}, progress)
    lowest = min(compute_capabilities, key=float, default=None) if ptx else None
    kernels: list[CompiledKernel] = []
    for (variant, capability), (operator_name, _) in jobs.items():
        result = json.loads(files[variant, capability].read_text(encoding="ascii"))
        images = {"cubin": b64decode(result.pop("cubin")), "ptx": b64decode(result.pop("ptx"))}
        of_both: dict[str, Any] = {
            "operator": operator_name,
            "variant": variant,
            "compute_capability": capability,
            **result,
        }
        kernels.append(CompiledKernel(kind="cubin", image=images["cubin"], **of_both))
        if capability == lowest:
            kernels.append(CompiledKernel(kind="ptx", image=images["ptx"], **of_both))
    return kernels


def _refuse_unknown(what: str, given: Sequence[object], known: Sequence[object]) -> None:
    for one in given:
        if one not in known:
            raise CapaError(f"no kernels for {what} {one}; there are for {', '.join(map(str, known))}", ExitCode.ENGINE)


def _pointers(operator: Operator) -> dict[str, str]:
    """Dtype by name, of all that a kernel takes a pointer to."""
    # Which scratch there is does not depend on sizes, so any will do.
    scratch = operator.scratch(operator.symbols(dict.fromkeys(operator.compiled_sizes, HEAD_SIZES[0])))
    buffers = {**operator.inputs, **operator.outputs, **scratch}
    return {name: buffer.dtype for name, buffer in buffers.items()}


def _job(operator: Operator, launch: Launch, dtype: Precision, capability: str) -> _Job:
    pointers = _pointers(operator)
    dtypes = {"real": dtype, "fp32": "fp32", "int32": "i32", "int64": "i64"}
    signature: dict[str, str] = {}
    aligned: list[str] = []
    for name, arg in zip(launch.kernel.arg_names, launch.args, strict=False):
        if isinstance(arg, str):
            is_aligned = arg in pointers
            signature[name] = "*" + dtypes[pointers[arg]] if is_aligned else _ATTRIBUTES[operator.attributes[arg]]
        else:
            is_aligned = str(arg) in operator.aligned_sizes
            signature[name] = "i32"
        aligned += [name] if is_aligned else []
    return _Job(
        module=launch.kernel.fn.__module__,
        function=launch.kernel.__name__,
        signature=signature,
        constants=_numbers(launch.constants),
        aligned=aligned,
        warps=launch.warps,
        compute_capability=capability,
    )


def _numbers(constants: Mapping[str, Count]) -> dict[str, int]:
    """The constants, none of which may follow from a size that only a call knows."""
    numbers = {name: value for name, value in constants.items() if isinstance(value, int)}
    assert len(numbers) == len(constants), f"not all of these are known ahead of time: {constants}"
    return numbers


def _digest_of_sources() -> str:
    """What decides what a job compiles to, besides the job: Triton, and the kernels' code and this module's."""
    return f"{triton.__version__} {digest_code(__name__)}"


def _run(jobs: Mapping[Path, _Job], progress: Callable[[int, int], None] | None) -> None:
    """Do the jobs whose results are not there yet."""
    missing = {path: job for path, job in jobs.items() if not path.exists()}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        environment |= {"TRITON_CACHE_DIR": f"{scratch}/triton", **_ENVIRONMENT}
        children: list[tuple[subprocess.Popen[bytes], Path]] = []
        try:
            for index in range(min(os.cpu_count() or 1, len(missing))):
                spec, log = Path(scratch, f"{index}.json"), Path(scratch, f"{index}.log")
                share = list(missing.items())[index :: os.cpu_count() or 1]
                spec.write_text(json.dumps([{"path": str(path), **asdict(job)} for path, job in share]), "ascii")
                output = stack.enter_context(log.open("wb"))
                command = [sys.executable, *module_arguments("capa_export.kernels.compile"), str(spec)]
                child = subprocess.Popen(
                    tied(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
                )
                children.append((child, log))
            while any(child.poll() is None for child, _ in children):
                if progress is not None:
                    progress(sum(path.exists() for path in jobs), len(jobs))
                time.sleep(_POLL_SECONDS)
        finally:
            # Reached with live children when the user interrupts or `progress` raises.
            for child, _ in children:
                child.terminate()
                child.wait()
        for child, log in children:
            if child.returncode:
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
                raise CapaError(f"Triton {triton.__version__} failed on the kernels: {lines[-1]}", ExitCode.ENGINE)
    if progress is not None:
        progress(len(jobs), len(jobs))


def main(spec: str) -> int:
    """Do the jobs in the file, each into a file of its own."""
    for entry in json.loads(Path(spec).read_text(encoding="ascii")):
        path = Path(entry.pop("path"))
        result = _compile(_Job(**entry))
        write_whole(path, json.dumps(result))
    return 0


def _compile(job: _Job) -> dict[str, Any]:
    function = getattr(importlib.import_module(job.module), job.function)
    names = function.arg_names
    capability = int(job.compute_capability.replace(".", ""))
    options: dict[str, Any] = {"num_warps": job.warps}
    # Triton ships the ptxas of a CUDA 12 and of a CUDA 13. The images of the older one load under drivers of both.
    older = knobs.nvidia.ptxas
    if capability in _compute_capabilities(older.path):
        os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = older.path
        options["ptx_version"] = ptx_get_version(older.version)
    else:
        os.environ.pop("TRITON_PTXAS_BLACKWELL_PATH", None)
    source = ASTSource(
        fn=function,
        signature=job.signature | dict.fromkeys(job.constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in job.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in job.aligned},
    )
    with contextlib.redirect_stdout(io.StringIO()) as log:
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    # A plugin passes null for both kinds of scratch memory.
    assert not kernel.metadata.global_scratch_size and not kernel.metadata.profile_scratch_size
    assert kernel.metadata.num_ctas == 1
    stack, stores, loads, registers = (_number(pattern, log.getvalue()) for pattern in _FIGURES)
    return {
        "name": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "shared_bytes": kernel.metadata.shared,
        "null_pointers": _null_pointers(kernel.asm["ptx"], len(job.signature)),
        "registers": registers,
        "spill_bytes": stores + loads,
        "stack_bytes": stack,
        "cubin": b64encode(kernel.asm["cubin"]).decode("ascii"),
        "ptx": b64encode(kernel.asm["ptx"].encode()).decode("ascii"),
    }


def _null_pointers(ptx: str, num_own: int) -> int:
    """How many parameters a kernel has behind the first `num_own`."""
    entry = re.search(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)
    assert entry, ptx
    parameters = re.findall(r"\.param \.(\w+)", entry[1])
    assert len(parameters) >= num_own and set(parameters[num_own:]) <= {"u64"}, parameters
    return len(parameters) - num_own


@cache
def _compute_capabilities(ptxas: str) -> frozenset[int]:
    """Those that it compiles for."""
    said = subprocess.run([ptxas, "--help"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return frozenset(map(int, re.findall(r"'sm_(\d+)'", said)))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, text
    return int(found[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
