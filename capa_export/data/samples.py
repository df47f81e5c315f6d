"""The pictures and questions that calibration and validation run on."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from PIL import Image
from pydantic import StringConstraints

from capa_export.base.errors import CapaError
from capa_export.base.toml import Settings
from capa_export.config.recipe import Recipe
from capa_export.data.benchmarks import PLAIN
from capa_export.data.conversation import Messages, files_of, turns_from
from capa_export.data.picture_files import open_picture
from capa_export.data.picture_sources import read_picture_file
from capa_export.data.scenes import samples
from capa_export.data.sources import find_source, read_line, read_lines, wrong_line
from capa_export.model.prompt import Turn, Video

__all__ = ["JUDGES", "Conversation", "Sample", "Samples", "samples_from"]

Split = Literal["train", "judge", "held_out"]
"""For the sums of a calibration, for its choice of layers, and for validation."""

JUDGES = 32
"""Samples that judge sets of scales."""
_SEED = 2602


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation with pictures, up to a question."""

    turns: Sequence[Turn]
    answer: str = ""
    """Empty where nobody knows it."""

    @property
    def image(self) -> Image.Image:
        """The first picture, or the first frame where that is a video."""
        first = next(part for turn in self.turns for part in turn.content if not isinstance(part, str))
        return first.frames[0] if isinstance(first, Video) else first

    @property
    def question(self) -> str:
        """The text of the last turn."""
        return " ".join(part for part in self.turns[-1].content if isinstance(part, str))


class Conversation(Settings):
    """A conversation that is not opened yet."""

    messages: Messages
    answer: Annotated[str, StringConstraints(strip_whitespace=True)] = ""
    """Empty where nobody knows it."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A reproducible stream of pictures with questions."""

    count: int
    name: str
    """Name for people: the folder, or the built-in scenes."""
    has_answers: bool
    files: tuple[Path, ...] = ()
    question: str = ""
    split: Split = "train"
    conversations: tuple[Conversation, ...] = ()
    """Conversations, in place of files and a question."""
    folder: Path = Path()
    """Folder that the paths in conversations are relative to."""
    seed: int | None = None
    """Seed of the scenes drawn, or of the order of files and conversations; None for the usual ones."""

    def __iter__(self) -> Iterator[Sample]:
        if self.conversations:
            chosen = islice(cycle(self.conversations), self.count)
            return (Sample(turns_from(line.messages, self.folder), line.answer) for line in chosen)
        if self.files:
            files = islice(cycle(self.files), self.count)
            return (Sample([Turn("user", [open_picture(path), self.question])]) for path in files)
        seed = _SEED if self.seed is None else self.seed
        # Scenes have two streams: judges are of the one that calibrates, with a seed of their own.
        split, seed = ("train", seed + 1) if self.split == "judge" else (self.split, seed)
        drawn = samples(self.count, seed=seed, split=split)
        return (Sample([Turn("user", [scene.image, scene.question])], scene.answer) for scene in drawn)

    def digest(self) -> str:
        """Digest of the pictures, the questions and the answers, in their order.

        Raises:
            CapaError: a file cannot be read.
        """
        digest = hashlib.sha256(f"{self.count} {self.has_answers} {self.split} {self.question}".encode())
        if self.seed is not None:
            digest.update(f" seed {self.seed}".encode())
        files = list(self.files[: self.count])
        for line in self.conversations[: self.count]:
            digest.update("".join(message.model_dump_json() for message in line.messages).encode())
            if line.answer:
                digest.update(f" answer {line.answer!r}".encode())
            files += files_of(line.messages, self.folder)
        for path in files:
            digest.update(hashlib.sha256(read_picture_file(path)).digest())
        return digest.hexdigest()


def samples_from(
    images: Path | None,
    recipe: Recipe,
    count: int,
    *,
    split: Split,
    repeat: bool = False,
    seed: int | None = None,
) -> Samples:
    """The pictures of a folder with the recipe's question, conversations, or built-in scenes where the recipe has them.

    Args:
        images: what `find_source` takes; a line of a .jsonl file is `{"messages": [...]}` or `{"image": ...,
            "question": ...}`, and may hold the `"answer"` too.
        recipe: says whether scenes stand in for a missing folder.
        count: how many samples at most.
        split: the stream of scenes, disjoint from the others.
        repeat: go round the samples again to reach `count`.
        seed: draws other scenes of the split; shuffles a folder or file before it is split, so that the splits are
            disjoint where all are made with the same one.

    Raises:
        CapaError: no folder where one is needed, no picture in it, a line that is no conversation with a picture, or
            one without an answer where others have one.
    """
    if images is None:
        if not recipe.scenes:
            raise CapaError(f"{recipe.name}: no pictures; pass --images FOLDER with a few hundred typical ones")
        return Samples(count=count, name="built-in scenes", has_answers=True, split=split, seed=seed)
    place = find_source(images)
    if isinstance(place, Path):
        conversations = _split(_shuffled(_conversations(place), seed), recipe, split)
        return Samples(
            count=count if repeat else min(count, len(conversations)),
            name=f"{min(count, len(conversations))} conversations of {place}",
            has_answers=bool(conversations[0].answer),
            conversations=conversations,
            folder=place.parent,
            seed=seed,
        )
    files = _split(_shuffled(place, seed), recipe, split)
    return Samples(
        count=count if repeat else min(count, len(files)),
        name=f"{min(count, len(files))} pictures of {images}",
        has_answers=False,
        files=files,
        question=recipe.calibration.prompt,
        seed=seed,
    )


T = TypeVar("T")


def _shuffled(items: tuple[T, ...], seed: int | None) -> tuple[T, ...]:
    return items if seed is None else tuple(items[i] for i in np.random.default_rng(seed).permutation(len(items)))


def _split(items: tuple[T, ...], recipe: Recipe, split: Split) -> tuple[T, ...]:
    """The samples of a split; where there are enough, each sees others than the others do."""
    if len(items) < 2 * recipe.parity.prompts:
        return items
    held_out, rest = items[: recipe.parity.prompts], items[recipe.parity.prompts :]
    judges = min(JUDGES, len(rest) // 4)
    parts = {"held_out": held_out, "judge": rest[len(rest) - judges :] or rest, "train": rest[: len(rest) - judges]}
    return parts[split]


def _conversations(path: Path) -> tuple[Conversation, ...]:
    result: list[Conversation] = []
    unanswered = 0
    for number, text in read_lines(path):
        line = read_line(path, number, text)
        with wrong_line(path, number, conversation="messages" in line.row):
            answers = PLAIN.answers(line.row)
        result.append(Conversation(messages=list(line.messages), answer=answers[0] if answers else ""))
        unanswered = unanswered or (0 if answers else number)
    if unanswered and any(conversation.answer for conversation in result):
        raise CapaError(f"{path}: line {unanswered}: has no answer, others have; give all of them one, or none")
    return tuple(result)
