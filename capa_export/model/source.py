"""A checkpoint as its family reads it: dimensions, and every tensor by the name that the graphs give it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError
from capa_export.base.weight_types import WEIGHT_TYPES, PackedLayers
from capa_export.config.quantization import check_groups, looks_at_samples, rounding
from capa_export.model.checkpoint import Checkpoint, StoredTensor, canonical_name
from capa_export.model.families import Family, LayoutFamily
from capa_export.model.quantized.choice import WeightChoice
from capa_export.model.quantized.expanded import expanded
from capa_export.model.quantized.packed import BlockForm
from capa_export.model.quantized.rounded import RoundedTensor, rounded, rounded_alone, tower_products
from capa_export.model.quantized.tensor import HEAD, QuantizedTensor

__all__ = ["EMBEDDING", "HEAD", "Source", "tied"]

EMBEDDING = "model.embed_tokens.weight"
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
    """What a recipe has the weights of the decoder's layers be."""
    choice: WeightChoice | None = None
    """What samples decided of the weights that are rounded."""

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        family: Family,
        quantize: str | None = None,
        choice: WeightChoice | None = None,
        *,
        quantize_head: str = "none",
        quantize_vision: str = "none",
    ) -> "Source":
        """Read the dimensions and name the tensors; quantized weights stand expanded among them.

        Args:
            checkpoint: as it was opened.
            family: that reads it.
            quantize: as `config.quantization` has it.
            choice: what samples decided; where they were to decide and did not, weights that are to be rounded cannot
                be read.
            quantize_head: what the weight of the LM head is to be. The embedding stays as it is where they share one.
            quantize_vision: what the weights of the vision tower's blocks are to be.

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
        check_groups(quantize, quantize_head, dims.decoder)
        if (form := rounding(quantize)) is not None:
            tensors = rounded(tensors, form, choice, waits=choice is None and looks_at_samples(quantize))
        if dims.decoder.ties_missing_head:
            tensors = tied(tensors)
        if (form := rounding(quantize_head)) is not None:
            tensors = rounded_alone(tensors, [HEAD], form, option="--quantize-head")
        if (form := rounding(quantize_vision)) is not None:
            names = tower_products(tensors, dims.vision.num_blocks)
            tensors = rounded_alone(tensors, [*names], form, option="--quantize-vision")
        source = cls(checkpoint, family, dims, tensors, quantize, choice)
        forms = dict(source.block_forms())
        vision = [forms.pop(name) for name in source.rounded_tower]
        head, layers = _held(forms.pop(HEAD, None)), _held(next(iter(forms.values()), None))
        plain = 0 if choice is None else len(choice.plain)
        decoder = replace(dims.decoder, packed=layers, num_plain=plain, packed_head=head)
        tower = _held(next(iter(vision), None))
        return replace(source, dims=replace(dims, decoder=decoder, packed_vision=tower))

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded that the checkpoint has plain."""
        return self.rounds_layers or self.head_alone or bool(self.rounded_tower)

    @property
    def rounded_tower(self) -> Sequence[str]:
        """The names of the vision tower's weights that are rounded."""
        return [name for name, tensor in self.quantized.items() if tensor.of_tower]

    @property
    def rounds_layers(self) -> bool:
        """Whether those of the decoder's layers are."""
        layers = (tensor for name, tensor in self.quantized.items() if name != HEAD and not tensor.of_tower)
        return rounding(self.quantize) is not None and all(isinstance(tensor, RoundedTensor) for tensor in layers)

    @property
    def head_alone(self) -> bool:
        """Whether the head's is, which then is another than the embedding's even where the config ties them."""
        return isinstance(self.tensors.get(HEAD), RoundedTensor)

    @property
    def quantized(self) -> Mapping[str, QuantizedTensor]:
        """The quantized tensors by the graph's names."""
        return {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, QuantizedTensor)}

    def block_forms(self) -> Mapping[str, BlockForm]:
        """The forms of those that graphs are to hold in few bits, by the graph's names."""
        forms = {name: self.form_of(tensor) for name, tensor in self.quantized.items()}
        return {name: form for name, form in forms.items() if isinstance(form, BlockForm)}

    def form_of(self, tensor: QuantizedTensor) -> BlockForm | str:
        """How graphs hold a quantized tensor in few bits, or why they do not."""
        if isinstance(tensor, RoundedTensor):
            return tensor.block_form()
        if self.quantize == "none":
            return "as asked"
        form, asked = tensor.block_form(), rounding(self.quantize)
        if isinstance(form, str) or WEIGHT_TYPES[form.kind].stays or (asked and asked.kind == form.kind):
            return form
        return f"{WEIGHT_TYPES[form.kind].name} stays where --quantize {form.kind} is given"


def _held(form: BlockForm | None) -> PackedLayers | None:
    return None if form is None else PackedLayers(kind=form.kind, group=form.group, has_zeros=form.has_zeros)


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
