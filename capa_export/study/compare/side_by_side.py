"""Runs two bundles on ONNX Runtime over the same questions, and counts how they differ.

Of every pair, the first is the reference's. S = steps, V = vocabulary, K = tokens kept.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, median
from typing import Literal, TypeVar

import numpy as np

from capa_export.base.statistics import difference_of_shares, kl_divergence, wilson
from capa_export.bundle.store import ONNX, Bundle
from capa_export.config.recipe import Recipe, recipe_of
from capa_export.model.generation import eos_token_ids
from capa_export.model.prompt import Prompt, Prompter
from capa_export.run.bundled import bundled_prompter
from capa_export.run.decoding import greedy
from capa_export.run.onnx import OnnxModel
from capa_export.run.runtime import KVCache, PrefillRun
from capa_export.study.compare.schema import AnswerComparison, KeptChange, LogitChange, Timing

__all__ = ["PromptPair", "Side", "SideBySide"]

_ENOUGH_SECONDS = 0.1
"""Time after which a pair of calls is not timed again."""

T = TypeVar("T")
Work = Literal["vision", "prefill", "decode"]


@dataclass(frozen=True)
class Side:
    """One of the two bundles, opened."""

    bundle: Bundle
    recipe: Recipe
    prompter: Prompter
    model: OnnxModel
    stop: Sequence[int]

    @classmethod
    def of(cls, bundle: Bundle, *, trust_remote_code: bool = False) -> "Side":
        """Open a bundle after a check that it is as it was built.

        Raises:
            CapaError: nothing was exported, or a file is missing or was changed.
        """
        bundle.verify("export", *bundle.manifest["stages"])
        folder = bundle.folder / ONNX
        recipe = recipe_of(bundle.manifest, bundle.folder)
        prompter = bundled_prompter(bundle, trust_remote_code=trust_remote_code)
        return cls(bundle, recipe, prompter, OnnxModel(folder, exact=False), eos_token_ids(folder / "llm"))

    def prefill(self, prompt: Prompt, embeds: Mapping[str, np.ndarray]) -> PrefillRun[KVCache]:
        return self.model.prefill(prompt, self.recipe.prune.num_keep(prompt.image_lengths), embeds)

    def kept(self, prompt: Prompt, run: PrefillRun[KVCache]) -> dict[int, np.ndarray]:
        """Layer -> positions of the visual tokens kept after it."""
        layers = [stage.layer for stage in self.recipe.prune.schedule]
        return {layer: rows[prompt.is_visual[rows]] for layer, rows in zip(layers, run.kept, strict=True)}

    def answer(self, prompt: Prompt, run: PrefillRun[KVCache], limit: int) -> list[int]:
        """The greedy tokens of the answer."""
        return [token for (token,) in greedy(self.model, [prompt], [run], self.stop, limit) if token is not None]


@dataclass(frozen=True)
class PromptPair:
    """A question that both sides are asked."""

    prompts: tuple[Prompt, Prompt]
    """Each side's own prompt: tokenizer and image processor are part of a bundle."""
    answer: str = ""
    """Empty where nobody knows it."""


