"""Puts the checkpoint's weights behind the graphs: streamed, converted on the way, written once for all of them."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import onnx_ir as ir

from capa_export.base.disk import check_disk, disk_guard
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.files import replacing
from capa_export.base.precision import FORMATS
from capa_export.base.weight_types import WEIGHT_TYPES
from capa_export.export.in_place import Shards
from capa_export.model.checkpoint import CHUNK_ELEMENTS, Progress, StoredTensor
from capa_export.model.quantized.packed import (
    BlockForm,
    input_scales,
    outer_scale,
    packed_scales,
    packed_values,
    packed_zeros,
)
from capa_export.model.quantized.tensor import QuantizedTensor
from capa_export.model.quantized.weight import QuantizedWeight
from capa_export.model.source import EMBEDDING
from capa_export.model.tensors import checked_shape, unbound
from capa_export.passes.pack_weights import input_scale_name, outer_name, packed_name, scale_name, zero_name

__all__ = [
    "WrittenWeights",
    "bind",
    "bind_lazily",
    "write_embedding",
]

Array: TypeAlias = "np.ndarray[Any, Any]"

_SAFETENSORS_DTYPES = {ir.DataType[form.onnx]: form.safetensors for form in FORMATS.values()}
_WIDER = {ir.DataType.FLOAT16: "`--precision bf16` or `--precision fp32`", ir.DataType.BFLOAT16: "`--precision fp32`"}
_PAGE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class _Computed:
    """An array that no checkpoint holds, with the part of `StoredTensor` that conversion needs."""

    name: str
    read: Callable[[], Array]
    dtype: ir.DataType
    shape: tuple[int, ...]
    path: Path = Path("(computed)")

    @classmethod
    def of(cls, name: str, array: Array) -> "_Computed":
        return cls(name=name, read=lambda: array, dtype=ir.DataType.from_numpy(array.dtype), shape=array.shape)

    def chunks(self, size: int = CHUNK_ELEMENTS) -> Iterator[Array]:
        flat = np.ascontiguousarray(self.read()).reshape(-1)
        return (flat[start : start + size] for start in range(0, flat.size, size))


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenWeights:
    """The result of writing weights."""

    sha256: str | None
    """SHA-256 of the file that holds them; None where none was needed."""
    kept: tuple[StoredTensor, ...] = ()
    """Weights that stay in their shards."""


class _Digest:
    """SHA-256 of a file while it is written from front to back; what is skipped reads as zeros."""

    def __init__(self) -> None:
        self._sha256, self._length = hashlib.sha256(), 0

    def update(self, offset: int, block: memoryview) -> None:
        self._sha256.update(bytes(offset - self._length))
        self._sha256.update(block)
        self._length = offset + block.nbytes

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


class _SourceTensor(ir.LazyTensor):
    """A source as an initializer holds it; it is read while it is written."""

    digest: _Digest
    """Digest of the file that the tensor is written to."""

    def __init__(self, source: StoredTensor | _Computed, dtype: ir.DataType, shape: Sequence[int], name: str) -> None:
        super().__init__(self._whole, dtype, ir.Shape(shape), name=name)
        self.source = source

    def __repr__(self) -> str:
        return f"{self._repr_base()}({self.source!r}, name={self.name!r})"

    def _whole(self) -> ir.TensorProtocol:
        raise NotImplementedError

    def blocks(self) -> Iterator[memoryview]:
        """Yield the bytes of the elements in order."""
        raise NotImplementedError

    def tofile(self, file: BinaryIO) -> None:
        blocks = self._hashed(file.tell())
        file.writelines(_read_ahead(blocks) if self.size > CHUNK_ELEMENTS else blocks)

    def _hashed(self, offset: int) -> Iterator[memoryview]:
        """Yield the bytes of the chunks, which are in the digest when they come out."""
        for block in self.blocks():
            self.digest.update(offset, block)
            offset += block.nbytes
            yield block


class _PackedTensor(_SourceTensor):
    """A source of numbers of few bits, written as they are."""

    def _whole(self) -> ir.TensorProtocol:
        assert isinstance(self.source, _Computed)
        numbers = self.source.read()
        if self.dtype == ir.DataType.FLOAT8E4M3FN and ((numbers.view(np.uint8) & 127) == 127).any():
            raise _not_finite(self.source)
        return ir.Tensor(numbers, dtype=self.dtype, name=self.name)

    def blocks(self) -> Iterator[memoryview]:
        yield memoryview(self._whole().tobytes())


class _ConvertedTensor(_SourceTensor):
    """A source seen in another dtype and shape; while it is written, its bytes exist one chunk at a time."""

    def _whole(self) -> ir.TensorProtocol:
        array, done = np.empty(self.size, self.dtype.numpy()), 0
        for chunk in self.chunks():
            array[done : done + chunk.size] = chunk
            done += chunk.size
        return ir.Tensor(array.reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)

    def chunks(self) -> Iterator[Array]:
        """Yield the converted elements, each chunk in an array of its own.

        Raises:
            CapaError: a weight is NaN or infinite, or too large for the dtype.
        """
        bits = np.dtype(f"u{self.source.dtype.bitwidth // 8}")
        magnitude = bits.type((1 << (8 * bits.itemsize - 1)) - 1)
        infinity = np.array(np.inf, self.source.dtype.numpy()).view(bits)
        largest = bits.type(0)
        for chunk in self.source.chunks():
            # Without their sign bit, floats order as integers do, and only infinities and NaN reach `infinity`.
            largest = max(largest, (chunk.view(bits) & magnitude).max())
            if largest >= infinity:
                raise _not_finite(self.source)
            with np.errstate(over="ignore"):
                yield chunk.astype(self.dtype.numpy())
        self._check_range(float(largest.view(self.source.dtype.numpy())))

    def _check_range(self, largest: float) -> None:
        with np.errstate(over="ignore"):
            fits = math.isfinite(np.float32(largest).astype(self.dtype.numpy()))
        if not fits:
            raise CapaError(
                f"{self.source.path}: tensor {self.source.name} reaches {largest:g}, more than "
                f"{float(self.dtype.max):g}, the largest {self.dtype.name}; build with {_WIDER[self.dtype]}",
                ExitCode.EXPORT,
            )

    def blocks(self) -> Iterator[memoryview]:
        return (chunk.view(np.uint8).data for chunk in self.chunks())


def _not_finite(source: StoredTensor | _Computed) -> CapaError:
    return CapaError(
        f"{source.path}: tensor {source.name} holds NaN or infinity; the weights are damaged, download or re-save them"
    )


def _read_ahead(blocks: Iterator[memoryview]) -> Iterator[memoryview]:
    """The blocks, each made by another thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, blocks, None)
        while (block := following.result()) is not None:
            following = thread.submit(next, blocks, None)
            yield block


