"""Pruning on the Hugging Face model itself: its own modules, called layer by layer. Shares no code with the graphs.

T = prompt tokens, V = visual tokens, D = hidden size, H = query heads, G = KV heads, d = head size, K = tokens kept.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.model.lockstep import RESIDENT, TOGETHER_BYTES, Pass, WeightSource, grouped, run_pass, together
from capa_export.model.threads import worthwhile_threads
from capa_export.selectors.selector import (
    TOKEN_AXIS,
    PromptInput,
    TensorView,
    load_selector,
)

__all__ = ["Eager", "EagerPrefill", "Watch", "best_rows"]


T = TypeVar("T")

Watch = Callable[[int, Tensor, Tensor], None]
"""A callback that takes a layer, the hidden states [T, D] that leave it, and their positions [T], none for a step."""


@dataclass
class EagerPrefill:
    """The result of a prefill."""

    logits: Tensor
    """[V], last position."""
    cache: Any
    """transformers' DynamicCache; layers differ in length."""
    kept: dict[int, Tensor]
    """Layer -> prompt positions [K] that survive it, ascending."""
    scores: dict[int, Tensor]
    """Layer -> score of each token that entered the stage [T]; what it says of text does not count."""
    position_shape: tuple[int, ...]
    """Shape of one token's position: (3, 1, 1) for mRoPE, (1, 1) for plain positions."""
    next_position: int
    """Position of the first answer token: behind all of the prompt, whatever was dropped."""


