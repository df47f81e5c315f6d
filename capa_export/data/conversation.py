"""Reads what users ask with: conversations in JSON, and videos as files or as folders of frames."""

import json
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError
from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, TypeAdapter, ValidationError

from capa_export.base.errors import CapaError, ExitCode, first_line
from capa_export.base.files import refuse_special
from capa_export.base.toml import Settings, first_problem
from capa_export.data.picture_files import (
    PICTURE_SUFFIXES,
    check_size,
    open_picture,
    opened,
    pictures_among,
    upright_rgb,
)
from capa_export.data.picture_sources import picture_bytes, picture_path
from capa_export.model.prompt import Turn, Video

__all__ = ["Message", "Messages", "conversations", "files_of", "open_video", "read_messages", "turns_from", "turns_of"]

_FPS = 2.0
"""Frames a second that a model sees unless told otherwise: Qwen's own choice."""
_MOST_FRAMES = 768
"""Frames that a model is shown: what Qwen's own code shows at most."""
_MOST_SHOWN = 1 << 29
"""Pixels of all these frames together, which are in memory at once: 1.6 GB, and 256 frames of 1920 x 1080."""
_MOST_DECODED = 1 << 30
"""Pixels of all frames of an animation, each of which is decoded to come to the next: 500 of 1920 x 1080, 20 s
of work."""
_UNTIMED = 100
"""Milliseconds that a frame is shown where its file does not say: what browsers do."""


class _Text(Settings):
    type: Literal["text"]
    text: str


class _Image(Settings):
    type: Literal["image"]
    source: str = Field(min_length=1, validation_alias=AliasChoices("image", "path", "url"))
    """A path, a file: URL, or a data: URL."""


class _Video(Settings):
    type: Literal["video"]
    path: Path = Field(validation_alias=AliasChoices("video", "path"))
    fps: float = Field(default=_FPS, gt=0, allow_inf_nan=False)


class _ImageUrl(Settings):
    url: str
    detail: Literal["auto", "high"] = "auto"
    """Pictures are seen as large as `--max-pixels` lets them, and so never in low detail."""


def _as_parts(content: object) -> object:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [_as_image(part) for part in content] if isinstance(content, list) else content


def _as_image(part: object) -> object:
    """Rewrite OpenAI's `image_url` part as the `image` part of transformers' chat templates."""
    if not isinstance(part, dict) or part.get("type") != "image_url":
        return part
    given = part.get("image_url")
    try:
        url = given if isinstance(given, str) else _ImageUrl.model_validate(given).url
    except ValidationError as error:
        raise ValueError(f"image_url: {first_problem(error, _ImageUrl)}") from error
    others = {key: value for key, value in part.items() if key not in ("type", "image_url")}
    return {"type": "image", "image": url, **others}


