"""CAPA on the Hugging Face model itself: its own modules, called layer by layer. Shares no code with the graphs.

T = prompt tokens, V = visual tokens, D = hidden size, H = query heads, G = KV heads, d = head size, K = tokens kept.
"""

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

__all__ = ["Eager", "EagerInputs", "EagerPlan", "Prefill", "Watch"]


Watch = Callable[[int, Tensor, Tensor], None]
"""Told the layer, the hidden states [T, D] that leave it, and their prompt positions [T]; a step has none of these."""


class EagerInputs(NamedTuple):
    """What a family feeds the Hugging Face decoder."""

    embeds: Tensor
    """[1, T, D]"""
    position_ids: Tensor
    """[3, 1, T] or [1, T]"""
    deepstack: Sequence[Tensor] = ()
    """[V, D] each: what the outputs of the first layers gain at visual tokens."""

    @classmethod
    def of(cls, given: "EagerInputs | tuple[Tensor, Tensor]") -> "EagerInputs":
        """Whatever a family returned."""
        return given if isinstance(given, cls) else cls(given[0], given[1])

    def arguments(self, is_visual: Tensor) -> dict[str, Any]:
        """Of the decoder's own forward pass; `is_visual` is [T] bool."""
        given: dict[str, Any] = {"inputs_embeds": self.embeds, "position_ids": self.position_ids}
        if self.deepstack:
            given |= {"visual_pos_masks": is_visual[None], "deepstack_visual_embeds": list(self.deepstack)}
        return given


@dataclass(frozen=True)
class EagerPlan:
    """What to do to the dense model; the default is nothing."""

    keep: Mapping[int, int] = field(default_factory=dict)
    """Layer -> visual tokens kept from there on."""
    scales: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> alpha [D] that stands for the FFN of visual tokens."""
    forced: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> prompt positions to keep whatever the scores say."""
    random_seed: int | None = None
    """Keep random visual tokens instead: the baseline every method has to beat."""
    min_keep_per_image: int = 0
    """Visual tokens that each image keeps whatever the others score."""


@dataclass
class Prefill:
    """What a prefill leaves behind."""

    logits: Tensor
    """[V], last position."""
    cache: Any
    """transformers' DynamicCache; layers differ in length."""
    kept: dict[int, Tensor]
    """Layer -> prompt positions [K] that survive it, ascending."""
    scores: dict[int, Tensor]
    """Layer -> contribution of each token that entered it [T], text included."""
    position_shape: tuple[int, ...]
    """Of one token's position: (3, 1, 1) for mRoPE, (1, 1) for plain positions."""
    next_position: int
    """Of the first answer token: behind all of the prompt, whatever was dropped."""