def bind(
    models: Sequence[ir.Model],
    tensors: Mapping[str, StoredTensor],
    *,
    dtype: ir.DataType,
    data_path: Path,
    extra: Mapping[str, Array] | None = None,
    packed: Mapping[str, QuantizedTensor] = MappingProxyType({}),
    shards: Shards | None = None,
    progress: Progress | None = None,
) -> WrittenWeights:
    """Give every initializer that has no value yet its weights, in one data file that the models share.

    The file is complete or absent. Weights that several initializers read in the same dtype are written once.

    Args:
        models: changed in place; their new initializers refer to `data_path.name`, so save them in its folder.
        tensors: the checkpoint, by canonical name.
        dtype: for the initializers that have no dtype of their own.
        data_path: the external data file.
        extra: arrays that are not in the checkpoint, by initializer name.
        packed: those of the checkpoint whose places `PackWeightsPass` has given to numbers of few bits.
        shards: where weights that need no conversion stay; without it all of them are written.
        progress: called with a tensor's name, bytes written, bytes in all.

    Raises:
        CapaError: a tensor is missing, has another shape, is not finite, overflows, or the disk is full.
    """
    written: dict[tuple[object, ...], _SourceTensor] = {}
    uses: list[tuple[ir.Value, tuple[object, ...]]] = []
    for value, tensor in _bound(models, tensors, dtype, extra, packed):
        key = (*_place(tensor.source), tensor.dtype)
        written.setdefault(key, tensor)
        uses.append((value, key))
    kept = {
        key: tensor.source
        for key, tensor in written.items()
        if shards is not None and isinstance(tensor.source, StoredTensor) and tensor.source.dtype == tensor.dtype
    }
    converted = {key: tensor for key, tensor in written.items() if key not in kept}
    stored_at, sha256 = _write(list(converted.values()), data_path, progress)
    external = dict(zip(converted, stored_at, strict=True))
    if shards is not None:
        external |= {key: shards.external(source, data_path.parent) for key, source in kept.items()}
    for value, key in uses:
        stored = external[key]
        value.type = ir.TensorType(stored.dtype)
        assert value.name is not None and value.shape is not None
        value.const_value = ir.ExternalTensor(
            stored.location,
            stored.offset,
            stored.length,
            stored.dtype,
            shape=ir.Shape(value.shape.numpy()),
            name=value.name,
            base_dir=stored.base_dir,
        )
    return WrittenWeights(sha256=sha256, kept=tuple(kept.values()))


