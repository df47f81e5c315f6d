"""Training batches: pictures, each packed into one row with all its questions."""

# Shapes: B pictures, T tokens of a packed row, H W C picture.

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from capa_export.testbed.scenes import COLORS, SHAPES, Scene, ask, generator, questions, random_scene, render
from capa_export.testbed.tiny_qwen25vl import build_image_processor

__all__ = ["BATCH", "CELLS", "NUM_VISUAL", "Batch", "Batches", "Layout", "Stage", "patches_from_pictures"]

CELLS = 8
NUM_VISUAL = CELLS * CELLS
BATCH = 16


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
    mask_TT: Tensor
    position_ids: Tensor


def _layout(kinds: tuple[str, ...], lengths: list[int], first_visual: int) -> Layout:
    shared = first_visual + NUM_VISUAL + 1
    segment = torch.cat([torch.zeros(shared), *(torch.full((n,), i + 1.0) for i, n in enumerate(lengths))])
    seen = (segment[:, None] == segment[None, :]) | (segment == 0)[None, :]
    seen &= torch.ones_like(seen).tril()
    grid = torch.arange(CELLS) + first_visual
    rows, cols = grid.repeat_interleave(CELLS), grid.repeat(CELLS)
    head = torch.arange(first_visual)
    tail = torch.cat([torch.arange(1), *(torch.arange(n) + 1 for n in lengths)]) + first_visual + CELLS
    axes = [torch.cat([head, visual, tail]) for visual in (torch.full_like(rows, first_visual), rows, cols)]
    ends = torch.tensor(np.cumsum([shared, *lengths])[1:]) - 1
    return Layout(
        kinds=kinds,
        prompt_ends=ends - 1,
        answers=ends,
        mask_TT=torch.zeros(seen.shape).masked_fill(~seen, -1e4),
        position_ids=torch.stack(axes)[:, None],
    )


def patches_from_pictures(pictures_BHWC: NDArray[np.uint8]) -> Tensor:
    """What the image processor makes of whole-cell pictures, for a batch at once."""
    processor = build_image_processor()
    mean, std = (np.array(v, dtype=np.float32) for v in (processor.image_mean, processor.image_std))
    values = (pictures_BHWC.astype(np.float32) / 255 - mean) / std
    batch = values.shape[0]
    blocks = values.reshape(batch, CELLS, 2, 14, CELLS, 2, 14, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6)
    frames = np.broadcast_to(blocks[:, :, :, :, :, :, None], (*blocks.shape[:6], 2, 14, 14))
    return torch.from_numpy(np.ascontiguousarray(frames).reshape(batch, NUM_VISUAL * 4, -1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Pictures with their packed questions."""

    patches: Tensor
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

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.missed: dict[str, float] = {}
        vocab = tokenizer.get_vocab()
        self.pad = vocab["<|image_pad|>"]
        prefix = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * NUM_VISUAL + "<|vision_end|>"
        self.prefix: list[int] = tokenizer(prefix)["input_ids"]
        self.layouts: dict[tuple[tuple[str, ...], bool], Layout] = {}
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
            f"{question if question_mark else question.removesuffix(' ?')}<|im_end|>\n<|im_start|>assistant\n{answer}"
            for question, answer in asked
        ]
        segments: list[list[int]] = self.tokenizer(texts)["input_ids"]
        rows = [
            [*self.prefix, *chain.from_iterable(segments[i : i + len(kinds)])]
            for i in range(0, len(segments), len(kinds))
        ]
        key = (kinds, question_mark)
        if key not in self.layouts:
            lengths = [len(segment) for segment in segments[: len(kinds)]]
            self.layouts[key] = _layout(kinds, lengths, self.prefix.index(self.pad))
        return Batch(
            patches=patches_from_pictures(np.stack(pictures)),
            ids=torch.tensor(rows),
            colors=colors,
            shapes=shapes,
            questions=[question for question, _ in asked],
            layout=self.layouts[key],
        )

    def _hardness(self, scene: Scene) -> float:
        missed = [self.missed.get(question, 1.0) for question, _ in questions(scene, "color_of")]
        return sum(missed) / len(missed)

    def note(self, asked: list[str], hits: list[bool]) -> None:
        """Keeps count of what was answered wrong."""
        for question, hit in zip(asked, hits, strict=True):
            before = self.missed.get(question, 1.0)
            self.missed[question] = max(0.03, before + 0.03 * ((not hit) - before))
