"""Turns a conversation with pictures into the arrays that every runtime of a model is fed."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError, first_line, refusing
from capa_export.config.pixels import PixelBounds, processor_settings
from capa_export.model.chat_template import read_chat_template
from capa_export.model.families import Family, VideoFamily
from capa_export.model.hub import refetch
from capa_export.model.processors.rendering import render, start
from capa_export.model.processors.resolved import Processors
from capa_export.model.processors.tokenizer import check_growth

__all__ = ["Picture", "Prompt", "Prompter", "Turn", "Video"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_LONGEST_TOKEN = 256
"""Characters: runs of spaces are the longest tokens of published vocabularies, and half as long."""
_SIDE = 448
"""Side of a test picture in pixels: a multiple of every patch, merged or not, to fit where nothing is resized."""
_IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_CODE_FILES: Mapping[str, set[str] | None] = {
    "tokenizer_config.json": None,
    "preprocessor_config.json": None,
    "processor_config.json": None,
    # What it names beside are models, and those are never its own.
    "config.json": {"AutoTokenizer", "AutoImageProcessor"},
}
"""Files that may name Python of the checkpoint's own, and the keys that do; None for any."""


@dataclass(frozen=True, slots=True)
class Video:
    """Frames of one size, evenly spaced in time."""

    frames: Sequence[Image.Image]
    fps: float
    """Frames per second."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One side's turn of a conversation."""

    role: str
    """`user`, `assistant` or `system`."""
    content: Sequence[str | Image.Image | Video]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture or video as the vision graph takes it."""

    patches: np.ndarray
    """FP32, in the shape of the vision graph's input."""
    num_tokens: int
    """Visual tokens it becomes."""
    grid: tuple[int, int] | None = None
    """Rows and columns of those tokens, where they make one grid."""
    tile: tuple[int, int] | None = None
    """Rows and columns of one tile, where there are several of one shape, one after the other."""
    square: bool = False
    """Whether the grid lies over a centred square of the picture, and the rest was cropped off."""
    frame_seconds: float | None = None
    """Seconds that one of the vision graph's frames lasts in a video."""
    frame_positions: float = 1.0
    """Temporal positions from one of the vision graph's frames to the next."""

    def cells(self) -> np.ndarray:
        """[2, N] int64, row and column of each visual token."""
        rows, cols = self.grid or self.tile or (1, self.num_tokens)
        return np.tile(np.indices((rows, cols)).reshape(2, -1), self.num_tokens // (rows * cols))


@dataclass(frozen=True)
class Prompt:
    """A whole prompt. T = tokens, X = text tokens."""

    input_ids: np.ndarray
    """[T] int64, the placeholder repeated once per visual token."""
    is_visual: np.ndarray
    """[T] bool."""
    pictures: tuple[Picture, ...]
    position_ids: np.ndarray
    """[axes, T] int64: three axes for mRoPE, one for plain positions."""
    next_position: int
    """Position of the first answer token: pruning does not change it."""

    @cached_property
    def text_positions(self) -> np.ndarray:
        """[X] int64, ascending."""
        return np.flatnonzero(~self.is_visual)

    @cached_property
    def visual_grid(self) -> np.ndarray:
        """[2, T] int64, row and column of each visual token in its picture, or in its tile; -1 for text."""
        grid_2T = np.full((2, len(self.input_ids)), -1, np.int64)
        if self.pictures:
            grid_2T[:, self.is_visual] = np.concatenate([picture.cells() for picture in self.pictures], axis=1)
        return grid_2T

    @property
    def num_visual(self) -> int:
        return int(self.is_visual.sum())

    def num_rows(self, num_keep: Sequence[int]) -> list[int]:
        """Rows that stay at each stage, all text and so many visual tokens."""
        return [count + len(self.text_positions) for count in num_keep]

    def num_keep(self, kept: Sequence[np.ndarray]) -> list[int]:
        """Visual tokens that stay at each stage, which keeps these rows."""
        return [len(rows) - len(self.text_positions) for rows in kept]

    @cached_property
    def image_lengths(self) -> list[int]:
        """Visual tokens of each image, which is a run of them between text."""
        edges = np.flatnonzero(np.diff(self.is_visual, prepend=False, append=False))
        return (edges[1::2] - edges[::2]).tolist()


class Prompter:
    """Tokenizer, chat template and image processor; needs no weights and no torchvision.

    Args:
        text: folder with the tokenizer and its chat template.
        visual: folder with the image processor; in a checkpoint it is the same.
        family: module of the model's family.
        dims: of the model.
        bounds: of what pictures are resized to.
        trust_remote_code: whether Python files that lie in the folders, and that the tokenizer or image processor
            names as its own, may be run.
        processors: tokenizer and image processor that are read already; the folders' own are then not.

    Raises:
        CapaError: a file is missing, or does not load, or needs code that may not be run, or the bounds cannot be kept.
    """

    def __init__(
        self,
        text: Path,
        visual: Path,
        family: Family,
        dims: ModelDims[Any],
        *,
        bounds: PixelBounds | None = None,
        trust_remote_code: bool = False,
        processors: Processors | None = None,
    ) -> None:
        self.family, self.dims, self.folder = family, dims, visual
        start()
        self.tokenizer, self.image_processor = processors or _published(
            text, visual, trust_remote_code=trust_remote_code
        )
        check_growth(self.tokenizer.backend_tokenizer, text)
        self.bounds, self.sizes = bounds or PixelBounds(), processor_settings(self.image_processor)
        family.check_bounds(self.sizes, self.bounds, dims)
        self.marks = {"picture": family.placeholder(self.tokenizer, dims)}
        # Some tokenizers lack the token that their config names.
        if isinstance(family, VideoFamily) and (mark := family.video_placeholder(self.tokenizer, dims)):
            self.marks["video"] = mark

    def check(self) -> None:
        """Hold tokenizer, chat template and image processor against the model's config.

        Raises:
            CapaError: they do not know where a picture stands, have tokens beyond the embedding table, or make of a
                picture what the model does not take.
        """
        with refusing(
            f"{self.folder}: the tokenizer does not work with its own settings",
            "use the tokenizer_config.json that was published with the weights",
        ):
            self._check_tokens()
        with refusing(
            f"{self.folder}: the image processor does not work with its own settings",
            "use the preprocessor_config.json that was published with the weights",
        ):
            processed = self._processed(Image.new("RGB", (2 * _SIDE, _SIDE)))
        self.family.pictures(processed, self.dims)

    def _check_tokens(self) -> None:
        folder, tokenizer, decoder = self.folder, self.tokenizer, self.dims.decoder
        mark, token_id = self.marks["picture"], self.dims.image_token_id
        remedy = "use the tokenizer, chat template and config.json that were published together"
        largest = max([len(tokenizer) - 1, *tokenizer.added_tokens_decoder])
        if largest >= decoder.vocab_size:
            raise CapaError(
                f"{folder}: token {tokenizer.convert_ids_to_tokens(largest)!r} of the tokenizer has id {largest}, the "
                f"embedding table ends at {decoder.vocab_size - 1}; use the tokenizer that was published with the "
                "weights, or call resize_token_embeddings and save the model too"
            )
        known = tokenizer(mark, add_special_tokens=False)["input_ids"] if mark else []
        if known != [token_id]:
            raise CapaError(
                f"{folder}: config.json has {token_id} stand for a picture, the tokenizer has "
                f"{f'{mark} in pieces' if known else 'no such token'}; {remedy}"
            )
        for piece in filter(None, self.family.written(mark, Picture(np.empty(0), num_tokens=1)).split(mark)):
            ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise CapaError(
                    f"{folder}: the tokenizer has no token {piece}, which stands beside a picture; {remedy}"
                )
        text = self._written([Turn("user", [Image.new("RGB", (1, 1)), "?"])])
        if (count := text.count(mark)) != 1:
            raise CapaError(
                f"{folder}: the chat template writes {count} {mark} for a picture, whose token by config.json that is; "
                f"{remedy}"
            )

    def __call__(self, question: str, images: Sequence[Image.Image]) -> Prompt:
        """The pictures, then the question, as one user turn."""
        return self.chat([Turn("user", [*images, question])])

    def chat(self, turns: Sequence[Turn]) -> Prompt:
        """A conversation, up to where the assistant's next turn begins.

        Raises:
            CapaError: the model, its chat template or its image processor does not take what is in it, or it is too
                long.
        """
        shown: dict[str, list[Picture]] = {"picture": [], "video": []}
        for part in (part for turn in turns for part in turn.content):
            if isinstance(part, Image.Image):
                shown["picture"].append(self._picture(part))
            elif isinstance(part, Video):
                shown["video"].append(self._video(part))
        self._check_length(sum(picture.num_tokens for pictures in shown.values() for picture in pictures))
        text, ordered = self._expanded(self._written(turns), shown)
        # No token stands for more characters, so that what is longer need not be cut into tokens.
        self._check_length(len(text) // _LONGEST_TOKEN)
        # As transformers' processors do: the template writes the first token itself, or the tokenizer adds it.
        first = self.tokenizer.bos_token
        whole = first is not None and text.startswith(first)
        with refusing(f"{self.folder}: the tokenizer does not take this prompt"):
            input_ids = np.asarray(self.tokenizer(text, add_special_tokens=not whole)["input_ids"], dtype=np.int64)
        visual_ids = self.tokenizer.convert_tokens_to_ids(list(self.marks.values()))
        is_visual = np.isin(input_ids, visual_ids)
        position_ids, next_position = self.family.positions(is_visual, ordered)
        self._check_length(next_position)
        return Prompt(input_ids, is_visual, tuple(ordered), position_ids, next_position)

    def _check_length(self, tokens: int) -> None:
        limit = self.dims.decoder.longest
        if tokens > limit:
            raise CapaError(
                f"the prompt has {tokens} tokens, more than the {limit} of this decoder's context; "
                "use fewer or smaller pictures"
            )

    def _picture(self, image: Image.Image) -> Picture:
        def process() -> Picture:
            return self.family.pictures(self._processed(image), self.dims)[0]

        return _accepted("a picture", image, process)

    def _processed(self, image: Image.Image) -> Any:
        # A family may have to set what its image processor's own file leaves at another value.
        options = self.family.picture_options(image.size, self.sizes, self.bounds, self.dims)
        return self.image_processor(images=[image], return_tensors="np", **self.family.IMAGE_OPTIONS, **options)

    def _video(self, video: Video) -> Picture:
        family = self.family
        if not isinstance(family, VideoFamily) or "video" not in self.marks:
            raise CapaError(f"{family.ARCHITECTURE} takes no video; give some of its frames as pictures")

        def process() -> Picture:
            return family.video(video, self.image_processor, self.folder, self.bounds, self.dims)

        return _accepted("a video", video.frames[0], process)

    def _written(self, turns: Sequence[Turn]) -> str:
        """The conversation as the chat template writes it, a placeholder where a picture or video stands."""

        def entry(part: str | Image.Image | Video) -> dict[str, str]:
            if isinstance(part, str):
                return {"type": "text", "text": part}
            return {"type": "video" if isinstance(part, Video) else "image"}

        messages = [{"role": turn.role, "content": [entry(part) for part in turn.content]} for turn in turns]
        if not _has_own_templates(self.tokenizer):
            return render(self.tokenizer.get_chat_template(), messages, self.tokenizer.special_tokens_map)
        with refusing("the chat template does not take this conversation"):
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _expanded(self, text: str, shown: dict[str, list[Picture]]) -> tuple[str, list[Picture]]:
        """The text with every placeholder as long as what it stands for, and the pictures in its order."""
        if not self.marks["picture"]:
            raise CapaError(
                f"{self.folder}: config.json has {self.dims.image_token_id} stand for a picture, the tokenizer has no "
                "such token; use the files that were published together"
            )
        for kind, mark in self.marks.items():
            if (places := text.count(mark)) != len(shown[kind]):
                raise CapaError(f"{len(shown[kind])} {kind}s, but the prompt has {places} places for one ({mark})")
        waiting = {mark: iter(shown[kind]) for kind, mark in self.marks.items()}
        ordered: list[Picture] = []

        def expand(match: re.Match[str]) -> str:
            ordered.append(next(waiting[match[0]]))
            return self.family.written(match[0], ordered[-1])

        return re.sub("|".join(map(re.escape, waiting)), expand, text), ordered

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of an answer, without special tokens."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)


def _has_own_templates(tokenizer: Any) -> bool:
    """Whether a tokenizer's class, which is trusted code then, writes conversations in a way of its own."""
    method = getattr(type(tokenizer), "apply_chat_template", None)
    return method is not None and method.__module__ != "transformers.tokenization_utils_base"


def _published(text: Path, visual: Path, *, trust_remote_code: bool) -> Processors:
    """The processors that transformers makes of a checkpoint's files."""
    from transformers import AutoImageProcessor, AutoTokenizer

    if not trust_remote_code:
        for folder in dict.fromkeys((text, visual)):
            _refuse_own_code(folder)
    load = partial(_load, trust_remote_code=trust_remote_code)
    # Before the tokenizer, which reads the same files and says less of what is wrong with them.
    template = read_chat_template(text)
    tokenizer = load(AutoTokenizer, text, "tokenizer", _TOKENIZER_FILES)
    # Where torchvision is installed, transformers would take its ways of resizing, whose pixels differ.
    image_processor = load(AutoImageProcessor, visual, "image processor", _IMAGE_PROCESSOR_FILES, backend="pil")
    tokenizer.chat_template = template or tokenizer.chat_template
    if not tokenizer.chat_template:
        raise CapaError(f"{text}: the tokenizer has no chat template; add the model's chat_template.jinja")
    return Processors(tokenizer, image_processor)


def _load(
    auto_class: Any, folder: Path, what: str, files: Sequence[str], *, trust_remote_code: bool, **options: str
) -> Any:
    """Load what lies in the first of `files` that is there."""
    if not any((folder / file).is_file() for file in files):
        raise CapaError(f"{folder}: no {files[0]} (nor {' or '.join(files[1:])}); {refetch(folder)}")
    with refusing(f"{folder}: the {what} does not load"):
        # Left open, transformers would ask on stdin.
        return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code, **options)


def _refuse_own_code(folder: Path) -> None:
    """Raise where tokenizer or processors are code that came with them; transformers' own would be another's."""
    for file, keys in _CODE_FILES.items():
        path = folder / file
        if not path.is_file():
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CapaError(f"{path}: cannot be read as JSON ({first_line(error)}); download it again") from error
        sections = [data, *data.values()] if isinstance(data, dict) else []
        for code in (section.get("auto_map") for section in sections if isinstance(section, dict)):
            if code and (keys is None or (isinstance(code, dict) and keys & set(code))):
                raise CapaError(
                    f"{path}: auto_map names code of the checkpoint's own, which is not run; --trust-remote-code runs "
                    "it, if you have read it; without auto_map transformers' own classes are used"
                )


def _accepted(what: str, image: Image.Image, process: Callable[[], Picture]) -> Picture:
    with refusing(f"the image processor refuses {what} of {image.width} x {image.height} pixels", "crop or resize it"):
        return process()
