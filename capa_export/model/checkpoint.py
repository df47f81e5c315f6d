"""Opens a checkpoint folder or hub id: its config, and where every tensor lies, without reading the weights."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import ml_dtypes
import numpy as np

from capa_export.base.errors import CapaError
from capa_export.base.precision import FORMATS
from capa_export.bundle.confined import is_name
from capa_export.model.hub import find_folder, refetch

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "CHUNK_ELEMENTS",
    "Checkpoint",
    "Progress",
    "StoredTensor",
    "canonical_name",
    "fetch_config",
    "fetch_json",
    "open_checkpoint",
    "open_tensors",
    "read_json",
]

Progress: TypeAlias = Callable[[str, int, int], None]
"""A callback that takes a file's or tensor's name, the bytes done and the bytes in all."""

CHUNK_ELEMENTS = 1 << 20
"""Elements read at once: small enough to stay in cache while they are converted."""

# NumPy itself has no bfloat16.
_DTYPES = {form.safetensors: np.dtype(getattr(ml_dtypes, form.array, form.array)) for form in FORMATS.values()}
_PACKED = {
    name: np.dtype(getattr(ml_dtypes, array, array))
    for name, array in {
        "I32": "int32",
        "I64": "int64",
        "I8": "int8",
        "U8": "uint8",
        "F8_E4M3": "float8_e4m3fn",
    }.items()
}
"""Dtypes, by safetensors' names, of the tensors that formats of quantized weights are made of."""
_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer*", "*.model")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_ADAPTED = re.compile(
    r"^base_model\.|\.(?:lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector)|base_layer|modules_to_save"
    r"|original_module|ia3_l|vera_lambda_[bd]|oft_[rRsS]|boft_[RPs]|hada_[wt]\d|lokr_[wt]\d|prompt_encoder)(?:\.|_|$)"
)
"""Names that PEFT gives to what it puts around a model."""
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """The place of one tensor on disk."""

    name: str
    """Stored name, whatever the tensor is renamed to."""
    path: Path
    """Path of the shard."""
    numpy_dtype: "np.dtype[Any]"
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the shard."""
    nbytes: int

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that the elements are read from."""
        return (self.path,)

    @property
    def dtype(self) -> "ir.DataType":
        # Slow to import, and not needed to run a bundle.
        import onnx_ir as ir

        return ir.DataType.from_numpy(self.numpy_dtype)

    def mapped(self) -> "np.ndarray[Any, Any]":
        """The elements in their shape, mapped from the file rather than read; what is written to them stays here."""
        return np.memmap(self.path, self.numpy_dtype, "c", self.offset, self.shape)

    def chunks(self, size: int = CHUNK_ELEMENTS) -> Iterator["np.ndarray[Any, Any]"]:
        """Yield the elements in storage order, flat, `size` at a time, in the stored dtype.

        Each chunk overwrites the last: use it before asking for the next one.

        Raises:
            CapaError: the shard changed or became unreadable since it was opened.
        """
        buffer = np.empty(min(size, prod(self.shape)), self.numpy_dtype)
        left = prod(self.shape)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                while left:
                    chunk = buffer[: min(size, left)]
                    if file.readinto(chunk.view(np.uint8).data) != chunk.nbytes:
                        raise CapaError(f"{self.path}: ended inside tensor {self.name}; it changed while being read")
                    yield chunk
                    left -= chunk.size
        except OSError as error:
            raise CapaError(f"{self.path}: cannot read tensor {self.name}: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A folder of weights that was found to be complete; nothing of it is held in memory."""

    folder: Path
    config: dict[str, Any]
    """`config.json`, as it is."""
    tensors: Mapping[str, StoredTensor]
    """Tensors by stored name, in the order of shards and of offsets."""
    passed_over: Mapping[str, str] = field(default_factory=dict[str, str])
    """Stored name -> dtype, of what is neither BF16, F16 nor F32: no graph reads it."""
    packed: Mapping[str, StoredTensor] = field(default_factory=dict[str, StoredTensor])
    """Those of what is passed over that quantized weights may be made of, by stored name."""
    translation: Path | None = None
    """Folder of config, tokenizer and processor files as transformers would have them, where `folder` has others."""

    @property
    def names(self) -> list[str]:
        """Names of all that is stored, also of what no graph reads."""
        return [*self.tensors, *self.passed_over]

    @property
    def sidecars(self) -> Path:
        """Folder of config, tokenizer and processor files, as transformers reads them."""
        return self.translation or self.folder

    @property
    def num_parameters(self) -> int:
        """Stored elements; a tied head is stored, and counted, once."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        """The config and the shards, sorted by name."""
        shards = {path for tensor in self.tensors.values() for path in tensor.paths}
        return [self.folder / "config.json", *sorted(shards)]

    def sha256(self, progress: Progress | None = None) -> dict[str, str]:
        """Digest of every file that a build depends on, by name relative to the folder."""
        total, done = sum(path.stat().st_size for path in self.files), 0
        digests: dict[str, str] = {}
        for path in self.files:
            name, digest = path.relative_to(self.folder).as_posix(), hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    done += len(block)
                    if progress:
                        progress(name, done, total)
            digests[name] = digest.hexdigest()
        return digests

    def renamed(self, rules: Sequence[tuple[str, str]]) -> Mapping[str, StoredTensor]:
        """The tensors by canonical name.

        Args:
            rules: (pattern of a prefix, replacement); the first that matches a name applies, and a name
                that none matches stays.

        Raises:
            CapaError: two stored tensors come to the same name.
        """
        canonical: dict[str, StoredTensor] = {}
        for stored, tensor in self.tensors.items():
            name = canonical_name(stored, rules)
            if name in canonical:
                raise CapaError(
                    f"{self.folder}: tensors {canonical[name].name} and {stored} are both {name}; "
                    "the checkpoint mixes two layouts, re-save it with save_pretrained"
                )
            canonical[name] = tensor
        return MappingProxyType(canonical)


def open_checkpoint(source: str, *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and check that it is whole.

    Args:
        source: a local folder, or a hub id such as `owner/name`.
        revision: branch, tag or commit of a hub id.

    Raises:
        CapaError: it cannot be found, or it is not a complete safetensors checkpoint.
    """
    folder = find_folder(source, revision, _FILES)
    _refuse_adapter(folder)
    config = _config(folder)
    shards, weight_map = _shards(folder, config)
    tensors: dict[str, StoredTensor] = {}
    packed: dict[str, StoredTensor] = {}
    passed_over: dict[str, str] = {}
    places: dict[str, str] = {}
    for shard in shards:
        found, others = _read_header(folder / shard)
        for name in found:
            if name in places:
                raise CapaError(
                    f"{folder}: tensor {name} is in {places[name]} and in {shard}; "
                    "remove the file that does not belong to this checkpoint"
                )
            places[name] = shard
        tensors |= {name: tensor for name, tensor in found.items() if name not in others}
        packed |= {name: found[name] for name, dtype in others.items() if dtype in _PACKED}
        passed_over |= others
    for name, shard in weight_map.items():
        if places.get(name) != shard:
            raise CapaError(f"{folder / shard}: has no tensor {name}, which {_INDEX} puts there; download both again")
    if adapted := next(filter(_ADAPTED.search, places), None):
        raise CapaError(
            f"{folder}: tensor {adapted} is part of a PEFT adapter, saved without being merged; load it with PEFT, "
            "call merge_and_unload(), and pass the folder that save_pretrained then writes"
        )
    return Checkpoint(
        folder=folder,
        config=config,
        tensors=MappingProxyType(tensors),
        passed_over=MappingProxyType(passed_over),
        packed=MappingProxyType(packed),
    )


def fetch_config(source: str, *, revision: str | None = None) -> dict[str, Any]:
    """`config.json` of a local folder or a hub id, and nothing else of it.

    Raises:
        CapaError: it cannot be found or read.
    """
    folder = find_folder(source, revision, ("config.json", _ADAPTER))
    _refuse_adapter(folder)
    return _config(folder)


def fetch_json(source: str, names: Iterable[str], *, revision: str | None = None) -> dict[str, dict[str, Any]]:
    """Read those of some JSON files that a local folder or a hub id has, by name, and nothing else of it.

    Raises:
        CapaError: it cannot be found, or one cannot be read.
    """
    folder = find_folder(source, revision, tuple(names))
    return {name: read_json(folder / name) for name in names if (folder / name).is_file()}


def canonical_name(stored: str, rules: Sequence[tuple[str, str]]) -> str:
    """A tensor's name by the first rule (pattern of a prefix, replacement) that matches it."""
    matches = ((re.match(pattern, stored), new) for pattern, new in rules)
    return next((match.expand(new) + stored[match.end() :] for match, new in matches if match), stored)


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """Find the BF16, F16 and F32 tensors of one safetensors file.

    Raises:
        CapaError: the file is missing, truncated or corrupt.
    """
    tensors, others = _read_header(path)
    return {name: tensor for name, tensor in tensors.items() if name not in others}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json(path, f"a checkpoint folder holds it beside the weights: {refetch(folder)}")


def _refuse_adapter(folder: Path) -> None:
    path = folder / _ADAPTER
    if path.is_file():
        base = read_json(path).get("base_model_name_or_path") or "its base model"
        raise CapaError(
            f"{path}: the folder holds a PEFT adapter for {base}, and transformers would load that model under it; "
            "load both with PEFT, call merge_and_unload(), and pass the folder that save_pretrained then writes"
        )


def read_json(path: Path, hint: str = "copy it from where the weights were published") -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        CapaError: it is missing, which `hint` says what to do about, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CapaError(f"{path}: not found; {hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CapaError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(data, dict):
        raise CapaError(f"{path}: not a JSON object; download it again")
    return cast("dict[str, Any]", data)


def _shards(folder: Path, config: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The shards, all of which exist, and the one each tensor is in, where an index says so.

    As in transformers: the file that `config.json` names, or else a whole one, or else those of an index.
    """
    named = config.get("transformers_weights")
    if named is not None and not (isinstance(named, str) and is_name(named)):
        raise CapaError(f"{folder / 'config.json'}: transformers_weights names no file of this folder; remove it")
    found = next((name for name in ([named] if named else [_WHOLE, _INDEX]) if (folder / name).is_file()), None)
    if found is None:
        raise _no_weights(folder, named)
    if not found.endswith(".index.json"):
        return [found], {}
    path = folder / found
    weight_map = _indexed(path)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not is_name(shard):
            raise CapaError(f"{path}: shard {shard} lies outside the folder; download the index again")
        if not (folder / shard).is_file():
            raise CapaError(f"{folder / shard}: shard not found, though {path.name} names it; {refetch(folder)}")
    return shards, weight_map


def _indexed(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if isinstance(weight_map, dict):
        entries = cast("dict[str, object]", weight_map)
        shards = {name: shard for name, shard in entries.items() if isinstance(shard, str)}
        if shards and len(shards) == len(entries):
            return shards
    raise CapaError(f"{path}: has no weight_map of tensor names to shards; download it again")


def _no_weights(folder: Path, given: str | None) -> CapaError:
    if given:
        return CapaError(f"{folder / given}: not found, though transformers_weights in config.json names it")
    if found := sorted(path.name for path in folder.glob("*.safetensors")):
        return CapaError(
            f"{folder}: no {_INDEX} beside {found[0]}, and transformers does not load shards without it; "
            f"{refetch(folder)}"
        )
    if pickled := ", ".join(sorted(path.name for path in folder.glob("*.bin"))):
        return CapaError(
            f"{folder}: no *.safetensors here (*.bin: {pickled}); load the model with transformers and re-save it with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    return CapaError(f"{folder}: no *.safetensors here; {refetch(folder)}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        repeated, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{repeated} appears twice")
    return entries


def _read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one shard by offset, and the dtypes of those that are neither BF16, F16 nor F32.

    Raises:
        CapaError: the shard is truncated or corrupt.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix == b"version ":
                raise CapaError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in the folder")
            if len(prefix) < 8 or (length <= _MAX_HEADER and size < 8 + length):
                raise CapaError(f"{path}: truncated: {size} bytes, not even its header is whole; download it again")
            raw = file.read(length) if length <= _MAX_HEADER else b""
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        others = {name: str(entry["dtype"]) for name, entry in header.items() if entry["dtype"] not in _DTYPES}
        tensors = sorted(
            (_stored_tensor(path, 8 + length, name, entry) for name, entry in header.items()),
            key=lambda tensor: tensor.offset,
        )
    except OSError as error:
        raise CapaError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CapaError(f"{path}: corrupt header: {error}; download it again") from error
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise CapaError(f"{path}: corrupt header: gap or overlap before tensor {tensor.name}; download it again")
        end += tensor.nbytes
    if size != end:
        state = "truncated" if size < end else "too long"
        raise CapaError(f"{path}: {state}: {size} bytes, its header says {end}; download it again")
    return {tensor.name: tensor for tensor in tensors}, others


def _stored_tensor(path: Path, data_start: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = (_DTYPES | _PACKED).get(entry["dtype"])
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor {name} has a bad shape or offset")
    needed = end - begin if dtype is None else prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise ValueError(f"tensor {name} has {end - begin} bytes, shape {list(shape)} needs {needed}")
    return StoredTensor(
        name=name,
        path=path,
        numpy_dtype=np.dtype(np.void) if dtype is None else dtype,
        shape=shape,
        offset=data_start + begin,
        nbytes=end - begin,
    )
