"""A checkpoint as its family reads it: dimensions, and every tensor by the name that the graphs give it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError
from capa_export.config.quantization import check_groups, looks_at_samples, rounding_group
from capa_export.model.checkpoint import Checkpoint, StoredTensor, canonical_name
from capa_export.model.families import Family, LayoutFamily
from capa_export.model.quantized.choice import WeightChoice
from capa_export.model.quantized.expanded import expanded
from capa_export.model.quantized.packed import BlockForm
from capa_export.model.quantized.rounded import rounded
from capa_export.model.quantized.tensor import QuantizedTensor

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
    quantize: str | None = None
    """How a recipe has the weights quantized."""
    choice: WeightChoice | None = None
    """What samples decided of the weights that are rounded."""

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, family: Family, quantize: str | None = None, choice: WeightChoice | None = None
    ) -> "Source":
        """Read the dimensions and name the tensors; quantized weights stand expanded among them.

        Args:
            checkpoint: as it was opened.
            family: that reads it.
            quantize: as `config.quantization` has it.
            choice: what samples decided; where they were to decide and did not, weights that are to be rounded cannot
                be read.

        Raises:
            CapaError: the checkpoint is another architecture or in another format, or lacks something; or its weights
                cannot be quantized so.
        """
        checkpoint = expanded(checkpoint)
        if isinstance(family, LayoutFamily):
            checkpoint = family.translated(checkpoint)
        dims = family.model_dims(checkpoint.config, where=str(checkpoint.folder / "config.json"))
        tensors = checkpoint.renamed(family.RENAMES)
        _check_depth(checkpoint, dims, [canonical_name(name, family.RENAMES) for name in checkpoint.names])
        if (group := rounding_group(quantize)) is not None:
            check_groups(quantize, dims.decoder)
            tensors = rounded(tensors, group, choice, waits=choice is None and looks_at_samples(quantize))
        if dims.decoder.ties_missing_head:
            tensors = tied(tensors)
        source = cls(checkpoint, family, dims, tensors, quantize, choice)
        group = next((form.group for form in source.block_forms().values()), None)
        return replace(source, dims=replace(dims, decoder=replace(dims.decoder, packed_group=group)))

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded that the checkpoint has plain."""
        return rounding_group(self.quantize) is not None

    @property
    def quantized(self) -> Mapping[str, QuantizedTensor]:
        """The quantized tensors by the graph's names."""
        return {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, QuantizedTensor)}

    def block_forms(self) -> Mapping[str, BlockForm]:
        """The forms of those that graphs are to hold as INT4, by the graph's names."""
        if self.quantize == "none":
            return {}
        forms = {name: tensor.block_form() for name, tensor in self.quantized.items()}
        return {name: form for name, form in forms.items() if isinstance(form, BlockForm)}


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
