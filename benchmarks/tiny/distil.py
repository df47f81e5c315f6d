"""A head start from a trained bed: its weights, or its decoder and its visual tokens to imitate."""

# Shapes: B pictures, N visual tokens, H W C picture, D decoder width.

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

from benchmarks.tiny.beds import BEDS, CELLS, Bed, family_of, load_bed
from capa_export.data.drawing import render
from capa_export.data.scenes import crowded_scene, draw, generator

__all__ = ["PICTURES", "Teacher", "go_on_from"]

PICTURES = 12


@torch.no_grad()
def go_on_from(folder: Path, model: Any) -> None:
    """Copies the weights of a checkpoint of the same bed; words that are new since keep their start values."""
    trained: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ours = model.state_dict()
    for name, value in trained.state_dict().items():
        ours[name][: len(value)] = value


class Teacher:
    """A trained bed, in the roles of decoder and tower to start from."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.vocab: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
        beds = [load_bed(name) for name in BEDS]
        (self.bed,) = (bed for bed in beds if type(self.model).__name__ == family_of(bed).ARCHITECTURE)

    @torch.no_grad()
    def give_words(self, bed: Bed, model: Any, vocab: dict[str, int]) -> None:
        """Copies the decoder, biases that the student has none for left out, and the words that both know."""
        mine, other = (m.model.language_model for m in (self.model, model))
        wanted = other.state_dict().keys() - {"embed_tokens.weight"}
        shared = {name: value for name, value in mine.state_dict().items() if name in wanted}
        other.load_state_dict(shared, strict=False)
        for word, row in vocab.items():
            source = self.vocab.get(word, self.vocab.get(bed.STANDS_FOR.get(word, "")))
            if source is not None:
                other.embed_tokens.weight[row] = mine.embed_tokens.weight[source]
                model.lm_head.weight[row] = self.model.lm_head.weight[source]

    def tower_loss(self, bed: Bed, model: Any, seed: int, step: int) -> Tensor:
        """Distance of the student's visual tokens from the teacher's, in shares of their variance."""
        pictures, is_sprite_BN = _pictures(seed, step)
        with torch.no_grad():
            wanted = self.bed.visual_tokens(self.model, self.bed.pixels_from_pictures(pictures)).float()
        seen = bed.visual_tokens(model, bed.pixels_from_pictures(pictures)).float()
        # Four cells in five show nothing that is ever asked about.
        weight = torch.where(is_sprite_BN, 4.0, 1.0)[..., None]
        return (weight * (seen - wanted) ** 2).mean() / (weight * wanted.var(dim=(0, 1))).mean()


def _pictures(seed: int, step: int) -> tuple[NDArray[np.uint8], Tensor]:
    """A batch, every other picture with more than a question could be about, and which cells one could be about."""
    rng = generator(seed, 1, step, split="train")
    kinds = cycle(("color_of", "number"))
    scenes = [
        crowded_scene(rng, heavy=i % 4 == 3) if i % 2 else draw(next(kinds), rng, heavy=i % 8 == 6)[0]
        for i in range(PICTURES)
    ]
    is_sprite = torch.zeros(PICTURES, CELLS * CELLS, dtype=torch.bool)
    for index, scene in enumerate(scenes):
        is_sprite[index, [s.row * CELLS + s.col for s in (*scene.sprites, *scene.numbers)]] = True
    return np.stack([np.asarray(render(scene, rng)) for scene in scenes]), is_sprite
