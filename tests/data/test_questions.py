"""Questions as users have them: lines, conversations, and the benchmarks' own layouts."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from capa_export.base.errors import CapaError
from capa_export.data.picture_sources import EncodedPicture
from capa_export.data.questions import Question, questions_from
from tests.conftest import noise


def write(path: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def read(data: Path, **options: Any) -> list[Question]:
    found = questions_from(data, **options)
    return [found.read(row) for row in found.rows]


def text_of(question: Question) -> str:
    return "".join(part for _, content in question.turns for part in content if isinstance(part, str))


def pictures_of(question: Question) -> list[Image.Image]:
    return [part for turn in question.open() for part in turn.content if isinstance(part, Image.Image)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(2):
        noise(56, 28, index).save(tmp_path / f"{index}.png")
    return tmp_path


def test_plain_lines(folder: Path) -> None:
    rows = [
        {"image": "0.png", "question": "what ?", "answer": "cat", "kind": "k", "id": 7, "more": 1},
        {"images": ["0.png", "1.png"], "question": "which ?", "answers": ["a", "b"], "category": "c"},
        {"image": "1.png", "question": "why ?"},
    ]
    one, two, three = read(write(folder / "q.jsonl", rows))
    assert (one.id, text_of(one), one.answers, one.kind) == ("7", "what ?", ["cat"], "k")
    assert (two.id, two.answers, two.kind) == ("line 2", ["a", "b"], "c")
    assert [picture.size for picture in pictures_of(two)] == [(56, 28), (56, 28)]
    assert three.answers == []


def test_conversations(folder: Path) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "what ?"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "sure ?"},
    ]
    [question] = read(write(folder / "q.jsonl", [{"messages": messages, "answer": "yes"}]), instruction="One word.")
    assert [role for role, _ in question.turns] == ["user", "assistant", "user"]
    assert list(question.turns[-1][1]) == ["sure ?", "\nOne word."]
    assert question.answers == ["yes"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "line 1: is no JSON object"),
        ("[]", "line 1: is no JSON object"),
        ({"question": "what ?"}, "shows no picture"),
        ({"image": "none.png", "question": "what ?"}, "none.png: no such picture"),
        ({"image": "0.png", "answer": "cat"}, "asks no question"),
        ({"images": "0.png", "question": "what ?"}, "must be a list"),
        ({"image": "a\0b.png", "question": "what ?"}, r"a\\x00b.png.*: no such picture"),
        ({"image": "0.png", "question": "what ?", "answer": ["cat", "dog"]}, "several go under answers"),
        ({"image": "0.png", "question": "what ?", "answers": "cat"}, "answers: must be a list"),
        ({"image": "0.png", "question": "what ?", "answers": [{"text": "cat"}]}, "or hold one under answer"),
        ({"messages": [{"role": "user", "content": "what ?"}]}, "shows no picture"),
        ({"messages": [{"role": "king", "content": "what ?"}]}, "messages: "),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "v.mp4"}]}]}, "shows a video"),
    ],
)
def test_a_row_that_cannot_be_asked(folder: Path, row: Any, problem: str) -> None:
    found = questions_from(write(folder / "q.jsonl", [row]))
    with pytest.raises(CapaError, match=problem):
        found.read(0)


def test_a_broken_picture_is_found_where_it_is_opened(folder: Path) -> None:
    (folder / "0.png").write_bytes(b"no picture")
    [question] = read(write(folder / "q.jsonl", [{"image": "0.png", "question": "what ?"}]))
    with pytest.raises(CapaError, match=r"0.png: not a readable picture"):
        question.open()


def test_the_digest_is_of_what_is_asked(folder: Path) -> None:
    rows = [
        {"image": "0.png", "question": "what ?", "answer": "cat"},
        {"image": "0.png", "question": "what ?", "answer": "dog", "kind": "k"},
        {"image": "1.png", "question": "what ?", "answer": "cat"},
        {"image": "0.png", "question": "why ?", "answer": "cat"},
    ]
    first, second, *others = [question.digest() for question in read(write(folder / "q.jsonl", rows))]
    assert first == second
    assert len({first, *others}) == 3


def test_a_larger_limit_holds_a_smaller_one(folder: Path) -> None:
    path = write(folder / "q.jsonl", [{"image": "0.png", "question": f"{index} ?"} for index in range(50)])
    drawn = [questions_from(path, limit=limit, seed=3).rows for limit in (5, 20)]
    assert len(drawn[0]) == 5
    assert set(drawn[0]) < set(drawn[1])
    assert drawn[0] == sorted(drawn[0]) != questions_from(path, limit=5, seed=4).rows
    assert questions_from(path, limit=500).rows == list(range(50))


PEOPLE = ["cat"] * 7 + ["dog"] * 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "vqav2": {
        "question_type": "what is",
        "multiple_choice_answer": "cat",
        "answers": [{"answer": word, "answer_confidence": "yes", "answer_id": i} for i, word in enumerate(PEOPLE, 1)],
        "image_id": 42,
        "answer_type": "other",
        "question_id": 42000,
        "question": "What is it?",
    },
    "textvqa": {
        "image_id": "003a8ae2ef43b901",
        "question_id": 34602,
        "question": "What is it?",
        "question_tokens": ["what", "is", "it"],
        "image_width": 56,
        "image_height": 28,
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "answers": PEOPLE,
        "image_classes": ["Animal"],
        "set_name": "val",
    },
    "pope": {
        "id": "0",
        "question_id": "1",
        "question": "Is there a cat in the image?",
        "answer": "yes",
        "image_source": "COCO_val2014_000000310196",
        "category": "adversarial",
    },
    "mmbench": {
        "index": 241,
        "question": "Which is it?",
        "hint": "Look closely.",
        "answer": "B",
        "A": "dog",
        "B": "cat",
        "C": "nan",
        "D": None,
        "category": "attribute_recognition",
        "source": "reasoning",
        "L2-category": "finegrained_perception",
        "comment": "nan",
        "split": "dev",
    },
}
ASKED = {
    "vqav2": "What is it?\nAnswer the question using a single word or phrase.",
    "textvqa": "What is it?\nAnswer the question using a single word or phrase.",
    "pope": "Is there a cat in the image?\nAnswer the question using a single word or phrase.",
    "mmbench": "Look closely.\nWhich is it?\nA. dog\nB. cat\n"
    "Answer with the option's letter from the given choices directly.",
}
FACTS = {
    "vqav2": ("42000", PEOPLE, "other"),
    "textvqa": ("34602", PEOPLE, ""),
    "pope": ("1", ["yes"], "adversarial"),
    "mmbench": ("241", ["B"], "attribute_recognition"),
}


def table(row: Mapping[str, Any], count: int = 2) -> datasets.Dataset:
    rows = [{**row, "image": noise(56, 28, index)} for index in range(count)]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("stored", ["parquet", "saved"])
def test_benchmarks_are_told_by_their_columns(name: str, stored: str, tmp_path: Path) -> None:
    rows = table(LAYOUTS[name])
    if stored == "parquet":
        (tmp_path / "data").mkdir()
        for shard in range(2):
            rows.select([shard]).to_parquet(tmp_path / f"data/validation-0000{shard}-of-00002.parquet")
    else:
        rows.save_to_disk(tmp_path)
    found = questions_from(tmp_path)
    assert found.benchmark.name == name
    questions = [found.read(row) for row in found.rows]
    assert len(questions) == 2
    assert text_of(questions[0]) == ASKED[name]
    assert (questions[0].id, questions[0].answers, questions[0].kind) == FACTS[name]
    for index, question in enumerate(questions):
        [picture] = pictures_of(question)
        assert picture.tobytes() == noise(56, 28, index).tobytes()


def test_gqa_keeps_its_pictures_apart(tmp_path: Path) -> None:
    instruction = {
        "id": "201307251",
        "imageId": "n161313",
        "question": "Is it overcast?",
        "answer": "no",
        "fullAnswer": "No, it is clear.",
        "isBalanced": True,
        "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
    }
    lost = {**instruction, "imageId": "n0", "id": "2"}
    for part, rows in {
        "testdev_balanced_instructions": datasets.Dataset.from_list([instruction, lost]),
        "testdev_balanced_images": table({"id": "n161313"}, 1),
    }.items():
        (tmp_path / part).mkdir()
        rows.to_parquet(tmp_path / part / "testdev-00000-of-00001.parquet")
    found = questions_from(tmp_path)
    assert found.benchmark.name == "gqa"
    question = found.read(0)
    assert (question.id, question.answers, question.kind) == ("201307251", ["no"], "verify")
    assert pictures_of(question)[0].tobytes() == noise(56, 28, 0).tobytes()
    with pytest.raises(CapaError, match="n0 is not among those of the dataset"):
        found.read(1)


def test_one_of_several_parts(tmp_path: Path) -> None:
    parts = datasets.DatasetDict({name: table(LAYOUTS["pope"], count) for name, count in (("val", 1), ("test", 2))})
    parts.save_to_disk(tmp_path)
    with pytest.raises(CapaError, match=r"several parts; choose one with --split: test, val"):
        questions_from(tmp_path)
    with pytest.raises(CapaError, match=r"no part 'train'; choose one with --split: test, val"):
        questions_from(tmp_path, split="train")
    assert len(read(tmp_path, split="test")) == 2


def test_a_table_of_base64_and_of_several_pictures(tmp_path: Path) -> None:
    file = io.BytesIO()
    noise(28, 28).save(file, "PNG")
    row = {"question": "what ?", "answer": "cat", "image": base64.b64encode(file.getvalue()).decode()}
    datasets.Dataset.from_list([row, {**row, "image": "?"}]).to_parquet(tmp_path / "test.parquet")
    found = questions_from(tmp_path)
    assert found.benchmark.name == "plain"
    assert pictures_of(found.read(0))[0].size == (28, 28)
    with pytest.raises(CapaError, match="neither bytes nor base64"):
        found.read(1)
    several = datasets.Dataset.from_list([{"question": "what ?", "images": [noise(28, 28), noise(56, 28)]}])
    several.cast_column("images", datasets.List(datasets.Image())).save_to_disk(tmp_path / "several")
    [question] = read(tmp_path / "several")
    assert [picture.size for picture in pictures_of(question)] == [(28, 28), (56, 28)]
    assert all(isinstance(part, EncodedPicture) for part in question.turns[0][1][:2])


def test_a_row_without_its_picture(tmp_path: Path) -> None:
    rows = [{**LAYOUTS["pope"], "image": {"bytes": None, "path": str(tmp_path / "gone.png")}}]
    rows.append({**LAYOUTS["pope"], "image": None})
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "val.parquet")
    found = questions_from(tmp_path)
    with pytest.raises(CapaError, match=r"gone.png is missing"):
        found.read(0)
    with pytest.raises(CapaError, match="shows no picture"):
        found.read(1)


def test_paths_in_rows_are_relative_to_the_dataset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ["0.png", str(folder / "1.png"), "0\0.png"]
    rows = [{**LAYOUTS["pope"], "image": {"bytes": None, "path": path}} for path in paths]
    (folder / "data").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "data" / "val.parquet")
    monkeypatch.chdir(folder.parent)
    found = questions_from(Path(folder.name))
    for row in range(2):
        assert pictures_of(found.read(row))[0].tobytes() == noise(56, 28, row).tobytes()
    with pytest.raises(CapaError, match=r"0\\x00.png is missing"):
        found.read(2)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"benchmark": "mme"}, "unknown benchmark 'mme'; known: mmbench, vqav2"),
        ({"benchmark": "gqa"}, "is no gqa: it has no column 'imageId'"),
    ],
)
def test_what_the_folder_is_not(tmp_path: Path, options: Any, problem: str) -> None:
    table(LAYOUTS["pope"]).save_to_disk(tmp_path)
    with pytest.raises(CapaError, match=problem):
        questions_from(tmp_path, **options)


def test_nothing_to_ask(tmp_path: Path) -> None:
    with pytest.raises(CapaError, match="holds no dataset"):
        questions_from(tmp_path)
    with pytest.raises(CapaError, match=r"no such folder of pictures, and no such picture or .jsonl file"):
        questions_from(tmp_path / "none")
    with pytest.raises(CapaError, match="no such file"):
        questions_from(tmp_path / "none.jsonl")
    with pytest.raises(CapaError, match="holds no question"):
        questions_from(write(tmp_path / "empty.jsonl", [""]))
    datasets.Dataset.from_list([{"text": "x"}]).save_to_disk(tmp_path / "text")
    with pytest.raises(CapaError, match="no column 'question', but text"):
        questions_from(tmp_path / "text")
    with pytest.raises(CapaError, match="--split is for folders"):
        questions_from(tmp_path / "empty.jsonl", split="test")


def test_vqa_accuracy_needs_ten_answers(folder: Path) -> None:
    path = write(folder / "q.jsonl", [{"image": "0.png", "question": "what ?", "answer": "cat"}])
    with pytest.raises(CapaError, match="has 1 answers, and VQA accuracy is of 10"):
        questions_from(path, benchmark="vqav2").read(0)


def test_one_of_ten_who_said_nothing_is_one_of_ten(folder: Path) -> None:
    row = {"image": "0.png", "question": "who ?", "answers": [*["nan"] * 9, ""]}
    [question] = [questions_from(write(folder / "q.jsonl", [row]), benchmark="vqav2").read(0)]
    assert question.answers == [*["nan"] * 9, ""]


def test_options_that_are_no_list_are_refused(folder: Path) -> None:
    row = {"image": "0.png", "question": "what ?", "answer": "A", "options": 5}
    with pytest.raises(CapaError, match="options: must be a list"):
        questions_from(write(folder / "q.jsonl", [row]), benchmark="mmbench").read(0)


def test_a_damaged_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CapaError, match="does not open"):
        questions_from(tmp_path)
