"""The pictures and questions that calibration and validation run on."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

from capa_export.errors import CapaError
from capa_export.prompt import open_picture
from capa_export.recipe import Recipe
from capa_export.testbed.scenes import Sample, samples

__all__ = ["Sample", "Samples", "samples_from"]

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_SEED = 2602


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A reproducible stream of pictures with questions."""

    count: int
    name: str
    """For people: the folder, or the built-in scenes."""
    has_answers: bool
    files: tuple[Path, ...] = ()
    question: str = ""
    split: Literal["train", "held_out"] = "train"

    def __iter__(self) -> Iterator[Sample]:
        if self.has_answers:
            return samples(self.count, seed=_SEED, split=self.split)
        return (
            Sample(open_picture(path), self.question, "", "picture") for path in islice(cycle(self.files), self.count)
        )

    def digest(self) -> str:
        """Changes when the pictures, the question or their number do."""
        digest = hashlib.sha256(f"{self.count} {self.has_answers} {self.split} {self.question}".encode())
        for path in self.files[: self.count]:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def samples_from(
    images: Path | None, recipe: Recipe, count: int, *, split: Literal["train", "held_out"], repeat: bool = False
) -> Samples:
    """The pictures of a folder with the recipe's question, or the built-in scenes where the recipe uses them.

    Args:
        images: the user's folder, searched with its subfolders.
        recipe: says whether scenes stand in for a missing folder.
        count: how many samples at most.
        split: the stream of scenes, disjoint from the other one.
        repeat: go round the folder again to reach `count`.

    Raises:
        CapaError: no folder where one is needed, or no picture in it.
    """
    if images is None:
        if not recipe.scenes:
            raise CapaError(f"{recipe.name}: no pictures; pass --images FOLDER with a few hundred typical ones")
        return Samples(count=count, name="built-in scenes", has_answers=True, split=split)
    if not images.is_dir():
        raise CapaError(f"{images}: no such folder of pictures")
    files = tuple(sorted(path for path in images.rglob("*") if path.suffix.lower() in _SUFFIXES))
    if not files:
        raise CapaError(f"{images}: no pictures in this folder ({', '.join(sorted(_SUFFIXES))})")
    # Where there are enough, validation sees pictures that calibration does not.
    if len(files) >= 2 * recipe.parity.prompts:
        files = files[recipe.parity.prompts :] if split == "train" else files[: recipe.parity.prompts]
    return Samples(
        count=count if repeat else min(count, len(files)),
        name=f"{min(count, len(files))} pictures of {images}",
        has_answers=False,
        files=files,
        question=recipe.calibration.prompt,
    )
