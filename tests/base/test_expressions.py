"""Expressions that might never end are told from those that are published."""

import pytest

from capa_export.base.expressions import backtracks


@pytest.mark.parametrize(
    "expression",
    [r"(.+)+\x00", "(?:a*)*b", "((a+)b?)+", "(a|b+){2,}c", "([a-z]+)*!", "(?:x(?:y{1,9})?)*", "(.*){30}", "(a+){,9}"],
)
def test_what_repeats_in_what_is_repeated(expression: str) -> None:
    assert backtracks(expression)


@pytest.mark.parametrize(
    "expression",
    [
        r".*\.(self_attn|mlp)\..*",
        "model.layers.(0|1)$",
        r"(\d{3})(?=(?:\d{3})*)|(?:ab)+|(a\+)*|([(+*)])+|([[a-z]+*])*|\(a+\)+",
        ")+(",
        "[",
        "",
    ],
)
def test_what_does_not(expression: str) -> None:
    assert not backtracks(expression)
