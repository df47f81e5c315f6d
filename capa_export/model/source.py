"""A checkpoint as its family reads it: dimensions, and every tensor by the name that the graphs give it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError
from capa_export.model.checkpoint import Checkpoint, StoredTensor, canonical_name
from capa_export.model.families import Family, LayoutFamily
from capa_export.model.quantized.expanded import expanded

__all__ = ["EMBEDDING", "HEAD", "Source", "tied"]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")


@dataclass(frozen=True)
class Source:
    """A checkpoint as its family reads it."""

    checkpoint: Checkpoint
    family: Family
    dims: ModelDims[Any]
    tensors: Mapping[str, StoredTensor]
    """Tensors by the graph's names."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, family: Family) -> "Source":
        """Read the dimensions and name the tensors; quantized weights stand expanded among them.

        Raises:
            CapaError: the checkpoint is another architecture or in another format, or lacks something.
        """
        checkpoint = expanded(checkpoint)
        if isinstance(family, LayoutFamily):
            checkpoint = family.translated(checkpoint)
        dims = family.model_dims(checkpoint.config, where=str(checkpoint.folder / "config.json"))
        tensors = checkpoint.renamed(family.RENAMES)
        _check_depth(checkpoint, dims, [canonical_name(name, family.RENAMES) for name in checkpoint.names])
        return cls(checkpoint, family, dims, tied(tensors) if dims.decoder.ties_missing_head else tensors)


def _check_depth(checkpoint: Checkpoint, dims: ModelDims[Any], names: Sequence[str]) -> None:
    """Hold the numbers of layers against the names of the tensors, before a graph of as many is written.

    Raises:
        CapaError: there are fewer than `config.json` says.
    """
    where = checkpoint.folder / "config.json"
    found = {int(match[1]) for match in map(_LAYER.match, names) if match}
    if found and dims.decoder.num_layers > max(found) + 1:
        raise CapaError(
            f"{where}: num_hidden_layers is {dims.decoder.num_layers}, but the weights have layers 0 to {max(found)}; "
            "use the config.json that was saved with these weights"
        )
    if dims.vision.num_blocks > len(names):
        raise CapaError(
            f"{where}: the vision tower has {dims.vision.num_blocks} blocks, for which {len(names)} tensors are too "
            "few; use the config.json that was saved with these weights"
        )


def tied(tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """The tensors of a checkpoint with tied embeddings: of embedding and LM head, the one stored stands for both.

    Where both are stored, each stands for itself, as in transformers.
    """
    for absent, stored in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
        if absent not in tensors and stored in tensors:
            return MappingProxyType({**tensors, absent: tensors[stored]})
    return tensors
