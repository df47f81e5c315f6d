"""Chooses the tokens of answers from logits, as transformers' `generate` does with its logits processors.

V = vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from capa_export.base.errors import CapaError
from capa_export.base.noise import gumbel
from capa_export.model.generation import Generation

if TYPE_CHECKING:
    from capa_export.model.prompt import Prompt
    from capa_export.run.runtime import PrefillRun, RuntimeModel

__all__ = ["NONE_LEFT", "NOT_FINITE", "Choose", "TokenChooser", "TokenRule", "generate", "greedy", "likeliest"]

Choose: TypeAlias = Callable[[np.ndarray], int]
"""A function from logits [V] to the next token of one answer; called once for each of its tokens."""
_NEVER = -np.inf


NOT_FINITE, NONE_LEFT = -1, -2
"""What a device says in place of a token, where logits are no numbers, or every token is one not to be said."""
_NO_TOKEN = {
    NOT_FINITE: (
        "the decoder's logits are not finite, as where FP16 overflows; `capa-export validate --bisect` finds the layer"
    ),
    NONE_LEFT: "what generation_config.json forbids or penalizes leaves no token to say",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRule:
    """How the tokens of an answer are chosen, where logits and the tokens that were said are all that it depends on."""

    seen: tuple[int, ...] = ()
    """Tokens that were said so far."""
    never: tuple[int, ...] = ()
    """Tokens that are not to be said."""
    numbers: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 0.0)
    """Penalty of tokens that were said, temperature, top-p and min-p."""
    top_k: int = 0
    key: int | None = None
    """Of the noise; None where the likeliest token is taken."""


def generate(
    model: "RuntimeModel[Any]",
    prompts: "Sequence[Prompt]",
    runs: "Sequence[PrefillRun[Any]]",
    choosers: Sequence[Choose],
    stop: Sequence[int],
    limit: int,
) -> Iterator[list[int | None]]:
    """Up to `limit` tokens of each prompt, until one of `stop`; None where an answer has ended.

    They are chosen where the logits are, if the device can do it.

    Raises:
        CapaError: the logits are no numbers, or the settings leave no token.
    """
    logits, cache = np.stack([run.logits for run in runs]), model.batch([run.cache for run in runs], limit)
    positions = [prompt.next_position for prompt in prompts]
    ended = np.zeros(len(prompts), bool)
    rules = [chooser.rule if isinstance(chooser, TokenChooser) else _RULES.get(chooser) for chooser in choosers]
    said = None if None in rules else model.choose(cache, logits, [rule for rule in rules if rule], positions)
    if said is None:
        said = _chosen_here(model, cache, logits, choosers, positions, ended)
    for tokens in islice(said, limit):
        for problem in tokens[~ended & (tokens < 0)]:
            raise CapaError(_NO_TOKEN[int(problem)])
        ended |= np.isin(tokens, stop)
        if ended.all():
            return
        yield [None if over else int(token) for token, over in zip(tokens, ended, strict=True)]


def _chosen_here(
    model: "RuntimeModel[Any]",
    cache: Any,
    logits: np.ndarray,
    choosers: Sequence[Choose],
    positions: Sequence[int],
    ended: np.ndarray,
) -> Iterator[np.ndarray]:
    """Tokens [B] that the choosers choose, without end; what an answer that has ended is fed does not matter."""
    for step in count():
        tokens = np.array(
            [0 if over else choose(row) for choose, row, over in zip(choosers, logits, ended, strict=True)]
        )
        yield tokens
        logits, cache = model.append(cache, tokens[:, None].tolist(), [position + step for position in positions])


def greedy(
    model: "RuntimeModel[Any]",
    prompts: "Sequence[Prompt]",
    runs: "Sequence[PrefillRun[Any]]",
    stop: Sequence[int],
    limit: int,
) -> Iterator[list[int | None]]:
    """`generate` with the likeliest token each time, whatever a checkpoint asks for: what is compared and measured."""
    return generate(model, prompts, runs, [likeliest] * len(prompts), stop, limit)


def likeliest(logits: np.ndarray) -> int:
    """The first of the tokens with the highest logit."""
    return int(logits.argmax())


_RULES: "dict[Choose, TokenRule]" = {likeliest: TokenRule()}
"""Of choosers that are functions."""


class TokenChooser:
    """Chooses the tokens of one answer: at random where that is asked for, or else the likeliest."""

    def __init__(
        self,
        generation: Generation,
        prompt_ids: Sequence[int],
        stop: Sequence[int],
        random: np.random.Generator | None = None,
    ) -> None:
        """Begin an answer.

        Args:
            generation: how tokens are chosen.
            prompt_ids: tokens of the whole prompt, none of them pruned; visual tokens are their placeholder.
            stop: tokens that end an answer.
            random: needed to sample.
        """
        self.generation, self.stop = generation, stop
        self.key = None if random is None else int(random.integers(1 << 64, dtype=np.uint64))
        """Of the noise that tokens are sampled with."""
        self.tokens = list(prompt_ids)
        """Tokens of the prompt and of the answer so far."""
        self.num_prompt = len(self.tokens)

    def __call__(self, logits: np.ndarray) -> int:
        """The next token, which is then part of the answer.

        Raises:
            CapaError: the logits are no numbers, or the settings leave no token.
        """
        scores = self.scores(logits)
        token = self._sampled(scores) if self.generation.do_sample else likeliest(scores)
        self.tokens.append(token)
        return token

    @property
    def rule(self) -> TokenRule | None:
        """The same as a rule; None where more than the rule's settings decides."""
        given = self.generation
        if self._least > 0 or given.begin_suppress_tokens or given.bad_words_ids or given.no_repeat_ngram_size > 0:
            return None
        shared: dict[str, Any] = {"seen": tuple(self.tokens), "never": tuple(given.suppress_tokens)}
        penalty = given.repetition_penalty
        if not given.do_sample:
            return TokenRule(**shared, numbers=(penalty, 1.0, 1.0, 0.0))
        numbers = penalty, given.temperature, given.top_p, given.min_p or 0.0
        return TokenRule(**shared, numbers=numbers, top_k=given.top_k, key=self.key)

    @property
    def _least(self) -> int:
        """Tokens of the answer that are said at least."""
        given = self.generation
        return given.min_length - self.num_prompt if given.min_new_tokens is None else given.min_new_tokens

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """[V] FP32, minus infinity where a token is not to be; in the order of `generate`, on which the result depends.

        Raises:
            CapaError: as above.
        """
        if not np.isfinite(logits.max()):
            raise CapaError(_NO_TOKEN[NOT_FINITE])
        scores = logits.astype(np.float32)
        with np.errstate(all="ignore"):
            self._penalize_repetition(scores)
            scores[self._forbidden(len(scores))] = _NEVER
            if not np.isfinite(scores.max()):
                raise CapaError(_NO_TOKEN[NONE_LEFT])
            if self.generation.do_sample:
                scores = _tempered(scores, self.generation.temperature)
                self._keep_likely(scores)
        return scores

    def _penalize_repetition(self, scores: np.ndarray) -> None:
        if (penalty := self.generation.repetition_penalty) != 1:
            seen = _below(self.tokens, len(scores))
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)

    def _forbidden(self, size: int) -> np.ndarray:
        """Tokens that may not come next, whatever their logits."""
        given, tokens, said = self.generation, self.tokens, len(self.tokens) - self.num_prompt
        forbidden = list(given.suppress_tokens)
        if said == 0:
            forbidden += given.begin_suppress_tokens
        if said < self._least:
            forbidden += self.stop
        for word in given.bad_words_ids:
            *start, last = word
            if tokens[len(tokens) - len(start) :] == start and not (last in self.stop and not start):
                forbidden.append(last)
        if 0 < (length := given.no_repeat_ngram_size) <= len(tokens):
            ngrams = np.lib.stride_tricks.sliding_window_view(np.array(tokens), length)
            begun = (ngrams[:, :-1] == tokens[len(tokens) - length + 1 :]).all(1)
            forbidden += ngrams[begun, -1].tolist()
        return _below(forbidden, size)

    def _keep_likely(self, scores: np.ndarray) -> None:
        """Top-k, then top-p of what is left, then min-p of that."""
        given = self.generation
        if 0 < given.top_k < len(scores):
            scores[scores < np.partition(scores, -given.top_k)[-given.top_k]] = _NEVER
        if given.top_p < 1:
            left = np.flatnonzero(scores > _NEVER)
            rising = left[np.argsort(scores[left], kind="stable")]
            # torch adds up in FP64, and compares in FP32.
            mass = _softmax(scores[rising]).cumsum(dtype=np.float64).astype(np.float32)
            scores[rising[:-1][mass[:-1] <= 1 - given.top_p]] = _NEVER
        if given.min_p is not None:
            probabilities = _softmax(scores)
            scores[probabilities < np.float32(given.min_p) * probabilities.max()] = _NEVER

    def _sampled(self, scores: np.ndarray) -> int:
        """A token drawn by its softmax: the highest, once noise is added. Kernels draw the same."""
        assert self.key is not None
        left = np.flatnonzero(scores > _NEVER)
        # Below the highest: beside scores of any size noise would be lost.
        below = scores[left].astype(np.float64) - scores.max()
        return int(left[(below + gumbel(self.key, left, len(self.tokens) - self.num_prompt)).argmax()])


def _below(tokens: Sequence[int], size: int) -> np.ndarray:
    """The different ones that a vocabulary of `size` has."""
    return np.array(sorted({token for token in tokens if 0 <= token < size}), np.int64)


def _tempered(scores: np.ndarray, temperature: float) -> np.ndarray:
    scaled = scores / np.float64(temperature)
    if scaled.max() > np.finfo(np.float32).max:
        # Less than `generate` can divide by: the same distribution, from smaller numbers.
        scaled = (scores - scores.max()) / np.float64(temperature)
    return scaled.astype(np.float32)


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()
