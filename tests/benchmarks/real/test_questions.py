"""Questions in words."""

import sys
from pathlib import Path

import pytest

from benchmarks.real import questions
from benchmarks.real.questions import LEARNT, asked_in_words, in_words
from capa_export.data.questions import questions_from


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ("what color is the star ?", "What color is the star?"),
        ("what shape is blue ?", "What shape is blue?"),
    ],
)
def test_questions_are_written_as_people_write(asked: str, written: str) -> None:
    assert in_words(asked) == written


def test_the_command_writes_what_the_product_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["questions", "--out", str(tmp_path), "--per-kind", "2", "--calibration", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    questions.main()
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    folders = ["easy", "easy-calibration", "clutter", "clutter-calibration"]
    assert [path.parent.relative_to(tmp_path).as_posix() for path in paths] == folders
    for path, count in zip(paths, (4, 2, 4, 2), strict=True):
        asked = questions_from(path)
        found = [asked.read(row) for row in asked.rows]
        assert [question.kind for question in found] == [*LEARNT, *LEARNT][:count]
        assert all(question.answers for question in found)


def test_calibration_and_questions_share_no_picture() -> None:
    asked, seen = (
        {sample.image.tobytes() for sample in asked_in_words("easy", 20, seed=seed)}
        for seed in (questions.HELD_OUT, questions.CALIBRATION)
    )
    assert not asked & seen
