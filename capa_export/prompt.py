"""From a question and pictures to the arrays that every runtime of a model is fed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from capa_export.dims import ModelDims
from capa_export.errors import CapaError
from capa_export.families import Family

__all__ = ["Picture", "Prompt", "Prompter", "open_picture"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture as the vision graph takes it."""

    patches: np.ndarray
    """FP32, in the shape of the vision graph's input."""
    num_tokens: int
    """Visual tokens it becomes."""
    grid: tuple[int, int] | None = None
    """Rows and columns of those tokens, where they make one grid."""


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

    @property
    def num_visual(self) -> int:
        return int(self.is_visual.sum())


class Prompter:
    """Tokenizer, chat template and image processor; needs no weights and no torchvision.

    Args:
        text: folder with the tokenizer and its chat template.
        visual: folder with the image processor; in a checkpoint it is the same.
        family: module of the model's family.
        dims: of the model.

    Raises:
        CapaError: a file is missing, or does not load.
    """

    def __init__(self, text: Path, visual: Path, family: Family, dims: ModelDims[Any]) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer

        self.family, self.dims = family, dims
        self.tokenizer = _load(AutoTokenizer, text, "tokenizer", _TOKENIZER_FILES)
        self.image_processor = _load(AutoImageProcessor, visual, "image processor", _IMAGE_PROCESSOR_FILES)
        self.tokenizer.chat_template = self.tokenizer.chat_template or _processor_template(text)
        if not self.tokenizer.chat_template:
            raise CapaError(f"{text}: the tokenizer has no chat template; add the model's chat_template.jinja")

    def __call__(self, question: str, images: Sequence[Image.Image]) -> Prompt:
        """The pictures, then the question, as one user turn."""
        content: list[dict[str, str]] = [{"type": "image"} for _ in images]
        content.append({"type": "text", "text": question})
        messages = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # A family may have to set what its image processor's own file leaves at another value.
        shown: list[Picture] = []
        for image in images:
            try:
                processed = self.image_processor(images=[image], return_tensors="np", **self.family.IMAGE_OPTIONS)
            except ValueError as error:
                size = f"{image.width} x {image.height}"
                raise CapaError(
                    f"the image processor refuses a picture of {size} pixels: {_first_line(error)}; crop or resize it"
                ) from error
            shown += self.family.pictures(processed, self.dims)
        mark = self.family.placeholder(self.tokenizer, self.dims)
        pieces = text.split(mark)
        if len(pieces) != len(shown) + 1:
            raise CapaError(f"{len(shown)} pictures, but the prompt has {len(pieces) - 1} places for one ({mark})")
        text = pieces[0] + "".join(
            self.family.written(mark, picture) + rest for picture, rest in zip(shown, pieces[1:], strict=True)
        )
        # As transformers' processors do: the template writes the first token itself, or the tokenizer adds it.
        first = self.tokenizer.bos_token
        whole = first is not None and text.startswith(first)
        input_ids = np.asarray(self.tokenizer(text, add_special_tokens=not whole)["input_ids"], dtype=np.int64)
        is_visual = input_ids == self.dims.image_token_id
        position_ids, next_position = self.family.positions(is_visual, shown)
        limit = self.dims.decoder.rope_limit
        if limit is not None and next_position > limit:
            raise CapaError(f"the prompt has {next_position} tokens, more than the {limit} of this decoder's context")
        return Prompt(input_ids, is_visual, tuple(shown), position_ids, next_position)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of an answer, without special tokens."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)


def _load(auto_class: Any, folder: Path, what: str, files: Sequence[str]) -> Any:
    """Load what lies in the first of `files` that is there."""
    if not any((folder / file).is_file() for file in files):
        raise CapaError(
            f"{folder}: no {files[0]} (nor {' or '.join(files[1:])}); copy it from where the weights were published"
        )
    try:
        return auto_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CapaError(f"{folder}: the {what} does not load: {_first_line(error)}") from error


def _processor_template(folder: Path) -> str | None:
    """The chat template that older checkpoints keep for their processor alone."""
    path = folder / "chat_template.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["chat_template"] if path.is_file() else None
    except (OSError, ValueError, KeyError) as error:
        raise CapaError(f"{path}: holds no chat template: {_first_line(error)}") from error


def open_picture(path: Path) -> Image.Image:
    """The picture at `path`, upright, in RGB.

    Raises:
        CapaError: there is none, or it does not decode.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise CapaError(f"{path}: no such picture") from error
    except Image.DecompressionBombError as error:
        raise CapaError(f"{path}: too many pixels for Pillow to open; resize the picture") from error
    except UnidentifiedImageError as error:
        raise CapaError(f"{path}: not a readable picture; replace or remove it") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise CapaError(f"{path}: not a readable picture ({_first_line(error)}); replace or remove it") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(": ")
