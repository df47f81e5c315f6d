"""How many threads the graphs of a bundle get."""

import pytest

from capa_export.study.evaluate.bundle_answers import _threads


@pytest.mark.parametrize(
    ("given", "threads"), [("4", 4), ("4,2", 4), (" 3 , 2", 3), ("", 0), ("many", 0), ("-1", 0), (None, 0)]
)
def test_threads(given: str | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert _threads() == threads
