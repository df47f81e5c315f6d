"""`make test` shows every value of each parameter, and all combinations are run between it and `make test-all`."""

from itertools import product

import pytest

from tests.products import once_each

FAMILIES, PRECISIONS = ("a", "b", "c", "d"), (("fp32", 1e-6), ("fp16", 2e-3))


@pytest.mark.parametrize(
    "parameters",
    [("abc",), ("ab", "cd"), ("abcd", "efg", "hi"), ("ab", "cde", "fghijk"), ("a", "bcd", "e")],
    ids="-".join,
)
def test_every_value_is_shown_and_nothing_lost(parameters: tuple[str, ...]) -> None:
    entries = once_each(*parameters)
    assert [entry.values for entry in entries] == [*product(*parameters)]
    shown = [entry.values for entry in entries if not entry.marks]
    assert [set(values) for values in zip(*shown, strict=True)] == [set(values) for values in parameters]
    assert len(shown) == max(map(len, parameters))
    assert all(mark.name == "exhaustive" for entry in entries for mark in entry.marks)


def test_shorter_lists_do_not_go_together() -> None:
    shown = [entry.values for entry in once_each(FAMILIES, [False, True], PRECISIONS) if not entry.marks]
    assert sorted(shown) == [
        ("a", False, "fp32", 1e-6),
        ("b", True, "fp16", 2e-3),
        ("c", True, "fp32", 1e-6),
        ("d", False, "fp16", 2e-3),
    ]