def bind_lazily(
    models: Sequence[ir.Model],
    tensors: Mapping[str, StoredTensor],
    *,
    dtype: ir.DataType,
    extra: Mapping[str, Array] | None = None,
    packed: Mapping[str, QuantizedTensor] = MappingProxyType({}),
) -> None:
    """Give every initializer that has no value yet weights that are read, and converted, when they are asked for.

    Args:
        models: changed in place.
        tensors: the checkpoint, by canonical name.
        dtype: for the initializers that have no dtype of their own.
        extra: arrays that are not in the checkpoint, by initializer name.
        packed: as `bind` takes it.

    Raises:
        CapaError: a tensor is missing, or has another shape.
    """
    for value, tensor in _bound(models, tensors, dtype, extra, packed):
        value.type, value.const_value = ir.TensorType(tensor.dtype), tensor


def _bound(
    models: Sequence[ir.Model],
    tensors: Mapping[str, StoredTensor],
    dtype: ir.DataType,
    extra: Mapping[str, Array] | None,
    packed: Mapping[str, QuantizedTensor],
) -> Iterator[tuple[ir.Value, _SourceTensor]]:
    """Initializers without a value, and what they are to hold."""
    sources: dict[str, StoredTensor | _Computed] = {**tensors}
    sources |= {name: _Computed.of(name, array) for name, array in (extra or {}).items()}
    for name, tensor in packed.items():
        sources |= {part.name: part for part in _packed_parts(name, tensor)}
    waiting = [value for model in models for value in unbound(model)]
    if missing := [value.name for value in waiting if value.name not in sources]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CapaError(
            f"tensor {missing[0]}{more} is missing from the checkpoint, though its config.json implies it; "
            "check that weights and config belong together"
        )
    return ((value, _convert(value, sources[str(value.name)], dtype)) for value in waiting)