@dataclass
class _Stopwatch:
    """Runs the sides in turn, so that what else the machine does falls on both."""

    most: int = 5
    """Runs of a call at most."""
    seconds: dict[Work, tuple[list[float], list[float]]] = field(default_factory=dict)
    _first: int = 0

    def both(self, what: Work, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Make each side's call; returns both results. Short calls are repeated, so they must do the same each time."""
        results: dict[int, T] = {}
        begun = time.perf_counter()
        for _ in range(self.most):
            for index in (self._first, 1 - self._first):
                started = time.perf_counter()
                results[index] = calls[index]()
                self.seconds.setdefault(what, ([], []))[index].append(time.perf_counter() - started)
            self._first = 1 - self._first
            if time.perf_counter() - begun > _ENOUGH_SECONDS:
                break
        return [results[0], results[1]]


@dataclass
class SideBySide:
    """Two bundles of one family and vocabulary, and what the questions asked so far have shown."""

    sides: tuple[Side, Side]
    _watch: _Stopwatch = field(default_factory=_Stopwatch)
    _kl: list[float] = field(default_factory=list)
    _same: list[bool] = field(default_factory=list)
    _diverged: list[int] = field(default_factory=list)
    _kept: dict[int, list[tuple[int | None, int | None, float | None]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _right: list[tuple[bool, bool]] = field(default_factory=list)

    def warm(self, question: PromptPair) -> None:
        """Run a question that does not count: a session's first runs are its slowest."""
        SideBySide(self.sides, _Stopwatch(most=1)).ask(question)

    def ask(self, question: PromptPair) -> None:
        """Feed both the reference's greedy answer, a step of one and the same step of the other."""
        for side, prompt in zip(self.sides, question.prompts, strict=True):
            side.model.load(prompt)
        pairs = list(zip(self.sides, question.prompts, strict=True))
        embeds = self._watch.both("vision", [partial(side.model.embed, prompt) for side, prompt in pairs])
        calls = [partial(side.prefill, prompt, rows) for (side, prompt), rows in zip(pairs, embeds, strict=True)]
        runs = self._watch.both("prefill", calls)
        limit, tokens = self.sides[0].recipe.parity.steps, list[int]()
        logits, caches = [[run.logits] for run in runs], [run.cache for run in runs]
        while (token := int(logits[0][-1].argmax())) not in self.sides[0].stop:
            tokens.append(token)
            if len(tokens) == limit:
                break
            calls = [
                partial(side.model.step, cache, token, prompt.next_position + len(tokens) - 1)
                for (side, prompt), cache in zip(pairs, caches, strict=True)
            ]
            stepped = self._watch.both("decode", calls)
            caches = [cache for _, cache in stepped]
            for rows, (row, _) in zip(logits, stepped, strict=True):
                rows.append(row)
        same = self._count_logits(*(np.stack(rows) for rows in logits))
        self._count_kept(question.prompts, runs)
        if question.answer:
            said = tokens, tokens if same else self.sides[1].answer(question.prompts[1], runs[1], limit)
            texts = [side.prompter.decode(words).strip() for side, words in zip(self.sides, said, strict=True)]
            self._right.append((texts[0] == question.answer, texts[1] == question.answer))

    def _count_logits(self, reference_SV: np.ndarray, candidate_SV: np.ndarray) -> bool:
        """Compare the logits; returns whether the likeliest token is the same at every step."""
        self._kl += map(kl_divergence, reference_SV, candidate_SV)
        same = reference_SV.argmax(-1) == candidate_SV.argmax(-1)
        self._same += same.tolist()
        if not same.all():
            self._diverged.append(int(same.argmin()))
        return bool(same.all())

    def _count_kept(self, prompts: tuple[Prompt, Prompt], runs: Sequence[PrefillRun[KVCache]]) -> None:
        reference, candidate = (
            side.kept(prompt, run) for side, prompt, run in zip(self.sides, prompts, runs, strict=True)
        )
        alike = np.array_equal(prompts[0].is_visual, prompts[1].is_visual)
        for layer in reference | candidate:
            one, other, iou = reference.get(layer), candidate.get(layer), None
            if alike and one is not None and other is not None and len(one) + len(other):
                iou = len(np.intersect1d(one, other)) / len(np.union1d(one, other))
            before, after = (None if rows is None else len(rows) for rows in (one, other))
            self._kept[layer].append((before, after, iou))

    def logits(self) -> LogitChange:
        return LogitChange(
            steps=len(self._kl),
            kl_mean=float(np.mean(self._kl)),
            kl_max=float(np.max(self._kl)),
            top1=fmean(self._same),
            diverged=len(self._diverged),
            diverges_at=min(self._diverged, default=None),
        )

    def kept(self) -> Iterator[KeptChange]:
        for layer, rows in sorted(self._kept.items()):
            reference, candidate, iou = (_mean(column) for column in zip(*rows, strict=True))
            yield KeptChange(layer=layer, reference=reference, candidate=candidate, iou=iou)

    def answers(self) -> AnswerComparison | None:
        """Accuracy of both sides' answers; None where no answer was known."""
        if not self._right:
            return None
        reference, candidate = zip(*self._right, strict=True)
        return AnswerComparison(
            source="asked now",
            questions=len(self._right),
            reference=wilson(reference),
            candidate=wilson(candidate),
            difference=difference_of_shares(candidate, reference),
        )

    def timings(self) -> Iterator[Timing]:
        for what, seconds in self._watch.seconds.items():
            reference, candidate = (median(side) * 1e3 for side in seconds)
            yield Timing(
                what=what,
                runs=len(seconds[0]),
                reference_ms=reference,
                candidate_ms=candidate,
                ratio=candidate / reference,
            )


def _mean(column: Sequence[float | None]) -> float | None:
    """Mean of the numbers in a column; None where there is none."""
    known = [value for value in column if value is not None]
    return fmean(known) if known else None
