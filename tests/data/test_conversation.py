"""Conversations and videos as users store them, and what is said about those that cannot be read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import video_utils
from transformers.utils import import_utils

from capa_export.base.errors import CapaError, ExitCode
from capa_export.data.conversation import conversations, open_video, read_messages
from capa_export.model.prompt import Turn, Video
from tests.conftest import noise

Write = Callable[[object], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(messages: object) -> Path:
        path = tmp_path / "messages.json"
        path.write_text(json.dumps(messages), encoding="utf-8")
        return path

    return write


def gray(*levels: int) -> list[Image.Image]:
    """Pictures that are told apart by their brightness."""
    return [Image.new("RGB", (8, 6), (level, level, level)) for level in levels]


def levels(video: Video) -> list[int]:
    return [int(np.asarray(frame)[0, 0, 0]) for frame in video.frames]


def test_messages_are_read_as_chat_templates_take_them(tmp_path: Path, write: Write) -> None:
    (tmp_path / "pictures").mkdir()
    noise(20, 10).save(tmp_path / "pictures" / "a.png")
    gray(1, 2)[0].save(tmp_path / "b.png")
    for index, frame in enumerate(gray(9, 8, 7)):
        (tmp_path / "frames").mkdir(exist_ok=True)
        frame.save(tmp_path / "frames" / f"{index}.png")
    turns = read_messages(
        write(
            [
                {"role": "system", "content": "be brief"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "look:"},
                        {"type": "image", "image": "pictures/a.png"},
                        {"type": "image", "path": str(tmp_path / "b.png")},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
                {"role": "user", "content": [{"type": "video", "video": "frames", "fps": 4}]},
            ]
        )
    )
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[0] == Turn("system", ["be brief"]) and turns[2] == Turn("assistant", ["yes"])
    text, first, second = turns[1].content
    assert text == "look:"
    assert isinstance(first, Image.Image) and first.size == (20, 10)
    assert isinstance(second, Image.Image) and second.size == (8, 6)
    (video,) = turns[3].content
    assert isinstance(video, Video) and video.fps == 4 and levels(video) == [9, 8, 7]


BAD: dict[str, tuple[object, str]] = {
    "no list": ({"role": "user"}, "valid list"),
    "nothing": ([], "at least 1 item"),
    "no role": ([{"content": "x"}], "0.role: Field required"),
    "unknown role": ([{"role": "tool", "content": "x"}], "0.role: Input should be 'system', 'user' or 'assistant'"),
    "unknown key": ([{"role": "user", "content": "x", "name": "y"}], "unknown key 0.name"),
    "unknown part": ([{"role": "user", "content": [{"type": "audio"}]}], "0.content.0: Input tag 'audio'"),
    "no path": ([{"role": "user", "content": [{"type": "image"}]}], "0.content.0.image.image: Field required"),
    "no picture": ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], "x.png: no such picture"),
    "no video": ([{"role": "user", "content": [{"type": "video", "video": "x.gif"}]}], "x.gif: no such video"),
    "no time": ([{"role": "user", "content": [{"type": "video", "video": "x.gif", "fps": 0}]}], "fps: Input should be"),
    "answered": ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "must be the user's, not"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_messages_are_one_line(write: Write, name: str) -> None:
    content, message = BAD[name]
    path = write(content)
    with pytest.raises(CapaError) as raised:
        read_messages(path)
    line = str(raised.value)
    assert message in line and "\n" not in line and str(path.parent) in line


def test_a_file_that_is_no_json_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CapaError, match="nowhere: no such file"):
        read_messages(tmp_path / "nowhere")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CapaError, match="text: is no JSON file: Expecting value"):
        read_messages(tmp_path / "text")


def test_a_question_and_pictures_are_one_turn(tmp_path: Path) -> None:
    noise(20, 10).save(tmp_path / "a.png")
    for index, frame in enumerate(gray(9, 8)):
        (tmp_path / "frames").mkdir(exist_ok=True)
        frame.save(tmp_path / "frames" / f"{index}.png")
    [[turn]] = conversations("what ?", [tmp_path / "a.png"], tmp_path / "frames", 3.0)
    picture, video, question = turn.content
    assert isinstance(picture, Image.Image) and isinstance(video, Video) and video.fps == 3 and question == "what ?"
    for options, message in (
        ({"prompt": None}, "run needs --prompt"),
        ({"prompt": "x", "messages": [tmp_path]}, "--messages holds the whole conversation"),
        ({"prompt": "x", "fps": 2.0}, "--fps has no effect without --video"),
        ({"prompt": "x", "video": tmp_path / "frames", "fps": 0.0}, "--fps 0: must be above 0"),
    ):
        given: dict[str, Any] = options
        with pytest.raises(CapaError, match=message) as raised:
            conversations(**given)
        assert raised.value.code == ExitCode.USAGE


def test_frames_of_an_animation_are_taken_when_they_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    first, *others = gray(0, 80, 160, 240)
    first.save(path, save_all=True, append_images=others, duration=[500, 1500, 250, 250], loop=0)
    video = open_video(path, 2.0)
    assert levels(video) == [0, 80, 80, 80, 160] and video.fps == 2
    assert levels(open_video(path, 0.4)) == [0] and open_video(path, 0.4).fps == pytest.approx(1 / 2.5)
    # The frame of the last quarter of a second shows only to those who look four times a second.
    assert levels(open_video(path, 4.0)) == [0, 0, 80, 80, 80, 80, 80, 80, 160, 240]
    first.save(tmp_path / "still.png")
    assert levels(open_video(tmp_path / "still.png", 2.0)) == [0]


def test_frames_of_a_folder_are_all_taken_by_name(tmp_path: Path) -> None:
    with pytest.raises(CapaError, match="no frames in this folder"):
        open_video(tmp_path, 2.0)
    for name, frame in zip("cab", gray(30, 10, 20), strict=True):
        frame.save(tmp_path / f"{name}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    assert levels(open_video(tmp_path, 24.0)) == [10, 20, 30]
    noise(9, 9).save(tmp_path / "d.png")
    with pytest.raises(CapaError, match="9 x 9 pixels, but the first frame is 8 x 6; make them the same"):
        open_video(tmp_path, 2.0)


def test_a_video_without_a_decoder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"\0\0\0\x18ftypmp42")
    monkeypatch.setattr(import_utils, "is_av_available", lambda: False)
    with pytest.raises(CapaError, match=r"clip\.mp4: no picture, and no decoder for videos: pip install av, or give"):
        open_video(path, 2.0)
    with pytest.raises(CapaError, match="nowhere: no such video"):
        open_video(tmp_path / "nowhere", 2.0)
    torn = tmp_path / "torn.gif"
    first, *others = [noise(64, 64, seed) for seed in range(3)]
    first.save(torn, save_all=True, append_images=others)
    torn.write_bytes(torn.read_bytes()[:6000])
    with pytest.raises(CapaError, match=r"torn\.gif: not a readable picture"):
        open_video(torn, 2.0)


def test_any_other_video_goes_through_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader as PyAV's: it gives each frame that is asked for once, in order."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"\0\0\0\x18ftypmp42")
    frames = gray(*range(0, 240, 8))

    def read(file: str, *, backend: str, sample_indices_fn: Callable[..., list[int]]) -> Any:
        assert (file, backend) == (str(path), "pyav")
        indices = sample_indices_fn(video_utils.VideoMetadata(total_num_frames=len(frames), fps=10.0))
        return np.stack([np.asarray(frames[index]) for index in range(len(frames)) if index in indices]), None

    monkeypatch.setattr(import_utils, "is_av_available", lambda: True)
    monkeypatch.setattr(video_utils, "load_video", read)
    video = open_video(path, 2.0)
    assert levels(video) == [8 * index for index in range(0, 30, 5)] and video.fps == 2
    # More than there are: each as often as it takes.
    assert levels(open_video(path, 20.0)) == [8 * (index // 2) for index in range(60)]

    frames.clear()
    with pytest.raises(CapaError, match="does not decode as a video: its header does not count its frames"):
        open_video(path, 2.0)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Invalid data found\nmore")

    monkeypatch.setattr(video_utils, "load_video", fail)
    with pytest.raises(CapaError, match=r"clip\.mp4: does not decode as a video: Invalid data found$"):
        open_video(path, 2.0)
