"""Training batches: pictures, each packed into one row with all its questions."""

# Shapes: B pictures, T tokens of a packed row, H W C picture.

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from capa_export.testbed.beds import CELLS, NUM_VISUAL, Bed, family_of
from capa_export.testbed.scenes import CELL, COLORS, SHAPES, Scene, ask, generator, questions, random_scene, render

__all__ = ["BATCH", "Batch", "Batches", "Layout", "Stage"]

BATCH = 16
STOPS = 3
"""End tokens that follow an answer, so that what comes after the first is well defined too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One part of the curriculum."""

    until: float
    """Share of the run at which the stage ends."""
    num_sprites: tuple[int, int]
    clutter: float
    """Share of the pictures with clutter."""
    asked: Mapping[str, int]
    """Questions per picture by kind."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything stands in a packed row: one picture, then all its questions.

    Each question sees the picture and itself only, and its positions start right behind the
    picture, so it computes what it would compute alone.
    """

    kinds: tuple[str, ...]
    prompt_ends: Tensor
    answers: Tensor
    stops: Tensor
    """[questions, STOPS]: where an end token is due next, the answer's own place first."""
    mask_TT: Tensor
    position_ids: Tensor
    """[axes, T]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Pictures with their packed questions."""

    pictures: NDArray[np.uint8]
    """[B, H, W, C]."""
    ids: Tensor
    colors: Tensor
    """Per cell, the word for the colour of its sprite, or the image token."""
    shapes: Tensor
    questions: list[str]
    layout: Layout


class Batches:
    """Training batches; batch i depends on the seed, i, the stage and `missed` only.

    `missed` is how often each question was lately answered wrong. Questions are asked in
    proportion to it, about the hardest of three scenes: the last few confusions stay for long
    otherwise.
    """

    def __init__(self, bed: Bed, tokenizer: PreTrainedTokenizerFast, config: Any, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.family = family_of(bed)
        self.missed: dict[str, float] = {}
        dims = self.family.model_dims(config.to_dict())
        blank = Image.new("RGB", (CELLS * CELL, CELLS * CELL))
        processed = bed.build_image_processor()(images=[blank], return_tensors="np", **self.family.IMAGE_OPTIONS)
        (self.picture,) = self.family.pictures(processed, dims)
        content: Any = [{"type": "image"}, {"type": "text", "text": "?"}]
        template: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        mark = self.family.placeholder(tokenizer, dims)
        before, self.behind = template.replace(mark, self.family.written(mark, self.picture)).split("?")
        self.prefix: list[int] = tokenizer(before)["input_ids"]
        self.pad, self.end = dims.image_token_id, tokenizer.get_vocab()[str(tokenizer.eos_token)]
        self.repeated = str(tokenizer.eos_token) * (STOPS - 1)
        self.first = self.prefix.index(self.pad)
        """Position of the first visual token."""
        self.layouts: dict[tuple[tuple[str, ...], bool], Layout] = {}
        vocab = tokenizer.get_vocab()
        self.words = {w: vocab[w] for w in (*COLORS, *SHAPES)}

    def __call__(self, step: int, stage: Stage) -> Batch:
        """Batch number `step`."""
        rng = generator(self.seed, step, split="train")
        kinds = tuple(kind for kind, count in stage.asked.items() for _ in range(count))
        question_mark = bool(rng.random() < 0.9)
        pictures: list[NDArray[np.uint8]] = []
        asked: list[tuple[str, str]] = []
        colors = torch.full((BATCH, NUM_VISUAL), self.pad)
        shapes = colors.clone()
        for index in range(BATCH):
            clutter = bool(rng.random() < stage.clutter)
            drawn = [random_scene(rng, num_sprites=stage.num_sprites, clutter=clutter) for _ in range(3)]
            scene = max(drawn, key=self._hardness)
            pictures.append(np.asarray(render(scene, rng)))
            asked += [ask(scene, kind, rng, self.missed) for kind in kinds]
            for sprite in scene.sprites:
                cell = sprite.row * CELLS + sprite.col
                colors[index, cell], shapes[index, cell] = self.words[sprite.color], self.words[sprite.shape]
        texts = [
            f"{question if question_mark else question.removesuffix(' ?')}{self.behind} {answer}{self.repeated}"
            for question, answer in asked
        ]
        segments: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [
            [*self.prefix, *chain.from_iterable(segments[i : i + len(kinds)])]
            for i in range(0, len(segments), len(kinds))
        ]
        key = (kinds, question_mark)
        if key not in self.layouts:
            self.layouts[key] = self._layout(kinds, [len(segment) for segment in segments[: len(kinds)]])
        return Batch(
            pictures=np.stack(pictures),
            ids=torch.tensor(rows),
            colors=colors,
            shapes=shapes,
            questions=[question for question, _ in asked],
            layout=self.layouts[key],
        )

    def _layout(self, kinds: tuple[str, ...], lengths: list[int]) -> Layout:
        shared = len(self.prefix)
        bounds = list(accumulate(lengths, initial=shared))
        seen = torch.ones(bounds[-1], bounds[-1], dtype=torch.bool).tril()
        for start, end in pairwise(bounds):
            seen[end:, start:end] = False
        alone = np.arange(shared + max(lengths))
        visual = (alone >= self.first) & (alone < self.first + NUM_VISUAL)
        places = torch.from_numpy(self.family.positions(visual, [self.picture])[0])
        answers = torch.tensor(bounds[1:]) - STOPS
        return Layout(
            kinds=kinds,
            prompt_ends=answers - 1,
            answers=answers,
            stops=answers[:, None] + torch.arange(STOPS),
            mask_TT=torch.zeros(seen.shape).masked_fill(~seen, -1e4),
            position_ids=torch.cat([places[:, :shared], *(places[:, shared : shared + n] for n in lengths)], dim=1),
        )

    def _hardness(self, scene: Scene) -> float:
        missed = [self.missed.get(question, 1.0) for question, _ in questions(scene, "color_of")]
        return sum(missed) / len(missed)

    def note(self, asked: list[str], hits: list[bool]) -> None:
        """Keeps count of what was answered wrong."""
        for question, hit in zip(asked, hits, strict=True):
            before = self.missed.get(question, 1.0)
            self.missed[question] = max(0.03, before + 0.03 * ((not hit) - before))
