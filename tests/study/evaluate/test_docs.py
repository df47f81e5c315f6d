"""What docs/evaluate.md shows can be typed."""

import re
import shlex
from pathlib import Path

import pytest

from capa_export.cli import main
from capa_export.data.questions import questions_from
from tests.conftest import noise

DOCS = (Path(__file__).resolve().parents[3] / "docs/evaluate.md").read_text(encoding="utf-8")
_OPTION = re.compile(r"--[a-z][\w-]*")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", DOCS, flags=re.DOTALL)
    assert found
    return found


def test_every_option_exists(capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "--help"])
    known = set(_OPTION.findall(capsys.readouterr().out))
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            assert shlex.split(line)[:2] == ["capa-export", "evaluate"]
    assert set(_OPTION.findall(DOCS)) <= known


def test_every_row_is_a_question(tmp_path: Path) -> None:
    noise(56, 28).save(tmp_path / "0.png")
    [rows] = blocks("json")
    (tmp_path / "q.jsonl").write_text(rows, encoding="utf-8")
    found = questions_from(tmp_path / "q.jsonl")
    questions = [found.read(row) for row in found.rows]
    assert [(question.answers, question.kind) for question in questions] == [(["red"], "color"), (["so"], "")]
