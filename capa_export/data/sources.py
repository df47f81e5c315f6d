"""Finds what users ask with: a folder of pictures, a picture, a pattern of paths, or the lines of a .jsonl file."""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import UnidentifiedImageError
from pydantic import TypeAdapter, ValidationError

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.files import refuse_special
from capa_export.base.toml import first_problem
from capa_export.data.conversation import Message, Messages, files_of
from capa_export.data.picture_files import PICTURE_SUFFIXES, opened, pictures_among

__all__ = ["EXAMPLES", "Line", "find_source", "read_line", "read_lines", "wrong_line"]

_LINES = ".jsonl"
EXAMPLES = {
    False: '{"image": "photo.jpg", "question": "What is this?", "answer": "a cat"}',
    True: '{"messages": [{"role": "user", "content": [{"type": "image", "image": "photo.jpg"}, '
    '{"type": "text", "text": "What is this?"}]}], "answer": "a cat"}',
}
"""Examples of a line, by whether it holds a conversation; answers may be left out."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a .jsonl file: a conversation up to a question, whichever way it is written."""

    messages: Sequence[Message]
    row: dict[str, Any]
    """The JSON object of the line, with what belongs to no conversation."""


def find_source(place: Path) -> Path | tuple[Path, ...]:
    """The .jsonl file at a place, or the pictures there.

    Args:
        place: a folder, searched with its subfolders; a file; or a pattern, as `photos/*.jpg` or `photos/**/*.png`.

    Raises:
        CapaError: there is nothing, or something else.
    """
    if place.is_dir():
        if not (pictures := _pictures(place)):
            raise CapaError(f"{place}: no pictures in this folder ({', '.join(sorted(PICTURE_SUFFIXES))})")
        return pictures
    if place.suffix.lower() == _LINES and not _is_pattern(place):
        return place
    if place.is_file():
        _check_picture(place)
        return (place,)
    if not _is_pattern(place):
        raise CapaError(f"{place}: no such folder of pictures, and no such picture or {_LINES} file")
    if any("**" in part and part != "**" for part in place.parts):
        raise CapaError(f"{place}: ** stands for folders, with nothing beside it; write it as in photos/**/*.png")
    root = Path(place.anchor)
    matches = sorted(root.glob(str(place.relative_to(root))))
    if lines := [match for match in matches if match.suffix.lower() == _LINES]:
        if len(matches) > 1:
            raise CapaError(
                f"{place}: matches {lines[0]} and {len(matches) - 1} more; give one {_LINES} file, or pictures"
            )
        return lines[0]
    nested = [_pictures(match) if match.is_dir() else (match,) for match in matches]
    pictures = tuple(dict.fromkeys(file for files in nested for file in files))
    if not pictures:
        raise CapaError(f"{place}: matches no picture")
    for picture in pictures:
        if picture.suffix.lower() not in PICTURE_SUFFIXES:
            _check_picture(picture)
    return pictures


def _is_pattern(place: Path) -> bool:
    return not place.exists() and any(mark in str(place) for mark in "*?[")


def _pictures(folder: Path) -> tuple[Path, ...]:
    return tuple(pictures_among(folder.rglob("*")))


def _check_picture(path: Path) -> None:
    try:
        with opened(path):
            pass
    except CapaError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise CapaError(f"{path}: neither a picture nor a {_LINES} file; give one of them, or a folder") from error
        raise


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Line numbers and lines, without blank ones.

    Raises:
        CapaError: the file cannot be read, or holds none.
    """
    refuse_special(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise CapaError(f"{path}: no such file", ExitCode.USAGE) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CapaError(f"{path}: is no text file: {error}") from error
    if not (kept := [(number, line) for number, line in enumerate(lines, 1) if line.strip()]):
        raise CapaError(f"{path}: holds no question; write one per line, as {EXAMPLES[False]}")
    return kept


def read_line(path: Path, number: int, text: str, *, videos: bool = True) -> Line:
    """Parse one line of a .jsonl file; paths in it are relative to the file.

    Args:
        path: of the file.
        number: of the line.
        text: the line.
        videos: whether it may show any.

    Raises:
        CapaError: it is no conversation with a picture, or a picture is missing.
    """
    with wrong_line(path, number, conversation='"messages"' in text):
        try:
            row = json.loads(text)
            if not isinstance(row, dict):
                raise TypeError(f"a {type(row).__name__}")
        except (ValueError, TypeError, RecursionError) as error:
            raise CapaError(f"is no JSON object: {error}") from error
        messages = _messages(row)
        kinds = {part.type for message in messages for part in message.content}
        if "video" in kinds and not videos:
            raise CapaError("shows a video; give some of its frames as pictures")
        if kinds <= {"text"}:
            raise CapaError("shows no picture; visual tokens are what is measured")
        if missing := [file for file in files_of(messages, path.parent) if not _is_file(file)]:
            name = str(missing[0])
            raise CapaError(f"{name if name.isprintable() else repr(name)}: no such picture")
    return Line(messages, row)


@contextmanager
def wrong_line(path: Path, number: int, *, conversation: bool) -> Generator[None]:
    """Add to errors of the block which line they are about, and what a right one looks like."""
    try:
        yield
    except CapaError as error:
        example = EXAMPLES[conversation]
        raise CapaError(f"{path}: line {number}: {error}; a right line: {example}", error.code) from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        # A null character in its name, or too many characters.
        return False


def _messages(row: dict[str, Any]) -> Sequence[Message]:
    if "messages" in row:
        if extra := sorted({"image", "images", "question"} & set(row)):
            raise CapaError(f"has messages and {extra[0]}; write one or the other")
        try:
            return TypeAdapter(Messages).validate_python(row["messages"])
        except ValidationError as error:
            raise CapaError(f"messages: {first_problem(error, Message)}") from error
    if not {"image", "images", "question"} & set(row):
        raise CapaError(f"has neither messages nor an image and a question, but {', '.join(sorted(row)) or 'nothing'}")
    pictures = row["images"] if row.get("images") is not None else [row["image"]] if row.get("image") else []
    if not isinstance(pictures, list):
        raise CapaError("images: must be a list of paths")
    if not all(isinstance(picture, str) and picture for picture in pictures):
        raise CapaError("images: must be paths" if "images" in row else "image: must be a path")
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise CapaError("asks no question")
    content = [{"type": "image", "image": picture} for picture in pictures]
    turn = {"role": "user", "content": [*content, {"type": "text", "text": row["question"].strip()}]}
    return [Message.model_validate(turn)]
