"""Whatever a chat template computes, it ends: by itself, or because the system ends it."""

import time
from typing import Any

import pytest

from capa_export.base.errors import CapaError
from capa_export.model.processors.rendering import render

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "what ?"}]}]
GOOD = "{{ bos_token }}{% for message in messages %}{{ message.content[0].text }}{% endfor %}"
LOOPS = "{% for i in range(99999) %}" * 4
HOSTILE = {
    "nested loops": LOOPS + "{% endfor %}" * 4,
    "nested loops that write": f"{LOOPS}x{'{% endfor %}' * 4}",
    "a text of 2 GB": "{{ 'a' * 2000000000 }}",
    "a text of 2 GB by a filter": "{{ 'a' | center(2000000000) }}",
    "a text of 2 GB by a format": "{{ '%2000000000s' % 'a' }}",
    "a text of 2 GB by a method": "{{ 'a'.zfill(2000000000) }}",
    "a list of 2 GB": "{{ ([1] * 300000000) | length }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a number that is written": "{{ 7 ** 3000000 }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a raised error of many lines": "{{ raise_exception('a\\nb\\x1b[2J') }}",
    "no template": "{% for %}",
    "too many brackets": "{{ " + "(" * 100_000,
}


WAITED_FOR = {"nested loops that write", "a number that is written"}
"""Those that the system ends after seconds, as it does others like them."""


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(text, id=name, marks=pytest.mark.exhaustive if name in WAITED_FOR else ())
        for name, text in HOSTILE.items()
    ],
)
def test_a_template_that_does_harm_is_one_line(template: str) -> None:
    started = time.monotonic()
    with pytest.raises(CapaError, match=r"^the chat template does not take this conversation: ") as raised:
        render(template, MESSAGES, {})
    assert str(raised.value).isprintable() and len(str(raised.value)) < 500
    assert time.monotonic() - started < 60
    assert render(GOOD, MESSAGES, {"bos_token": "<s>"}) == "<s>what ?"


def test_a_conversation_may_be_long() -> None:
    text = "word " * 300_000
    assert render(GOOD, [{"role": "user", "content": [{"text": text}]}], {"bos_token": "\ud7ff"}) == f"\ud7ff{text}"