class _FrozenCache:
    """Stands in for the cache when the last query is run again: it is in there already."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class Eager:
    """A Hugging Face VLM whose decoder is run by hand."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.text = model.model.language_model
        self.head = model.lm_head

    @torch.no_grad()
    def prefill(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        is_visual: Tensor,
        plan: EagerPlan,
        deepstack: Sequence[Tensor] = (),
        watch: Watch | None = None,
    ) -> Prefill:
        """Run the prompt; the tensors are those of `EagerInputs`, and `is_visual` is [T] bool."""
        from transformers import DynamicCache

        cache = DynamicCache()
        positions = torch.arange(embeds.shape[1])
        kept: dict[int, Tensor] = {}
        scores: dict[int, Tensor] = {}
        hidden = embeds
        rotary = self.text.rotary_emb(hidden, position_ids)
        for index, layer in enumerate(self.text.layers):
            normed = layer.input_layernorm(hidden)
            mixed, _ = layer.self_attn(normed, attention_mask=None, position_embeddings=rotary, past_key_values=cache)
            hidden = hidden + mixed
            if index in plan.keep:
                stored = cast("Any", cache.layers[index])
                scores[index] = self._contribution(layer.self_attn, normed, rotary, stored.keys, stored.values)
                if index in plan.forced:
                    rows = torch.isin(positions, plan.forced[index]).nonzero()[:, 0]
                else:
                    rows = _best(scores[index], is_visual, plan.keep[index], plan)
                rows_of_visual = torch.isin(is_visual.nonzero()[:, 0], rows)
                deepstack = [features[rows_of_visual] for features in deepstack]
                hidden, positions, is_visual = hidden[:, rows], positions[rows], is_visual[rows]
                rotary = tuple(table[:, rows] for table in rotary)
                stored.keys, stored.values = stored.keys[:, :, rows], stored.values[:, :, rows]
                kept[index] = positions
            after = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            if index in plan.scales:
                after = torch.where(is_visual[:, None], hidden * plan.scales[index], after)
            if index < len(deepstack):
                after = self.text._deepstack_process(after, is_visual[None], deepstack[index])
            hidden = after.to(embeds.dtype)
            if watch is not None:
                watch(index, hidden[0], positions)
        return Prefill(
            self._logits(hidden), cache, kept, scores, (*position_ids.shape[:-1], 1), int(position_ids.max()) + 1
        )

    @torch.no_grad()
    def step(self, run: Prefill, token: int, position: int, watch: Watch | None = None) -> Tensor:
        """Logits [V] after one more text token at `position`; the run's cache grows by it."""
        hidden = embeds = self.text.embed_tokens(torch.tensor([[token]]))
        rotary = self.text.rotary_emb(embeds, torch.full(run.position_shape, position))
        for index, layer in enumerate(self.text.layers):
            mixed, _ = layer.self_attn(
                layer.input_layernorm(hidden),
                attention_mask=None,
                position_embeddings=rotary,
                past_key_values=run.cache,
            )
            hidden = hidden + mixed
            hidden = (hidden + layer.mlp(layer.post_attention_layernorm(hidden))).to(embeds.dtype)
            if watch is not None:
                watch(index, hidden[0], torch.empty(0, dtype=torch.long))
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(self.text.norm(hidden[:, -1]))[0].float()

    def _contribution(
        self, attention: Any, normed: Tensor, rotary: Sequence[Tensor], keys: Tensor, values: Tensor
    ) -> Tensor:
        """|| sum_h A_{i,h} v_i W_O,h ||_2 for the last query (CAPA, eq. 2), head by head as the paper writes it."""
        with _attention_weights(attention.config):
            last = tuple(table[:, -1:] for table in rotary)
            _, weights = attention(
                normed[:, -1:],
                attention_mask=None,
                position_embeddings=last,
                past_key_values=_FrozenCache(keys, values),
            )
        weights = weights[0, :, 0].float()
        values = values[0].float().repeat_interleave(weights.shape[0] // values.shape[1], dim=0)
        output = attention.o_proj.weight.float().split(values.shape[-1], dim=1)
        total = sum(weights[h][:, None] * (values[h] @ output[h].T) for h in range(weights.shape[0]))
        return torch.linalg.vector_norm(total, dim=-1)


@contextmanager
def _attention_weights(config: Any) -> Generator[None]:
    """Use the attention implementation that returns its probabilities."""
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def _best(scores: Tensor, is_visual: Tensor, keep: int, plan: EagerPlan) -> Tensor:
    """Rows of all text and of `keep` visual tokens, ascending: each image's best few, then the best of the rest."""
    visual = is_visual.nonzero()[:, 0]
    if plan.random_seed is None:
        # A stable sort breaks ties to the lowest.
        order = torch.sort(scores[visual].nan_to_num(nan=-1.0), descending=True, stable=True).indices
    else:
        order = torch.randperm(len(visual), generator=torch.Generator().manual_seed(plan.random_seed))
    first: list[int] = []
    rest: list[int] = []
    kept_of_image: Counter[int] = Counter()
    images = (~is_visual).cumsum(0)
    for row in visual[order].tolist():
        image = int(images[row])
        (first if kept_of_image[image] < plan.min_keep_per_image else rest).append(row)
        kept_of_image[image] += 1
    rows = torch.cat([(~is_visual).nonzero()[:, 0], torch.tensor((first + rest)[:keep], dtype=torch.long)])
    return rows.sort().values
