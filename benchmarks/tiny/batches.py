"""Training batches: pictures, packed into one row with all the questions about them."""

# Shapes: B rows, P pictures of all rows, N cells, T tokens of a packed row, H W C picture.

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.tiny.beds import CELLS, NUM_VISUAL, Bed, family_of
from capa_export.data.drawing import CELL, COLORS, SHAPES, Scene, render
from capa_export.data.scenes import ask, crowded_scene, draw, generator, questions

__all__ = ["Batch", "Batches", "Lesson", "RowLayout"]

STOPS = 3
"""End tokens that follow an answer, so that what comes after the first is well defined too."""
_DIGITS = tuple(map(str, range(10)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """The contents of a batch's pictures, and the questions about them."""

    asked: Mapping[str, int]
    """Questions per picture, or pair of pictures, by kind; the first kind says what is drawn.

    Where nothing is asked, pictures are crowded, and only the tower learns.
    """
    num_sprites: tuple[int, int] = (4, 7)
    clutter: float = 0.85
    """Share of the pictures with clutter."""
    heavy: float = 0.0
    """Share of those whose clutter is heavy."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The tokens around a question."""

    prefix: list[int]
    """Token ids, those of the pictures among them."""
    behind: str
    is_visual: NDArray[np.bool_]
    """Per token of the prefix."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The layout of a packed row: the pictures, then all questions about them.

    Each question sees the pictures and itself only, and its positions start right behind the
    pictures, so it computes what it would compute alone.
    """

    kinds: tuple[str, ...]
    visual: Tensor
    """Positions of the visual tokens."""
    answers: Tensor
    """Positions of the answers' tokens."""
    of: Tensor
    """The question that each of them answers."""
    stops: Tensor
    """[questions, STOPS]: where an end token is due next, the answer's last place first."""
    mask_TT: Tensor
    position_ids: Tensor
    """[axes, T]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Pictures with their packed questions."""

    pictures: NDArray[np.uint8]
    """[P, H, W, C]."""
    ids: Tensor
    seen: Mapping[str, Tensor]
    """The word that each visual token shows [P, N], or the image token where it shows nothing of that sort."""
    questions: list[str]
    layout: RowLayout | None
    """Layout of the questions; None where nothing is asked."""


class Batches:
    """Training batches of `size` rows; batch i depends on the seed, i, the lesson and `missed` only.

    `missed` is how often each question was lately answered wrong. Questions are asked in
    proportion to it, about the hardest of three scenes: the last few confusions stay for long
    otherwise.
    """

    def __init__(self, bed: Bed, tokenizer: PreTrainedTokenizerFast, config: Any, seed: int, size: int = 16) -> None:
        self.tokenizer, self.seed, self.size = tokenizer, seed, size
        self.family = family_of(bed)
        self.missed: dict[str, float] = {}
        self.dims = self.family.model_dims(config.to_dict())
        blank = Image.new("RGB", (CELLS * CELL, CELLS * CELL))
        processed = bed.build_image_processor()(images=[blank], return_tensors="np", **self.family.IMAGE_OPTIONS)
        (self.picture,) = self.family.pictures(processed, self.dims)
        self.pad, self.end = self.dims.image_token_id, tokenizer.get_vocab()[str(tokenizer.eos_token)]
        self.repeated = str(tokenizer.eos_token) * (STOPS - 1)
        self.frames = {count: self._frame(count) for count in (1, 2)}
        self.layouts: dict[tuple[tuple[str, ...], bool], RowLayout] = {}
        vocab = tokenizer.get_vocab()
        self.words = {w: vocab[w] for w in (*COLORS, *SHAPES, *_DIGITS)}
        self.sorts = {
            sort: torch.tensor([self.pad, *(self.words[word] for word in words)])
            for sort, words in (("color", COLORS), ("shape", SHAPES), ("tens", _DIGITS), ("ones", _DIGITS))
        }
        """Words that a visual token may show, by sort: the padding for nothing first."""

    def _frame(self, num_pictures: int) -> Frame:
        content: Any = [*({"type": "image"} for _ in range(num_pictures)), {"type": "text", "text": "?"}]
        template: Any = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        mark = self.family.placeholder(self.tokenizer, self.dims)
        before, behind = template.replace(mark, self.family.written(mark, self.picture)).split("?")
        prefix: list[int] = self.tokenizer(before)["input_ids"]
        return Frame(prefix, behind, np.asarray(prefix) == self.pad)

    def __call__(self, step: int, lesson: Lesson) -> Batch:
        """Batch number `step`."""
        rng = generator(self.seed, step, split="train")
        if not lesson.asked:
            return self._crowded(rng, lesson.heavy)
        kinds = tuple(kind for kind, count in lesson.asked.items() for _ in range(count))
        question_mark = bool(rng.random() < 0.9)
        shown: list[tuple[Scene, ...]] = []
        pictures: list[NDArray[np.uint8]] = []
        asked: list[tuple[str, str]] = []
        for _ in range(self.size):
            clutter = bool(rng.random() < lesson.clutter)
            heavy = clutter and bool(rng.random() < lesson.heavy)
            drawn = [
                draw(kinds[0], rng, num_sprites=lesson.num_sprites, clutter=clutter, heavy=heavy) for _ in range(3)
            ]
            scenes = max(drawn, key=self._hardness)
            shown.append(scenes)
            pictures += [np.asarray(render(scene, rng)) for scene in scenes]
            asked += [ask(scenes, kind, rng, self.missed) for kind in kinds]
        frame = self.frames[len(shown[0])]
        texts = [
            f"{question if question_mark else question.removesuffix(' ?')}{frame.behind} {answer}{self.repeated}"
            for question, answer in asked
        ]
        segments: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [
            [*frame.prefix, *chain.from_iterable(segments[i : i + len(kinds)])]
            for i in range(0, len(segments), len(kinds))
        ]
        key = (kinds, question_mark)
        if key not in self.layouts:
            answers = [len(answer.split()) for _, answer in asked[: len(kinds)]]
            self.layouts[key] = self._layout(frame, kinds, [len(s) for s in segments[: len(kinds)]], answers)
        return Batch(
            pictures=np.stack(pictures),
            ids=torch.tensor(rows),
            seen=self._seen([scene for scenes in shown for scene in scenes]),
            questions=[question for question, _ in asked],
            layout=self.layouts[key],
        )

    def _crowded(self, rng: np.random.Generator, heavy: float) -> Batch:
        # A tower alone is cheap, so it sees more at once.
        scenes = [crowded_scene(rng, heavy=bool(rng.random() < heavy)) for _ in range(4 * self.size)]
        pictures = np.stack([np.asarray(render(scene, rng)) for scene in scenes])
        return Batch(pictures=pictures, ids=torch.empty(0), seen=self._seen(scenes), questions=[], layout=None)

    def _seen(self, scenes: list[Scene]) -> dict[str, Tensor]:
        seen = {sort: torch.full((len(scenes), NUM_VISUAL), self.pad) for sort in self.sorts}
        for index, scene in enumerate(scenes):
            for row, col, sort, word in _words_seen(scene):
                seen[sort][index, row * CELLS + col] = self.words[word]
        return seen

    def _layout(self, frame: Frame, kinds: tuple[str, ...], lengths: list[int], answers: list[int]) -> RowLayout:
        shared = len(frame.prefix)
        bounds = list(accumulate(lengths, initial=shared))
        seen = torch.ones(bounds[-1], bounds[-1], dtype=torch.bool).tril()
        for start, end in pairwise(bounds):
            seen[end:, start:end] = False
        visual = np.pad(frame.is_visual, (0, max(lengths)))
        num_pictures = int(visual.sum()) // NUM_VISUAL
        places = torch.from_numpy(self.family.positions(visual, [self.picture] * num_pictures)[0])
        lasts = torch.tensor(bounds[1:]) - STOPS
        spans = [range(int(last) - count + 1, int(last) + 1) for last, count in zip(lasts, answers, strict=True)]
        return RowLayout(
            kinds=kinds,
            visual=torch.from_numpy(np.flatnonzero(visual)),
            answers=torch.tensor(list(chain.from_iterable(spans))),
            of=torch.arange(len(kinds)).repeat_interleave(torch.tensor(answers)),
            stops=lasts[:, None] + torch.arange(STOPS),
            mask_TT=torch.zeros(seen.shape).masked_fill(~seen, -1e4),
            position_ids=torch.cat([places[:, :shared], *(places[:, shared : shared + n] for n in lengths)], dim=1),
        )

    def _hardness(self, scenes: tuple[Scene, ...]) -> float:
        missed = [self.missed.get(question, 1.0) for question, _ in questions(scenes, "color_of")]
        return sum(missed) / len(missed)

    def note(self, asked: list[str], hits: list[bool]) -> None:
        """Keeps count of what was answered wrong."""
        for question, hit in zip(asked, hits, strict=True):
            before = self.missed.get(question, 1.0)
            self.missed[question] = max(0.03, before + 0.03 * ((not hit) - before))


def _words_seen(scene: Scene) -> Iterator[tuple[int, int, str, str]]:
    """Row, column, sort and word of all that is drawn and may be asked about."""
    for sprite in scene.sprites:
        yield sprite.row, sprite.col, "color", sprite.color
        yield sprite.row, sprite.col, "shape", sprite.shape
    for number in scene.numbers:
        yield number.row, number.col, "color", number.color
        yield number.row, number.col, "tens", str(number.digits[0])
        yield number.row, number.col, "ones", str(number.digits[1])
