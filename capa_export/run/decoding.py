"""Chooses the tokens of answers from logits, as transformers' `generate` does with its logits processors.

V = vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from capa_export.base.errors import CapaError
from capa_export.base.noise import gumbel
from capa_export.model.generation import Generation

if TYPE_CHECKING:
    from capa_export.model.prompt import Prompt
    from capa_export.run.runtime import PrefillRun, RuntimeModel

__all__ = ["Choose", "TokenChooser", "generate", "greedy"]

Choose: TypeAlias = Callable[[np.ndarray], int]
"""A function from logits [V] to the next token of one answer; called once for each of its tokens."""
_NEVER = -np.inf


def generate(
    model: "RuntimeModel[Any]",
    prompts: "Sequence[Prompt]",
    runs: "Sequence[PrefillRun[Any]]",
    choosers: Sequence[Choose],
    stop: Sequence[int],
    limit: int,
) -> Iterator[list[int | None]]:
    """Up to `limit` tokens of each prompt, until one of `stop`; None where an answer has ended."""
    logits, cache = np.stack([run.logits for run in runs]), model.batch([run.cache for run in runs], limit)
    ended = np.zeros(len(prompts), bool)
    for count in range(limit):
        # What an ended answer is fed does not matter.
        tokens = np.array(
            [0 if over else choose(row) for choose, row, over in zip(choosers, logits, ended, strict=True)]
        )
        ended |= np.isin(tokens, stop)
        if ended.all():
            return
        yield [None if over else int(token) for token, over in zip(tokens, ended, strict=True)]
        if count + 1 < limit:
            positions = [prompt.next_position + count for prompt in prompts]
            logits, cache = model.append(cache, tokens[:, None].tolist(), positions)


def greedy(
    model: "RuntimeModel[Any]",
    prompts: "Sequence[Prompt]",
    runs: "Sequence[PrefillRun[Any]]",
    stop: Sequence[int],
    limit: int,
) -> Iterator[list[int | None]]:
    """`generate` with the likeliest token each time, whatever a checkpoint asks for: what is compared and measured."""
    return generate(model, prompts, runs, [_likeliest] * len(prompts), stop, limit)


def _likeliest(logits: np.ndarray) -> int:
    return int(logits.argmax())


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
        token = self._sampled(scores) if self.generation.do_sample else _likeliest(scores)
        self.tokens.append(token)
        return token

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """[V] FP32, minus infinity where a token is not to be; in the order of `generate`, on which the result depends.

        Raises:
            CapaError: as above.
        """
        if not np.isfinite(logits.max()):
            raise CapaError(
                "the decoder's logits are not finite, as where FP16 overflows; `capa-export validate --bisect` finds "
                "the layer"
            )
        scores = logits.astype(np.float32)
        with np.errstate(all="ignore"):
            self._penalize_repetition(scores)
            scores[self._forbidden(len(scores))] = _NEVER
            if not np.isfinite(scores.max()):
                raise CapaError("what generation_config.json forbids or penalizes leaves no token to say")
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
        least = given.min_length - self.num_prompt if given.min_new_tokens is None else given.min_new_tokens
        if said < least:
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
