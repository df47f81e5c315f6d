"""What the eager model is given: the decoder's inputs, and the changes to make to the dense model.

T = prompt tokens, V = visual tokens, D = hidden size, K = tokens kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from capa_export.model.families import Family, require_selection
from capa_export.selectors.selector import CAPA, Place, PromptInput, SelectorChoice, prompt_inputs

if TYPE_CHECKING:
    from capa_export.model.prompt import Prompt

__all__ = ["EagerInputs", "EagerPlan", "inputs_for"]


class EagerInputs(NamedTuple):
    """The arrays that a family feeds the Hugging Face decoder."""

    embeds: Tensor
    """[1, T, D]"""
    position_ids: Tensor
    """[3, 1, T] or [1, T]"""
    deepstack: Sequence[Tensor] = ()
    """[V, D] each: what the outputs of the first layers gain at visual tokens."""
    prompted: Mapping[PromptInput, Tensor] = MappingProxyType({})
    """The prompt's properties that selectors read, as in `TensorView`."""

    @classmethod
    def of(cls, given: "EagerInputs | tuple[Tensor, Tensor]") -> "EagerInputs":
        """The inputs of whatever a family returned."""
        return given if isinstance(given, cls) else cls(given[0], given[1])

    @property
    def position_shape(self) -> tuple[int, ...]:
        """Shape of one token's position: (3, 1, 1) for mRoPE, (1, 1) for plain positions."""
        return (*self.position_ids.shape[:-1], 1)

    @property
    def next_position(self) -> int:
        """Position of the first answer token: behind all of the prompt, whatever is dropped."""
        return int(self.position_ids.max()) + 1

    def arguments(self, is_visual: Tensor) -> dict[str, Any]:
        """Arguments of the decoder's own forward pass; `is_visual` is [T] bool."""
        given: dict[str, Any] = {"inputs_embeds": self.embeds, "position_ids": self.position_ids}
        if self.deepstack:
            given |= {"visual_pos_masks": is_visual[None], "deepstack_visual_embeds": list(self.deepstack)}
        return given


@dataclass(frozen=True)
class EagerPlan:
    """The changes to make to the dense model; none by default."""

    keep: Mapping[int, int] = field(default_factory=dict)
    """Layer -> visual tokens kept from there on; -1 before the decoder."""
    scales: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> alpha [D] that stands for the FFN of visual tokens."""
    selectors: Mapping[int, SelectorChoice] = field(default_factory=dict)
    """Layer -> what chooses the tokens kept; CAPA where it says nothing."""
    forced: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> prompt positions to keep whatever the scores say."""
    random_seed: int | None = None
    """Keep random visual tokens instead: the baseline every method has to beat."""
    min_keep_per_image: int = 0
    """Visual tokens that each image keeps whatever the others score."""
    jitter: float = 0.0
    """Relative noise on what selectors read: shows how near to ties their choices are."""

    def chosen(self, layer: int) -> SelectorChoice:
        return self.selectors.get(layer, CAPA)

    def prunes(self, layer: int, place: Place) -> bool:
        """Whether a stage of this layer acts at this place."""
        return layer in self.keep and self.chosen(layer).place == place

    @property
    def reads(self) -> tuple[PromptInput, ...]:
        """The prompt's properties that the selectors read."""
        return prompt_inputs(self.chosen(layer) for layer in self.keep)


@torch.no_grad()
def inputs_for(plan: EagerPlan, family: Family, model: Any, prompt: "Prompt") -> EagerInputs:
    """The decoder's inputs, with the properties that the plan's selectors read.

    Raises:
        CapaError: the family's vision tower does not give it.
    """
    inputs = EagerInputs.of(family.eager_inputs(model, prompt))
    prompted: dict[PromptInput, Tensor] = {}
    if "visual_grid" in plan.reads:
        prompted["visual_grid"] = torch.from_numpy(prompt.visual_grid)
    if asking := [chosen.name for chosen in map(plan.chosen, plan.keep) if chosen.reads_tower]:
        tower = require_selection(family, asking[0]).eager_selection(model, prompt)
        for key, values in zip(("visual_saliency", "visual_features"), tower, strict=True):
            whole = values.new_zeros(len(prompt.input_ids), *values.shape[1:], dtype=torch.float32)
            whole[torch.from_numpy(prompt.is_visual)] = values.float()
            prompted[key] = whole
    return inputs._replace(prompted=prompted)