class _FrozenCache:
    """Stands in for the cache when the last query is run again: it is in there already."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class Eager:
    """A Hugging Face VLM whose decoder is run by hand.

    Args:
        model: its weights in memory, or none where `weights` has them.
        weights: holds those of a part of the model while it runs.
    """

    def __init__(self, model: Any, weights: WeightSource = RESIDENT) -> None:
        self.model, self.weights = model, weights
        self.text = model.model.language_model
        self.head = model.lm_head

    def run(self, passes: Sequence[Pass[T]]) -> list[T]:
        """Results of several passes that go through the model together, each part of it held once for all of them."""
        with worthwhile_threads(self.model):
            return run_pass(together(passes), partial(self.weights.holding, self.model))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's keys and values in all layers, in FP32."""
        config = self.text.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim

    def grouped(self, items: Iterable[T], length: Callable[[T], int], *, caches: int) -> Iterator[list[T]]:
        """Group what goes through the model together; one by one where the weights are in memory.

        Args:
            items: prompts in order, or what belongs to one each.
            length: tokens of an item's prompt.
            caches: number of caches held at once for each item.
        """
        size = caches * self.bytes_per_token
        return grouped(items, lambda item: size * length(item), 0 if self.weights is RESIDENT else TOGETHER_BYTES)

    def prefill(
        self, inputs: EagerInputs, is_visual: Tensor, plan: EagerPlan, watch: Watch | None = None
    ) -> EagerPrefill:
        """Run the prompt; `is_visual` is [T] bool."""
        return self.run([self.prefilling(inputs, is_visual, plan, watch=watch)])[0]

    def step(self, run: EagerPrefill, token: int, position: int, watch: Watch | None = None) -> Tensor:
        """Logits [V] after one more text token at `position`; the run's cache grows by it."""
        return self.run([self.stepping(run.cache, token, torch.full(run.position_shape, position), watch)])[0]

    @torch.no_grad()
    def prefilling(
        self,
        inputs: EagerInputs,
        is_visual: Tensor,
        plan: EagerPlan,
        cache: Any = None,
        watch: Watch | None = None,
    ) -> Pass[EagerPrefill]:
        """The pass of a prompt; `is_visual` is [T] bool, `cache` an empty one of transformers' that is to be filled."""
        from transformers import DynamicCache

        cache = DynamicCache() if cache is None else cache
        kept: dict[int, Tensor] = {}
        scores: dict[int, Tensor] = {}
        tokens = _LayerTokens(
            inputs.embeds,
            self.text.rotary_emb(inputs.embeds, inputs.position_ids),
            torch.arange(inputs.embeds.shape[1]),
            is_visual,
            inputs.deepstack,
            inputs.prompted,
        )

        def prune(stage: int, of_attention: Mapping[str, Tensor]) -> Tensor:
            nonlocal tokens
            scores[stage], rows = _choose(plan, stage, tokens, of_attention)
            tokens = tokens.at(rows)
            kept[stage] = tokens.positions
            return rows

        if plan.prunes(-1, "input"):
            prune(-1, {})
        for index, layer in enumerate(self.text.layers):
            yield index
            normed = layer.input_layernorm(tokens.hidden)
            mixed, _ = _attend(layer.self_attn, normed, tokens.rotary, cache)
            tokens = replace(tokens, hidden=tokens.hidden + mixed)
            of_attention: dict[str, Tensor] = {}
            stored = cache.layers[index]
            if plan.prunes(index, "attention") or plan.prunes(index + 1, "entry"):
                of_attention = _of_attention(layer.self_attn, normed, tokens.rotary, stored.keys, stored.values)
            if plan.prunes(index, "attention"):
                rows = prune(index, of_attention)
                stored.keys, stored.values = stored.keys[:, :, rows], stored.values[:, :, rows]
            hidden = tokens.hidden
            after = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            if index in plan.scales:
                after = torch.where(tokens.is_visual[:, None], hidden * plan.scales[index], after)
            if index < len(tokens.deepstack):
                after = self.text._deepstack_process(after, tokens.is_visual[None], tokens.deepstack[index])
            tokens = replace(tokens, hidden=after.to(inputs.embeds.dtype))
            if plan.prunes(index + 1, "entry"):
                prune(index + 1, of_attention)
            if watch is not None:
                watch(index, tokens.hidden[0], tokens.positions)
        yield "head"
        return EagerPrefill(
            self._logits(tokens.hidden), cache, kept, scores, inputs.position_shape, inputs.next_position
        )

    @torch.no_grad()
    def stepping(self, cache: Any, token: int, position_ids: Tensor, watch: Watch | None = None) -> Pass[Tensor]:
        """The pass of one more text token, to logits [V]; the cache grows by it as the pass goes through the layers.

        Args:
            cache: of the tokens before it; each layer's part is complete when the pass comes to it.
            token: its id.
            position_ids: of that token, [3, 1, 1] or [1, 1].
            watch: told what leaves each layer.
        """
        hidden = embeds = self.text.embed_tokens(torch.tensor([[token]]))
        rotary = self.text.rotary_emb(embeds, position_ids)
        for index, layer in enumerate(self.text.layers):
            yield index
            mixed, _ = _attend(layer.self_attn, layer.input_layernorm(hidden), rotary, cache)
            hidden = hidden + mixed
            hidden = (hidden + layer.mlp(layer.post_attention_layernorm(hidden))).to(embeds.dtype)
            if watch is not None:
                watch(index, hidden[0], torch.empty(0, dtype=torch.long))
        yield "head"
        return self._logits(hidden)

    def following(
        self,
        inputs: EagerInputs,
        is_visual: Tensor,
        plan: EagerPlan,
        tokens: Sequence[int],
        watch: Watch | None = None,
    ) -> Pass[tuple[EagerPrefill, list[Tensor]]]:
        """The pass of a prompt and of known tokens behind it, to the prefill and logits [V] before and behind each.

        Args:
            inputs: of the prompt.
            is_visual: [T] bool.
            plan: the pruning.
            tokens: ids, which follow the prompt through the layers.
            watch: told what leaves each layer.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        positions = (torch.full(inputs.position_shape, inputs.next_position + step) for step in range(len(tokens)))
        passes: list[Pass[Any]] = [self.prefilling(inputs, is_visual, plan, cache, watch)]
        passes += [self.stepping(cache, *step, watch) for step in zip(tokens, positions, strict=True)]
        run, *behind = yield from together(passes)
        return run, [run.logits, *behind]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(self.text.norm(hidden[:, -1]))[0].float()


@dataclass(frozen=True)
class _LayerTokens:
    """The arrays that travel down the layers."""

    hidden: Tensor
    """[1, T, D]"""
    rotary: Sequence[Tensor]
    """cos and sin, [1, T, d] each."""
    positions: Tensor
    """[T] in the prompt."""
    is_visual: Tensor
    """[T] bool."""
    deepstack: Sequence[Tensor]
    """[V, D] each."""
    prompted: Mapping[PromptInput, Tensor]
    """The properties of the whole prompt that selectors read."""

    def at(self, rows: Tensor) -> "_LayerTokens":
        """The given rows of all arrays."""
        rows_of_visual = torch.isin(self.is_visual.nonzero()[:, 0], rows)
        return replace(
            self,
            hidden=self.hidden[:, rows],
            rotary=tuple(table[:, rows] for table in self.rotary),
            positions=self.positions[rows],
            is_visual=self.is_visual[rows],
            deepstack=[features[rows_of_visual] for features in self.deepstack],
        )


def _attend(attention: Any, normed: Tensor, rotary: Sequence[Tensor], cache: Any) -> tuple[Tensor, Any]:
    """An attention module's output, and its weights where its implementation has them."""
    named = {_cache_argument(type(attention)): cache}
    return attention(normed, attention_mask=None, position_embeddings=rotary, **named)


