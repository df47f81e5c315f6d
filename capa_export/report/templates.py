"""Opens the templates of pages, with the words and filters that all of them use."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import CodeType

from jinja2 import BytecodeCache, Environment, FileSystemLoader, StrictUndefined, Template
from jinja2.bccache import Bucket
from markupsafe import Markup

from capa_export.config.recipe import ranges
from capa_export.report import words

__all__ = ["TEMPLATES", "Terms", "open_template", "size"]

TEMPLATES = Path(__file__).with_name("html")


class Terms:
    """The measures that a page names: each explains itself where it stands, on a key, a touch or under the mouse."""

    def __init__(self) -> None:
        self._used: dict[str, str] = {}

    def __call__(self, name: str, shown: str = "") -> Markup:
        """The measure's name as a button that opens its meaning; plain text where it has none."""
        meaning = words.MEANINGS.get(name.removeprefix("1 - "))
        if meaning is None:
            return Markup("{}").format(shown or name)
        self._used[name.removeprefix("1 - ")] = meaning
        return Markup('<button type="button" class="term" popovertarget="{}" title="{}">{}</button>').format(
            _anchor(name), meaning, shown or name
        )

    def explained(self) -> Markup:
        """The meanings of all measures named so far, each to be opened by its buttons."""
        one = Markup('<div popover class="meaning" id="{}"><b>{}</b> {}</div>')
        return Markup("\n").join(one.format(_anchor(name), name, meaning) for name, meaning in self._used.items())


class _Compiled(BytecodeCache):
    """Keeps what templates were compiled to for the next page of this process, as long as their text is the same."""

    def __init__(self) -> None:
        self._codes: dict[tuple[str, str], CodeType | None] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        bucket.code = self._codes.get((bucket.key, bucket.checksum))

    def dump_bytecode(self, bucket: Bucket) -> None:
        self._codes[bucket.key, bucket.checksum] = bucket.code


_COMPILED = _Compiled()


def open_template(name: str, *folders: Path) -> Template:
    """The template of this name, for one page; it uses those in these folders and the report's own."""
    environment = Environment(
        loader=FileSystemLoader([*folders, TEMPLATES], encoding="utf-8"),
        bytecode_cache=_COMPILED,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        percent=words.percent,
        error=words.error,
        decimals=words.decimals,
        layers=_layers,
        milliseconds=words.milliseconds,
        size=size,
    )
    return environment.get_template(name, globals={"term": Terms()})


def _anchor(name: str) -> str:
    return "term-" + re.sub(r"\W+", "-", name.removeprefix("1 - ").lower())


def _layers(layers: Sequence[int]) -> Markup:
    """`2-5, 13`, or `none`; a run never breaks over lines."""
    runs = ranges(layers).split(", ")
    return Markup(", ").join(Markup('<span class="nowrap">{}</span>').format(run) for run in runs)


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    scale, unit = (1e9, "GB") if count >= 1e9 else (1e6, "MB") if count >= 1e6 else (1e3, "kB")
    return f"{count / scale:,.{0 if count / scale >= 100 else 2}f}\u00a0{unit}"
