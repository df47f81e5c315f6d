"""Progress: what is reported, and what a log shows of it."""

from itertools import count

import pytest

from capa_export.base.progress import progress, tracked
from capa_export.config.recipe import ranges


def test_tracked_items_end_at_their_total() -> None:
    calls: list[tuple[str, int, int]] = []
    assert list(tracked("ab", "letters", 2, lambda *call: calls.append(call))) == ["a", "b"]
    assert calls == [("letters", 0, 2), ("letters", 1, 2), ("letters", 2, 2)]


def test_a_log_gets_a_line_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count(0, 4)
    monkeypatch.setattr("capa_export.base.progress.time.monotonic", lambda: float(next(clock)))
    with progress() as report:
        list(tracked(range(6), "questions", 6, report))
    assert capsys.readouterr().err.splitlines() == [
        "questions: 2 of 6, 8 s, 16 s left",
        "questions: 5 of 6, 20 s, 4 s left",
    ]


def test_layers_as_ranges() -> None:
    assert ranges((0, 2, 3, 4, 9)) == "0, 2-4, 9"
    assert ranges(()) == "none"