@lru_cache
def _cache_argument(attention: type[Any]) -> str:
    """The name of the cache among the arguments of an attention module: another from transformers 5.24 on."""
    return "cache" if "cache" in signature(attention.forward).parameters else "past_key_values"


def _of_attention(
    attention: Any, normed: Tensor, rotary: Sequence[Tensor], keys: Tensor, values: Tensor
) -> dict[str, Tensor]:
    """The FP32 views of an attention that a selector may read: see `TensorView`."""
    with _attention_weights(attention.config):
        last = tuple(table[:, -1:] for table in rotary)
        _, weights = _attend(attention, normed[:, -1:], last, _FrozenCache(keys, values))

    def heads(project: Any, norm: str) -> Tensor:
        split_HTd = project(normed.to(project.weight.dtype))[0].unflatten(-1, (-1, values.shape[-1])).transpose(0, 1)
        return getattr(attention, norm, nn.Identity())(split_HTd)

    plain_query, plain_key = heads(attention.q_proj, "q_norm")[:, -1], heads(attention.k_proj, "k_norm")
    found = {
        "attention": weights[0, :, 0],
        "key": keys[0],
        "value": values[0],
        "plain_query": plain_query,
        "plain_key": plain_key,
        "output_weight": attention.o_proj.weight,
    }
    return {name: tensor.float() for name, tensor in found.items()}


@contextmanager
def _attention_weights(config: Any) -> Generator[None]:
    """Use the attention implementation that returns its probabilities."""
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def best_rows(scores: Tensor, is_visual: Tensor, keep: int, plan: EagerPlan) -> Tensor:
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


def _choose(
    plan: EagerPlan, stage: int, tokens: _LayerTokens, of_attention: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Scores [T] of the tokens that enter a stage, and the rows [K] that it keeps."""
    if not tokens.is_visual.any():
        return torch.zeros(len(tokens.positions)), torch.arange(len(tokens.positions))
    chosen, keep = plan.chosen(stage), min(plan.keep[stage], int(tokens.is_visual.sum()))
    selector = load_selector(chosen.name)
    view = TensorView(
        is_visual=tokens.is_visual,
        num_keep=keep,
        hidden=tokens.hidden[0].float(),
        **of_attention,
        **{name: tokens.prompted[name].index_select(TOKEN_AXIS[name], tokens.positions) for name in selector.reads},
    )
    if plan.jitter:
        view = _jittered(view, plan.jitter)
    scores = selector.reference(view, **chosen.values)
    if stage in plan.forced:
        return scores, torch.isin(tokens.positions, plan.forced[stage]).nonzero()[:, 0]
    return scores, best_rows(scores, tokens.is_visual, keep, plan)


def _jittered(view: TensorView, amount: float) -> TensorView:
    """The view with every number changed a little, always in the same way."""
    random = torch.Generator().manual_seed(0)
    tensors = {entry.name: getattr(view, entry.name) for entry in fields(view)}
    changed = {
        name: values * (1 + amount * torch.randn(values.shape, generator=random))
        for name, values in tensors.items()
        if isinstance(values, Tensor) and values.is_floating_point()
    }
    return replace(view, **changed)