class Message(Settings):
    """One turn, as transformers' chat templates take it."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        list[Annotated[_Text | _Image | _Video, Field(discriminator="type")]], BeforeValidator(_as_parts)
    ]


def _asking(messages: list[Message]) -> list[Message]:
    if messages[-1].role != "user":
        raise ValueError(f"the last message must be the user's, not the {messages[-1].role}'s")
    return messages


Messages = Annotated[list[Message], Field(min_length=1), AfterValidator(_asking)]
"""A conversation up to a question."""


def conversations(
    prompt: str | None,
    images: Sequence[Path] = (),
    video: Path | None = None,
    fps: float | None = None,
    messages: Sequence[Path] = (),
) -> list[list[Turn]]:
    """The user's conversations: one turn of pictures, a video and a question, or the conversations in files.

    Raises:
        CapaError: both or neither is given, or something does not load.
    """
    if messages:
        if prompt is not None or images or video is not None or fps is not None:
            raise CapaError(
                "--messages holds the whole conversation: it takes no --prompt, --image, --video or --fps",
                ExitCode.USAGE,
            )
        return [read_messages(path) for path in messages]
    if prompt is None:
        raise CapaError("run needs --prompt, or a conversation in --messages", ExitCode.USAGE)
    if fps is not None and video is None:
        raise CapaError("--fps has no effect without --video", ExitCode.USAGE)
    if fps is not None and not 0 < fps < inf:
        raise CapaError(f"--fps {fps:g}: must be above 0, and a number", ExitCode.USAGE)
    shown: list[Image.Image | Video] = [open_picture(path) for path in images]
    if video is not None:
        shown.append(open_video(video, _FPS if fps is None else fps))
    return [[Turn("user", [*shown, prompt])]]


def read_messages(path: Path) -> list[Turn]:
    """The conversation in a JSON file, in the format of transformers' chat templates; paths are relative to the file.

    Raises:
        CapaError: the file is missing or not in that format, or a picture or video in it does not load.
    """
    refuse_special(path)
    try:
        messages = TypeAdapter(Messages).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise CapaError(f"{path}: no such file", ExitCode.USAGE) from error
    except ValidationError as error:
        raise CapaError(f"{path}: {first_problem(error, Message)}", ExitCode.USAGE) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CapaError(f"{path}: is no JSON file: {error}", ExitCode.USAGE) from error
    return turns_from(messages, path.parent)


def turns_of(messages: object, folder: Path) -> list[Turn]:
    """The conversation of parsed messages, in the format of transformers' chat templates, with its pictures opened.

    Args:
        messages: to be checked.
        folder: that paths are relative to.

    Raises:
        CapaError: they are not in that format, or what they show does not load.
    """
    try:
        return turns_from(TypeAdapter(Messages).validate_python(messages), folder)
    except ValidationError as error:
        raise CapaError(f"messages: {first_problem(error, Message)}", ExitCode.USAGE) from error


def turns_from(messages: Sequence[Message], folder: Path) -> list[Turn]:
    """Open the pictures and videos of a conversation; their paths are relative to `folder`.

    Raises:
        CapaError: one of them does not load.
    """

    def opened(part: _Text | _Image | _Video) -> str | Image.Image | Video:
        if isinstance(part, _Text):
            return part.text
        if isinstance(part, _Video):
            return open_video(folder / part.path, part.fps)
        picture = picture_bytes(part.source, folder)
        return open_picture(Path(picture.name), picture.data)

    return [Turn(message.role, [opened(part) for part in message.content]) for message in messages]


def files_of(messages: Sequence[Message], folder: Path) -> list[Path]:
    """Every picture and video file that `turns_from` opens, the frames of a folder one by one.

    Raises:
        CapaError: a picture lies elsewhere than on this machine, or what should hold one does not.
    """
    found: list[Path] = []
    for part in (part for message in messages for part in message.content):
        if isinstance(part, _Video):
            path = folder / part.path
            found += _frames(path) if path.is_dir() else [path]
        elif isinstance(part, _Image) and (path := picture_path(part.source, folder)) is not None:
            found.append(path)
        elif isinstance(part, _Image):
            picture_bytes(part.source, folder)
    return found


def _frames(folder: Path) -> list[Path]:
    return pictures_among(folder.iterdir())


def open_video(path: Path, fps: float) -> Video:
    """Open a video in RGB.

    Args:
        path: an animated picture, a file that PyAV decodes, or a folder of frames, which are taken in the order of
            their names.
        fps: how many frames a second to take from a file; for a folder, how many its frames are.

    Raises:
        CapaError: there is none, it does not decode, or its frames differ in size.
    """
    if path.is_dir():
        files = _frames(path)
        if not files:
            raise CapaError(f"{path}: no frames in this folder ({', '.join(sorted(PICTURE_SUFFIXES))})")
        frames: list[Image.Image] = []
        for file in files:
            frame = open_picture(file)
            frames.append(frame)
            if frame.size != frames[0].size:
                sizes = [f"{width} x {height}" for width, height in (frame.size, frames[0].size)]
                raise CapaError(f"{file}: {sizes[0]} pixels, but the first frame is {sizes[1]}; make them the same")
            _check_shown(len(files), frame.size, f"{path}: leave some of them out")
        return Video(frames, fps)
    try:
        with opened(path) as animation:
            return _read_animation(animation, fps, path)
    except CapaError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CapaError(f"{path}: no such video") from error
        if isinstance(error.__cause__, UnidentifiedImageError):
            return _read_video(path, fps)
        raise


def _check_shown(count: float, size: tuple[int, int], remedy: str) -> None:
    """Refuse frames that would not fit into memory, before they are read.

    Raises:
        CapaError: they are too many, or too large for as many.
    """
    most = min(_MOST_FRAMES, _MOST_SHOWN // max(1, size[0] * size[1]))
    if not count <= most:
        name, _, what = remedy.partition(": ")
        raise CapaError(f"{name}: {count:.6g} frames of {size[0]} x {size[1]} pixels, and at most {most} fit; {what}")


def _read_animation(animation: Image.Image, fps: float, path: Path) -> Video:
    """Read a GIF, WebP or PNG, whose frames may be shown for different times, as a video.

    It is gone through twice, so that only frames that are shown are in memory.
    """
    shown: list[float] = []
    decoded = 0
    for frame in ImageSequence.Iterator(animation):
        check_size(frame, str(path))
        frame.load()
        shown.append(frame.info.get("duration") or _UNTIMED)
        decoded += frame.width * frame.height
        if decoded > _MOST_DECODED:
            raise CapaError(
                f"{path}: {len(shown)} frames of {frame.width} x {frame.height} pixels are too many to read"
            )
    ends = np.cumsum(shown) / 1000
    duration = float(ends[-1])
    _check_shown(duration * fps, animation.size, f"{path}: give a lower --fps")
    times = _times(duration, fps)
    indices = np.searchsorted(ends, times, side="right").tolist()
    frames = {
        index: upright_rgb(frame, str(path))
        for index, frame in enumerate(ImageSequence.Iterator(animation))
        if index in set(indices)
    }
    return Video([frames[index] for index in indices], len(times) / duration)


def _read_video(path: Path, fps: float) -> Video:
    """Read a video of any other format, through transformers' reader."""
    from transformers import video_utils
    from transformers.utils.import_utils import is_av_available

    if not is_av_available():
        raise CapaError(
            f"{path}: no picture, and no decoder for videos: pip install av, or give a folder of frames or a GIF"
        )
    chosen: list[int] = []
    seen: list[float] = []

    def choose(metadata: Any, **_: object) -> list[int]:
        if not metadata.total_num_frames:
            raise ValueError("its header does not count its frames")
        duration = metadata.total_num_frames / metadata.fps
        _check_shown(duration * fps, (metadata.width or 1, metadata.height or 1), f"{path}: give a lower --fps")
        times = _times(duration, fps)
        chosen.extend(np.minimum(times * metadata.fps, metadata.total_num_frames - 1).astype(int).tolist())
        seen.append(len(times) / duration)
        return sorted(set(chosen))

    read: Callable[..., Any] = video_utils.load_video
    try:
        arrays, _ = read(str(path), backend="pyav", sample_indices_fn=choose)
    except CapaError:
        raise
    except Exception as error:  # PyAV's exceptions share no base class with anything.
        raise CapaError(f"{path}: does not decode as a video: {first_line(error)}") from error
    frame_of = {index: Image.fromarray(array) for index, array in zip(sorted(set(chosen)), arrays, strict=True)}
    return Video([frame_of[index] for index in chosen], seen[0])


def _times(duration: float, fps: float) -> np.ndarray:
    """The seconds at which frames are taken, from 0 on."""
    count = max(1, int(duration * fps))
    return np.arange(count) * (duration / count)