def _packed_parts(name: str, tensor: QuantizedTensor) -> Iterator[_Computed]:
    """What initializers hold of a packed weight; graphs read of it what the weight has."""
    num_outputs, num_inputs = tensor.shape
    form = tensor.block_form()
    assert isinstance(form, BlockForm)
    kind, full = WEIGHT_TYPES[form.kind], ir.DataType.FLOAT
    fp4 = form.kind == "nvfp4"
    numbers, groups = (num_inputs, num_outputs // 2 if fp4 else num_outputs), num_inputs // (form.group or num_inputs)
    by_group = (groups, num_outputs)
    for part, read, dtype, shape in (
        (packed_name(name), packed_values, ir.DataType[kind.onnx], numbers),
        (
            scale_name(name),
            packed_scales,
            ir.DataType.FLOAT8E4M3FN if fp4 else full,
            by_group if form.group else (num_outputs,),
        ),
        (outer_name(name), outer_scale, full, ()),
        (zero_name(name), packed_zeros, full, by_group),
        (input_scale_name(name), input_scales, full, (num_inputs,)),
    ):
        yield _Computed(name=part, read=partial(_read, tensor, read), dtype=dtype, shape=shape, path=tensor.path)


def _read(tensor: QuantizedTensor, part: Callable[[QuantizedWeight], Array]) -> Array:
    return part(tensor.quantized())


def _place(source: StoredTensor | _Computed) -> tuple[object, ...]:
    """A key that tells one source from another; a tied head has the embedding's."""
    return (source.path, source.offset) if isinstance(source, StoredTensor) else (source.name,)


def _convert(value: ir.Value, source: StoredTensor | _Computed, dtype: ir.DataType) -> _SourceTensor:
    assert value.name is not None
    shape = checked_shape(value, source)
    target = dtype if value.dtype is None else value.dtype
    if target not in _SAFETENSORS_DTYPES:
        return _PackedTensor(source, target, shape, value.name)
    assert target in _SAFETENSORS_DTYPES and source.dtype in _SAFETENSORS_DTYPES, (value.name, target, source.dtype)
    return _ConvertedTensor(source, target, shape, value.name)


def _write(
    tensors: Sequence[_SourceTensor], path: Path, progress: Progress | None
) -> tuple[list[ir.ExternalTensor], str | None]:
    if not tensors:
        return [], None
    digest = _Digest()
    for tensor in tensors:
        tensor.digest = digest
    # Every large tensor may be preceded by up to a page of padding.
    needed = sum(tensor.nbytes + _PAGE for tensor in tensors)
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    check_disk(path.parent, needed)

    def report(tensor: ir.TensorProtocol, _info: ir.external_data.CallbackInfo) -> None:
        nonlocal done
        if progress:
            progress(tensor.name or "", done, total)
        done += tensor.nbytes

    with disk_guard(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        external = ir.external_data.convert_tensors_to_external(
            tensors, path.parent, path.name, callback=report, alignment=_PAGE
        )
    if progress:
        progress(tensors[-1].name or "", total, total)
    return external, digest.hexdigest()


def write_embedding(
    tensors: Mapping[str, StoredTensor], dtype: ir.DataType, path: Path, shards: Shards | None = None
) -> WrittenWeights:
    """Write the token embedding alone, as tensor `embedding` of a safetensors file that is complete or absent.

    Args:
        tensors: the checkpoint, by canonical name.
        dtype: to write it in.
        path: of the file.
        shards: where it stays if it needs no conversion; beside `path`, a pointer then says so.

    Raises:
        CapaError: the checkpoint has no embedding, it overflows, or the disk is full.
    """
    if EMBEDDING not in tensors:
        raise CapaError(f"tensor {EMBEDDING} is missing from the checkpoint; use one that holds the language model")
    source = tensors[EMBEDDING]
    if shards is not None and source.dtype == dtype:
        shards.point_to_embedding(source, path.parent)
        return WrittenWeights(sha256=None, kept=(source,))
    tensor = _ConvertedTensor(source, dtype, source.shape, "embedding")
    entry = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": list(source.shape), "data_offsets": [0, tensor.nbytes]}
    header = json.dumps({"embedding": entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    needed = 8 + len(header) + tensor.nbytes
    check_disk(path.parent, needed)
    with disk_guard(path, needed), replacing(path) as file:
        start = len(header).to_bytes(8, "little") + header
        file.write(start)
        tensor.digest = _Digest()
        tensor.digest.update(0, memoryview(start))
        tensor.tofile(file)
    return WrittenWeights(sha256=tensor.digest.hexdigest())
