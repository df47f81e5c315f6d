"""Chat templates as transformers renders them, in a process that is their own: `rendering` starts it.

Reads a line of JSON for every conversation, and answers with one: its `text`, or the `error` that there is.
"""

import json
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

__all__ = ["render", "serve"]

_SECONDS = 2
"""Of processor time for one conversation, which takes a thousandth of that."""
_MEMORY = 1 << 30
"""Bytes that the process may map, of which it takes 50 MB."""
_CHARACTERS = 1 << 24
"""Of a conversation's text: more than the longest context holds."""


class _Generation(Extension):
    """Takes `{% generation %}`, which marks what an assistant said and changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 - As its base class declares it.

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Dict:
    """Python's own, without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Holds no names that lead into Python itself."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace takes no name with an underscore in front, such as {name!r}")
        super().__setitem__(name, value)


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    made = _Namespace()
    for name, value in dict(*args, **kwargs).items():
        made[name] = value
    return made


def _raise(message: str) -> None:
    raise TemplateError(message)


def _json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - Templates may give all of these by position.
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002 - As above.
) -> str:
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - The user's own time, as transformers has it.


@cache
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json
    known: dict[str, Any] = environment.globals
    known |= {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _namespace}
    return environment.from_string(template)


def render(template: str, messages: list[dict[str, Any]], special_tokens: Mapping[str, str]) -> str:
    """The text of a conversation, up to where the assistant's next turn begins.

    Raises:
        TemplateError: the template is malformed, or refuses the conversation; its expressions may raise more.
        ValueError: the text is too long.
    """
    pieces: list[str] = []
    room = _CHARACTERS
    for piece in _compiled(template).generate(
        messages=messages, tools=None, documents=None, add_generation_prompt=True, **special_tokens
    ):
        room -= len(piece)
        if room < 0:
            raise ValueError(f"it writes more than {_CHARACTERS} characters")
        pieces.append(piece)
    return "".join(pieces)


def serve() -> None:
    """Render what comes on stdin until it ends; the system ends the process where one template takes too long."""
    # The whole terminal's Ctrl-C is for the process that started this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(ImportError, OSError, ValueError):
        # Not on every system.
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        try:
            answer = {"text": render(**json.loads(line))}
        except MemoryError:
            answer = {"error": f"it takes more than {_MEMORY >> 20} MB"}
        except Exception as error:  # noqa: BLE001 - A template raises what its expressions do.
            answer = {"error": str(error) or type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
