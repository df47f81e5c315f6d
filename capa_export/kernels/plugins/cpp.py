"""The operators in C++: tables of what they are, and their launches as Python lists them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TypeVar

from capa_export.config.plugins import HEAD_SIZES
from capa_export.kernels.compile import CompiledKernel, has_real, variant_name
from capa_export.kernels.operator import Launch, Operator, Scratch, Tensor

__all__ = ["assembly", "header"]

_T = TypeVar("_T")

_DTYPES = {"real": "kReal", "fp32": "kFp32", "int32": "kInt32", "int64": "kInt64"}
_BYTES = {"fp32": 4, "int32": 4, "int64": 8}

_PTX = 0


def header(operators: Sequence[Operator], kernels: Sequence[CompiledKernel]) -> str:
    """The text of `capa_kernels.h`."""
    return "\n".join(
        [
            "// Written by `capa-export plugins build` from the operators in Python.",
            "#pragma once",
            "",
            '#include "capa_operator.h"',
            "",
            "namespace capa",
            "{",
            "",
            *_kernel_tables(kernels),
            *(line for operator in operators for line in _operator_namespace(operator)),
            _array("Operator", "kOperators", (_operator_row(operator) for operator in operators)),
            "",
            "} // namespace capa",
            "",
        ]
    )


def assembly(kernels: Sequence[CompiledKernel]) -> str:
    """The text of `capa_kernels.s`, which puts the fatbins of the folder `kernels` into the library."""
    lines = ["    .section .rodata"]
    for variant in dict.fromkeys(kernel.variant for kernel in kernels):
        symbol = _fatbin_symbol(variant)
        lines += [
            f"    .hidden {symbol}",
            f"    .globl {symbol}",
            "    .balign 64",
            f"{symbol}:",
            f'    .incbin "kernels/{variant}.fatbin"',
        ]
    # Without it, the linker takes the stack to be executable.
    return "\n".join([*lines, '    .section .note.GNU-stack,"",%progbits', ""])


def _kernel_tables(kernels: Sequence[CompiledKernel]) -> list[str]:
    images = sorted({_image(kernel) for kernel in kernels} - {_PTX})
    by_variant: dict[str, list[CompiledKernel]] = {}
    for kernel in kernels:
        by_variant.setdefault(kernel.variant, []).append(kernel)
    symbols = [f"    extern unsigned char const {_fatbin_symbol(variant)}[];" for variant in by_variant]
    rows = [
        f'"{variant}", "{group[0].name}", {_fatbin_symbol(variant)}, {group[0].null_pointers}, {{{_blocks(group)}}}'
        for variant, group in by_variant.items()
    ]
    return [
        "//! Ten times the compute capabilities that there are cubins for.",
        _array("int", "kImages", map(str, images), one_line=True),
        "",
        'extern "C"',
        "{",
        *symbols,
        "}",
        "",
        _array("Kernel", "kKernels", rows),
        "",
    ]


def _blocks(kernels: Sequence[CompiledKernel]) -> str:
    """PTX first, then cubins by compute capability, each with all that follow and are launched alike."""
    assert len({(kernel.name, kernel.null_pointers) for kernel in kernels}) == 1
    groups = groupby(sorted(kernels, key=_image), key=lambda kernel: (kernel.warps, kernel.shared_bytes))
    firsts = [next(group) for _, group in groups]
    assert _image(firsts[0]) == _PTX
    return ", ".join(f"{{{_image(kernel)}, {kernel.warps}, {kernel.shared_bytes}}}" for kernel in firsts)


def _image(kernel: CompiledKernel) -> int:
    return _PTX if kernel.kind == "ptx" else int(kernel.compute_capability.replace(".", ""))


def _fatbin_symbol(variant: str) -> str:
    return f"capa_{variant.replace('.', '_')}"


def _operator_namespace(operator: Operator) -> list[str]:
    sizes = _sizes(operator)
    scratch = _scratch(operator)
    buffers = [*_gpu_inputs(operator), *operator.outputs, *scratch]
    bytes_lines = [
        f"    bytes[{index}] = {_BYTES[one.dtype]} * {one.count};" for index, one in enumerate(scratch.values())
    ]
    calls = _launches(operator)
    declarations = [
        _enum("Size", sizes),
        _enum("Buffer", buffers),
        _enum("Field", operator.attributes),
        _array("char const*", "kSizes", (f'"{name}"' for name in sizes), one_line=True),
        _array("Tensor", "kInputs", (_tensor(operator, name) for name in _gpu_inputs(operator))),
        _array("Tensor", "kOutputs", (_tensor(operator, name) for name in operator.outputs)),
        _array("int32_t", "kValues", _size_names(operator.value_inputs.values()), one_line=True),
        _array(
            "Attribute",
            "kAttributes",
            (f'"{name}", {str(kind is float).lower()}' for name, kind in operator.attributes.items()),
        ),
        _array("int32_t", "kAligned", _size_names(operator.aligned_sizes), one_line=True),
    ]
    return [
        f"namespace {operator.name}",
        "{",
        *filter(None, declarations),
        "",
        "inline void scratch([[maybe_unused]] int64_t const* sizes, [[maybe_unused]] int64_t* bytes)",
        "{",
        *_locals(sizes, bytes_lines, "sizes"),
        *bytes_lines,
        "}",
        "",
        "inline bool launch(Call& call)",
        "{",
        *_locals(sizes, calls, "call.sizes"),
        "    return " + "\n        && ".join(calls) + ";",
        "}",
        f"}} // namespace {operator.name}",
        "",
    ]


def _operator_row(operator: Operator) -> str:
    arrays = {
        "kSizes": True,
        "kInputs": True,
        "kOutputs": True,
        "kValues": operator.value_inputs,
        "kAttributes": operator.attributes,
        "kAligned": operator.aligned_sizes,
    }
    fields = [f"{operator.name}::{array}" if items else "{}" for array, items in arrays.items()]
    num_scratch = len(_scratch(operator))
    fields += [str(num_scratch), f"{operator.name}::scratch", f"{operator.name}::launch"]
    return f'"{operator.name}", {", ".join(fields)}'


def _sizes(operator: Operator) -> list[str]:
    tensors = (*operator.inputs.values(), *operator.outputs.values())
    return list(dict.fromkeys(size for tensor in tensors for size in tensor.shape if isinstance(size, str)))


def _gpu_inputs(operator: Operator) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in operator.inputs.items() if name not in operator.value_inputs}


def _size_names(names: Iterable[str]) -> list[str]:
    return [f"Size::{name}" for name in names]


def _tensor(operator: Operator, name: str) -> str:
    tensors = {**operator.inputs, **operator.outputs}
    tensor = tensors[name]
    # Where one tensor has no batch axis, that of another has to be 1.
    one_prompt = any(len(one.graph_shape) < len(one.shape) for one in tensors.values())
    axes = [
        str(-size) if isinstance(size, int) else "-1" if size == "batch" and one_prompt else f"Size::{size}"
        for size in tensor.graph_shape
    ]
    return f'"{name}", Dtype::{_DTYPES[tensor.dtype]}, {len(axes)}, {{{", ".join(axes)}}}'


def _launches(operator: Operator) -> list[str]:
    """Every launch as a call in C++."""
    traces = [
        [_launch(operator, launch) for launch in operator.launches(operator.symbols(known))]
        for known in _known_sizes(operator)
    ]
    return _one(traces)


def _scratch(operator: Operator) -> dict[str, Scratch]:
    return _one([operator.scratch(operator.symbols(known)) for known in _known_sizes(operator)])


def _known_sizes(operator: Operator) -> list[dict[str, int]]:
    """Sizes that kernels are compiled for are known to a launch, and symbols cannot stand for them."""
    assert len(operator.compiled_sizes) <= 1, operator.name
    return [dict.fromkeys(operator.compiled_sizes, one) for one in HEAD_SIZES]


def _one(traces: Sequence[_T]) -> _T:
    """They may decide which kernel it is, and nothing else of a launch."""
    assert all(trace == traces[0] for trace in traces), traces
    return traces[0]


def _launch(operator: Operator, launch: Launch) -> str:
    args = [
        str(arg)
        if not isinstance(arg, str)
        else f"call.attributes[Field::{arg}]"
        if arg in operator.attributes
        else f"call.buffers[Buffer::{arg}]"
        for arg in launch.args
    ]
    sizes = dict.fromkeys(operator.compiled_sizes, 1)
    kernel, *compiled_for = variant_name(launch, None, sizes).split(".")
    dtype = "call.dtype" if has_real(operator, launch) else "nullptr"
    size = operator.compiled_sizes[0] if compiled_for else "0"
    grid = ", ".join(map(str, launch.grid))
    return f'call.launch({{"{kernel}", {dtype}, {size}}}, {{{grid}}}, {", ".join(args)})'


def _locals(sizes: Sequence[str], lines: Sequence[str], source: str) -> list[str]:
    """Declares the sizes that the lines speak of."""
    # `Buffer::kept` is not the size `kept`.
    words = set(re.findall(r"(?<!::)\b[a-z_]\w*", "\n".join(lines)))
    return [f"    int64_t const {size} = {source}[Size::{size}];" for size in sizes if size in words]


def _enum(name: str, names: Iterable[str] | Mapping[str, object]) -> str:
    return f"struct {name} {{ enum : int32_t {{ {', '.join(names)} }}; }};" if names else ""


def _array(kind: str, name: str, items: Iterable[str], *, one_line: bool = False) -> str:
    rows = list(items)
    if not rows:
        return ""
    if one_line:
        return f"constexpr {kind} {name}[] = {{{', '.join(rows)}}};"
    return "\n".join([f"constexpr {kind} {name}[] = {{", *(f"    {{{row}}}," for row in rows), "};"])
