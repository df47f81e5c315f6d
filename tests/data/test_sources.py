"""Whatever asks about pictures takes them in the same ways, and says of a wrong line what a right one is."""

import base64
import json
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capa_export.base.errors import CapaError
from capa_export.config.recipe import load_recipe
from capa_export.data.conversation import read_messages
from capa_export.data.questions import questions_from
from capa_export.data.samples import samples_from
from capa_export.data.sources import EXAMPLES
from capa_export.model.prompt import Turn
from tests.conftest import noise

RECIPE = load_recipe("qwen25vl")
Asked = list[tuple[list[tuple[int, int]], str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(3):
        (tmp_path / "photos" / "more").mkdir(parents=True, exist_ok=True)
        noise(20 + index, 10, index).save(tmp_path / "photos" / ("more" if index == 2 else "") / f"{index}.png")
    return tmp_path


def as_samples(place: Path) -> Asked:
    return [(*shown(sample.turns), sample.answer) for sample in samples_from(place, RECIPE, 9, split="train")]


def as_questions(place: Path) -> Asked:
    found = questions_from(place, question=RECIPE.calibration.prompt)
    asked = map(found.read, found.rows)
    return [(*shown(question.open()), next(iter(question.answers), "")) for question in asked]


def shown(turns: Sequence[Turn]) -> tuple[list[tuple[int, int]], str]:
    parts = [part for turn in turns for part in turn.content]
    return [part.size for part in parts if isinstance(part, Image.Image)], str(parts[-1])


READERS = pytest.mark.parametrize("asked", [as_samples, as_questions])


@READERS
def test_folder_file_and_pattern(asked: Callable[[Path], Asked], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = RECIPE.calibration.prompt
    one, two, three = (([(20 + index, 10)], prompt, "") for index in range(3))
    assert asked(folder / "photos") == [one, two, three]
    assert asked(folder / "photos" / "1.png") == [two]
    assert asked(folder / "photos" / "*.png") == [one, two]
    assert asked(folder / "photos" / "**" / "*.png") == [one, two, three]
    assert asked(folder / "photos" / "[12].png") == [two]
    monkeypatch.chdir(folder)
    assert asked(Path("photos/?.png")) == [one, two]
    (folder / "photos" / "1.png").rename(folder / "photos" / "[12].picture")
    assert asked(folder / "photos" / "[12].picture") == [two]
    (folder / "notes.txt").write_text("no picture")
    for place, problem in (
        ("none", "no such folder of pictures, and no such picture or .jsonl file"),
        ("*.jpg", "matches no picture"),
        ("notes.txt", "neither a picture nor a .jsonl file"),
        ("*.txt", "neither a picture nor a .jsonl file"),
        ("photos/**.png", r"photos/\*\*\.png: \*\* stands for folders, .* photos/\*\*/\*\.png"),
    ):
        with pytest.raises(CapaError, match=problem):
            asked(Path(place))


@READERS
def test_a_folder_that_is_named_like_a_picture(asked: Callable[[Path], Asked], folder: Path) -> None:
    (folder / "photos" / "3.png").mkdir()
    noise(23, 10).save(folder / "photos" / "3.png" / "0.png")
    sizes = [sizes for sizes, *_ in asked(folder / "photos")]
    assert sizes == [[(20 + index, 10)] for index in (0, 1, 3, 2)]


@READERS
def test_a_picture_that_cannot_be_read_is_named(asked: Callable[[Path], Asked], folder: Path) -> None:
    (folder / "photos" / "3.png").symlink_to(folder / "gone.png")
    with pytest.raises(CapaError, match=r"3\.png: no such picture"):
        asked(folder / "photos")
    with pytest.raises(CapaError, match=r"3\.png: no such picture"):
        samples_from(folder / "photos", RECIPE, 9, split="train").digest()


def test_a_folder_among_the_frames_of_a_video(folder: Path) -> None:
    (folder / "photos" / "3.png").mkdir()
    (folder / "photos" / "1.png").unlink()
    path = folder / "lines.jsonl"
    path.write_text(json.dumps(asking({"type": "video", "video": "photos"})))
    samples = samples_from(path, RECIPE, 9, split="train")
    assert samples.digest()
    [sample] = samples
    assert sample.image.size == (20, 10)


@READERS
def test_lines_of_either_kind(asked: Callable[[Path], Asked], folder: Path) -> None:
    path = folder / "lines.jsonl"
    buffer = BytesIO()
    noise(7, 5).save(buffer, "PNG")
    data = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    photo = folder / "photos" / "0.png"
    openai = [{"type": "image_url", "image_url": {"url": url}} for url in (data, "photos/1.png", photo.as_uri())]
    what = {"type": "text", "text": "what ?"}
    lines: list[dict[str, Any]] = [
        {"image": "photos/0.png", "question": "what ?", "answer": "cat", "more": 1},
        {"images": ["photos/0.png", str(photo)], "question": " what ? ", "answer": 12},
        {"messages": [{"role": "user", "content": [*openai, what]}], "answer": "cat"},
        {"messages": [{"role": "user", "content": [{"type": "image", "url": data}, what]}], "answer": "cat"},
        {"image": data.replace("image/png", "image"), "question": "what ?", "answer": "cat"},
    ]
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert asked(path) == [
        ([(20, 10)], "what ?", "cat"),
        ([(20, 10), (20, 10)], "what ?", "12"),
        ([(7, 5), (21, 10), (20, 10)], "what ?", "cat"),
        ([(7, 5)], "what ?", "cat"),
        ([(7, 5)], "what ?", "cat"),
    ]


def asking(*parts: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what ?"}]}]}


WRONG: list[tuple[object, str]] = [
    ("{", "is no JSON object"),
    (["a"], "is no JSON object: a list"),
    ({}, "has neither messages nor an image and a question, but nothing"),
    ({"image": "photos/0.png"}, "asks no question"),
    ({"image": 5, "question": "what ?"}, "image: must be a path"),
    ({"images": "photos/0.png", "question": "what ?"}, "images: must be a list of paths"),
    ({"question": "what ?"}, "shows no picture"),
    ({"image": "none.png", "question": "what ?"}, "none.png: no such picture"),
    ({"image": "https://example.org/a.png", "question": "what ?"}, "nothing is downloaded; save the picture"),
    ({"image": "file://host/a.png", "question": "what ?"}, "nothing is downloaded"),
    ({"image": "file://[bad/a.png", "question": "what ?"}, "file://[bad/a.png: is no URL (Invalid IPv6 URL)"),
    ({"image": "https://[bad/a.png", "question": "what ?"}, "https://[bad/a.png: is no URL"),
    ({"image": "n" * 300, "question": "what ?"}, "no such picture"),
    ({"image": "data:image/png;base64,?", "question": "what ?"}, "data:image/png;base64: is no base64"),
    ({"image": "data:image/png", "question": "what ?"}, "has no comma"),
    ({"image": "photos/0.png", "question": "what ?", "messages": []}, "has messages and image; write one"),
    ({"image": "photos/0.png", "question": "what ?", "answer": ["a"]}, "answer: must be one; several go under answers"),
    (asking({"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}), "nothing is downloaded"),
    (asking({"type": "image_url", "image_url": {"link": "a.png"}}), "image_url: url: Field required"),
    (asking({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}), "image_url: detail: Input should"),
    (asking({"type": "image_url"}), "image_url: "),
    (asking({"type": "audio"}), "messages: 0.content.0: "),
]


@READERS
@pytest.mark.parametrize(("line", "problem"), WRONG)
def test_a_wrong_line(asked: Callable[[Path], Asked], folder: Path, line: object, problem: str) -> None:
    path = folder / "lines.jsonl"
    right = json.dumps({"image": "photos/0.png", "question": "what ?"})
    path.write_text(f"{right}\n\n{line if isinstance(line, str) else json.dumps(line)}\n", encoding="utf-8")
    with pytest.raises(CapaError) as caught:
        asked(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: line 3: ") and problem in said and "\n" not in said
    # What it gives as an example is right.
    example = said.partition("; a right line: ")[2]
    assert example in EXAMPLES.values()
    noise(9, 9).save(folder / "photo.jpg")
    path.write_text(example, encoding="utf-8")
    assert asked(path) == [([(9, 9)], "What is this?", "a cat")]


def test_the_digest_is_of_what_a_data_url_holds(tmp_path: Path) -> None:
    def digest(seed: int) -> str:
        buffer = BytesIO()
        noise(8, 8, seed).save(buffer, "PNG")
        data = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        path = tmp_path / "lines.jsonl"
        path.write_text(json.dumps({"image": data, "question": "what ?"}), encoding="utf-8")
        return samples_from(path, RECIPE, 9, split="train").digest()

    assert digest(0) == digest(0) != digest(1)


def test_a_conversation_shows_pictures_as_openai_does(folder: Path) -> None:
    path = folder / "messages.json"
    path.write_text(json.dumps(asking({"type": "image_url", "image_url": "photos/0.png"})["messages"]))
    [turn] = read_messages(path)
    assert np.array_equal(np.asarray(turn.content[0]), np.asarray(noise(20, 10)))
