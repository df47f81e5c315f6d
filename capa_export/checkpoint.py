"""Opens a checkpoint folder or hub id: its config, and where every tensor lies, without reading the weights."""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import ml_dtypes
import numpy as np

from capa_export.confined import is_name
from capa_export.errors import CapaError, ExitCode

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
"""Called with a file's or tensor's name, the bytes done and the bytes in all."""

CHUNK_ELEMENTS = 1 << 20
"""Elements read at once: small enough to stay in cache while they are converted."""

_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer*", "*.model")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where one tensor lies on disk."""

    name: str
    """As stored, whatever it is renamed to."""
    path: Path
    """The shard."""
    numpy_dtype: "np.dtype[Any]"
    shape: tuple[int, ...]
    offset: int
    """Absolute, in bytes from the start of the shard."""
    nbytes: int

    @property
    def dtype(self) -> "ir.DataType":
        # Slow to import, and not needed to run a bundle.
        import onnx_ir as ir

        return ir.DataType.from_numpy(self.numpy_dtype)

    def mapped(self) -> "np.ndarray[Any, Any]":
        """The elements in their shape, mapped from the file rather than read."""
        return np.memmap(self.path, self.numpy_dtype, "r", self.offset, self.shape)

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
    """By stored name, in the order of shards and of offsets."""
    translation: Path | None = None
    """Where a family put config, tokenizer and processor files that transformers reads, where `folder` has others."""

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
        shards = {tensor.path for tensor in self.tensors.values()}
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
    folder = _folder(source, revision, _FILES)
    config = _config(folder)
    tensors: dict[str, StoredTensor] = {}
    for shard in _shards(folder):
        for tensor in _read_header(shard):
            if tensor.name in tensors:
                raise CapaError(
                    f"{folder}: tensor {tensor.name} is in {tensors[tensor.name].path.name} and in {shard.name}; "
                    "remove the file that does not belong to this checkpoint"
                )
            tensors[tensor.name] = tensor
    _check_index(folder, tensors)
    return Checkpoint(folder=folder, config=config, tensors=MappingProxyType(tensors))


def fetch_config(source: str, *, revision: str | None = None) -> dict[str, Any]:
    """`config.json` of a local folder or a hub id, and nothing else of it.

    Raises:
        CapaError: it cannot be found or read.
    """
    return _config(_folder(source, revision, ("config.json",)))


def fetch_json(source: str, names: Iterable[str], *, revision: str | None = None) -> dict[str, dict[str, Any]]:
    """Those of some JSON files that a local folder or a hub id has, by name, and nothing else of it.

    Raises:
        CapaError: it cannot be found, or one cannot be read.
    """
    folder = _folder(source, revision, tuple(names))
    return {name: read_json(folder / name) for name in names if (folder / name).is_file()}


def canonical_name(stored: str, rules: Sequence[tuple[str, str]]) -> str:
    """A tensor's name by the first rule (pattern of a prefix, replacement) that matches it."""
    matches = ((re.match(pattern, stored), new) for pattern, new in rules)
    return next((match.expand(new) + stored[match.end() :] for match, new in matches if match), stored)


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """Where the tensors of one safetensors file lie.

    Raises:
        CapaError: the file is missing, truncated or corrupt.
    """
    return {tensor.name: tensor for tensor in _read_header(path)}


def _folder(source: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The local folder, or the one in the hub cache with the files that match `patterns`."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CapaError(f"{source}: is a local folder; --revision only applies to hub ids", ExitCode.USAGE)
        return folder
    if folder.exists():
        raise CapaError(f"{source}: no such folder, it is a file; pass the folder that holds config.json and weights")
    if _HUB_ID.fullmatch(source):
        return _downloaded(source, revision, patterns)
    raise CapaError(f"{source}: no such folder; pass a folder that holds config.json, or a hub id like owner/name")


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json", "a checkpoint folder holds config.json beside the weights")


def _downloaded(hub_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # One line says it: the client's own warnings and retries are noise above it.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    what = f"{hub_id}@{revision}" if revision else hub_id
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        problem, cause = "is gated; accept its licence on its hub page, then run `hf auth login`", error
    except RevisionNotFoundError as error:
        problem, cause = "the hub has no such revision; check the branch, tag or commit", error
    except RepositoryNotFoundError as error:
        problem, cause = "no such folder, and no such model on the hub; if it is private, run `hf auth login`", error
    except LocalEntryNotFoundError as error:
        where = f"run `hf download {hub_id}` where there is a network, and pass the folder it prints"
        problem, cause = f"no such folder, no hub within reach, and not in the local hub cache; {where}", error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        problem, cause = f"download failed: {first_line}; run it again, files that are complete are kept", error
    raise CapaError(f"{what}: {problem}") from cause


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


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard name, of the index; empty where there is none."""
    path = folder / _INDEX
    if not path.exists():
        return {}
    weight_map = read_json(path).get("weight_map")
    if isinstance(weight_map, dict):
        entries = cast("dict[str, object]", weight_map)
        shards = {name: shard for name, shard in entries.items() if isinstance(shard, str)}
        if shards and len(shards) == len(entries):
            return shards
    raise CapaError(f"{path}: has no weight_map of tensor names to shards; download it again")


def _shards(folder: Path) -> list[Path]:
    """The shards that make up the checkpoint, all of which exist."""
    weight_map = _weight_map(folder)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if weight_map:
        names = sorted(set(weight_map.values()))
    elif "model.safetensors" in found:
        names = ["model.safetensors"]
    elif found:
        raise CapaError(
            f"{folder}: no {_INDEX} beside {found[0]}, and transformers does not load shards without it; "
            "download it from where the weights were published"
        )
    else:
        held = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "none either"
        raise CapaError(
            f"{folder}: no *.safetensors here (*.bin: {held}); load the model with transformers and re-save it with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    for name in names:
        if not is_name(name):
            raise CapaError(f"{folder / _INDEX}: shard {name} lies outside the folder; download the index again")
        if not (folder / name).is_file():
            raise CapaError(f"{folder / name}: shard not found, though {_INDEX} names it; download it again")
    return [folder / name for name in names]


def _check_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    for name, shard in _weight_map(folder).items():
        if name not in tensors or tensors[name].path != folder / shard:
            raise CapaError(f"{folder / shard}: has no tensor {name}, which {_INDEX} puts there; download both again")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        repeated, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{repeated} appears twice")
    return entries


def _read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one shard, by offset.

    Raises:
        CapaError: the shard is truncated or corrupt, or holds a dtype other than bf16, fp16 and fp32.
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
    return tensors


def _stored_tensor(path: Path, data_start: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise CapaError(
            f"{path}: tensor {name} is {entry['dtype']}; only BF16, F16 and F32 weights are supported: "
            "use the checkpoint that is not quantized"
        )
    dtype = _DTYPES[entry["dtype"]]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor {name} has a bad shape or offset")
    needed = prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise ValueError(f"tensor {name} has {end - begin} bytes, shape {list(shape)} needs {needed}")
    return StoredTensor(
        name=name, path=path, numpy_dtype=dtype, shape=shape, offset=data_start + begin, nbytes=end - begin
    )
