"""Weights that stay in the checkpoint's own shards: the bundle links to them and holds no copy."""

import json
import os
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.precision import FORMATS
from capa_export.model.checkpoint import Checkpoint, StoredTensor, open_tensors
from capa_export.model.quantized.tensor import quantization

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["EMBEDDING_FILE", "Shards", "embedding_of"]

_WEIGHTS = "weights"
EMBEDDING_FILE, _POINTER = "embedding.safetensors", "embedding.json"
_NAMES = {form.array: name for name, form in FORMATS.items()}


class Shards:
    """The shards of a checkpoint, as the ONNX files of a bundle find them."""

    def __init__(self, checkpoint: Checkpoint, precision: str) -> None:
        """Take a checkpoint whose weights need no conversion.

        Args:
            checkpoint: whose weights stay where they are.
            precision: fp16, bf16 or fp32, of the graphs.

        Raises:
            CapaError: most weights are of another precision, some are quantized, or one lies where its dtype cannot
                be read.
        """
        if (quantized := quantization(checkpoint.tensors)) is not None:
            raise CapaError(
                f"{checkpoint.folder}: {quantized} are expanded to {precision} as they are written; "
                "leave --weights in-place away"
            )
        self._folder = checkpoint.folder
        self._shards = sorted({tensor.path for tensor in checkpoint.tensors.values()})
        sizes: Counter[str] = Counter()
        for tensor in checkpoint.tensors.values():
            sizes[_NAMES[tensor.numpy_dtype.name]] += tensor.nbytes
            if tensor.offset % tensor.numpy_dtype.itemsize:
                raise CapaError(
                    f"{tensor.path}: tensor {tensor.name} starts at byte {tensor.offset}, no multiple of its "
                    f"{tensor.numpy_dtype.itemsize}; re-save it with save_pretrained, or leave --weights in-place away"
                )
        stored = sizes.most_common(1)[0][0]
        if stored != precision:
            raise CapaError(
                f"{checkpoint.folder}: its weights are {stored}, --precision {precision} converts them; build with "
                f"--precision {stored}, or leave --weights in-place away"
            )

    def location(self, tensor: StoredTensor) -> str:
        """Path of a tensor's shard, relative to the folder of the ONNX files."""
        return f"{_WEIGHTS}/{tensor.path.relative_to(self._folder).as_posix()}"

    def external(self, tensor: StoredTensor, folder: Path) -> "ir.ExternalTensor":
        """A tensor as ONNX files in `folder` refer to it."""
        import onnx_ir as ir

        return ir.ExternalTensor(
            self.location(tensor),
            tensor.offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=tensor.name,
            base_dir=folder,
        )

    def point_to_embedding(self, tensor: StoredTensor, folder: Path) -> None:
        """Write where the token embedding lies, in place of a copy of it."""
        pointer = {"file": self.location(tensor), "tensor": tensor.name}
        (folder / _POINTER).write_text(json.dumps(pointer, indent=2) + "\n", encoding="utf-8")

    @contextmanager
    def linked(self, tensors: Iterable[StoredTensor], folder: Path) -> Generator[dict[str, str]]:
        """Link the shards of these tensors into `folder` when the block ends; within it, empty files stand for them.

        The ONNX checker refuses a file that has several hard links, whatever it holds: the block is the place to
        call it. No link is ever opened for writing: that would change the checkpoint.

        Yields:
            The shards' names in the checkpoint, by location.

        Raises:
            CapaError: the file system does not link them.
        """
        shards = dict(sorted({(self.location(tensor), tensor.path) for tensor in tensors}))
        for location, shard in shards.items():
            place = folder / location
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("xb") as file:
                file.truncate(shard.stat().st_size)
        yield {location: shard.relative_to(self._folder).as_posix() for location, shard in shards.items()}
        for location, shard in shards.items():
            (folder / location).unlink()
            _link(shard, folder / location)

    def try_to_link(self, folder: Path) -> None:
        """Link every shard into a folder that will go, to see whether it can be done.

        Raises:
            CapaError: it cannot.
        """
        for index, shard in enumerate(self._shards):
            _link(shard, folder / str(index))


def _link(shard: Path, place: Path) -> None:
    try:
        # In a hub cache, shards are symbolic links, and ONNX Runtime follows none that leave the folder.
        os.link(shard.resolve(), place)
    except OSError as error:
        raise CapaError(
            f"{shard}: cannot be linked into {place.parent}: {error.strerror}; choose an --out on the same disk, "
            "or leave --weights in-place away"
        ) from error


def embedding_of(folder: Path) -> StoredTensor:
    """The token embedding [V, D] of a bundle's `llm` folder.

    Raises:
        CapaError: it is missing, or its file is damaged.
    """
    path, pointer = folder / EMBEDDING_FILE, {"file": EMBEDDING_FILE, "tensor": "embedding"}
    try:
        if (folder / _POINTER).exists():
            path = folder / _POINTER
            pointer = json.loads(path.read_text(encoding="utf-8"))
        return open_tensors(folder / pointer["file"])[pointer["tensor"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CapaError(f"{path}: names no embedding; build the bundle again", ExitCode.EXPORT) from error
