"""The file of answers: who may write to it, and when it cannot be written."""

from contextlib import closing
from pathlib import Path

import pytest

from capa_export.base.errors import CapaError
from capa_export.study.evaluate.answers import Answer
from capa_export.study.evaluate.results import ANSWERS, Results


def opened(folder: Path) -> Results:
    return Results(folder, model="digest", source="here")


def test_one_run_at_a_time(tmp_path: Path) -> None:
    answer = Answer("dense", "star", 1, 12, 12, 0.0)
    with closing(opened(tmp_path)) as first:
        with pytest.raises(CapaError, match=r"answers.jsonl: another run writes to it; wait until it is done"):
            opened(tmp_path)
        first.add("q0", {"key": answer})
    with closing(opened(tmp_path)) as second:
        assert second.found == {"key": answer}


def test_a_file_that_is_refused_is_not_kept_busy(tmp_path: Path) -> None:
    opened(tmp_path).close()
    header = (tmp_path / ANSWERS).read_text()
    (tmp_path / ANSWERS).write_text(f"{header}[]\n")
    with pytest.raises(CapaError, match="line 2 is damaged"):
        opened(tmp_path)
    (tmp_path / ANSWERS).write_text(header)
    opened(tmp_path).close()


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / ANSWERS).mkdir()
    with pytest.raises(CapaError, match=r"answers.jsonl: Is a directory; choose a folder that can be written"):
        opened(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CapaError, match=r"file: File exists; choose a folder that can be written"):
        opened(tmp_path / "file")
