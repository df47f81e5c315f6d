"""Holds the figures of pages against the result files they come from: `python -m benchmarks.cited` writes them anew.

A figure is followed by a comment that says where it stands: `3.86<!-- prefill-qwen25vl-1024 prefill pruned speedup -->`
is `["prefill"]["pruned"]["speedup"]` of the newest `*prefill-qwen25vl-1024.json` in `benchmarks/results`,
`docs/results/figures` or `docs/pictures`. Of a list it takes the item of that number, or the one that has the word for
its name; `count` at the end counts, and `* 100` or `/ 1e9` changes the unit. It is shown with as many decimals as it
had. A figure that nobody measured here, a setting or somebody else's claim, is followed by `<!-- not measured -->`.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["PAGES", "figures", "rewritten", "uncited", "value_of"]

ROOT = Path(__file__).resolve().parents[1]
_FOLDERS = ("benchmarks/results", "docs/results/figures", "docs/pictures")
PAGES = ("README.md",)
"""Pages of which every figure with a unit is cited."""
_CITED = re.compile(r"(?P<shown>-?\d[\d,]*(?:\.\d+)?)<!-- (?P<where>[^>]+?) -->")
_UNMEASURED = "not measured"
_UNITS = r"(?:%|points|nats|GB|MB|ms|TFLOP|times)"
_LIST = r"(?:(?:,| and| to| or) \d[\d,.]*)*"
_BARE = re.compile(rf"(?<![\w.<-])\d[\d,]*(?:\.\d+)?{_LIST} {_UNITS}(?!\w)")


def value_of(where: str) -> float:
    """The figure that a comment names, in the unit that it asks for.

    Raises:
        KeyError: there is no such file, or nothing of that name in it.
    """
    name, *path = shlex.split(where)
    factor = 1.0
    if len(path) > 2 and path[-2] in ("*", "/"):
        *path, sign, number = path
        factor = float(number) if sign == "*" else 1 / float(number)
    files = sorted(
        file for folder in _FOLDERS for file in (ROOT / folder).glob(f"*{name}.json") if _named(file.stem, name)
    )
    if not files:
        raise KeyError(f"{name}: no such result file")
    value: Any = json.loads(files[-1].read_text(encoding="utf-8"))
    for word in path:
        value = _inside(value, word, where)
    return float(value) * factor


def _named(stem: str, name: str) -> bool:
    """Whether a file is called so, but for the date in front."""
    return re.sub(r"^\d{4}-\d\d-\d\d-", "", stem) == name


def _inside(value: Any, word: str, where: str) -> Any:
    if isinstance(value, dict) and word in value:
        return value[word]
    if isinstance(value, list):
        if word == "count":
            return len(value)
        if re.fullmatch(r"-?\d+", word):
            return value[int(word)]
        for item in value:
            if word in _names(item):
                return item
    raise KeyError(f"{where}: no {word}")


def _names(item: Any) -> set[str]:
    """What an item of a list is called: its texts, and those of what was scored."""
    if not isinstance(item, dict):
        return set()
    return {text for text in item.values() if isinstance(text, str)} | _names(item.get("scored"))


def figures(text: str) -> Iterator[tuple[str, str]]:
    """Every cited figure of a page as it is shown, and where it comes from."""
    for found in _CITED.finditer(text):
        if found["where"] != _UNMEASURED:
            yield found["shown"], found["where"]


def rewritten(text: str) -> str:
    """The page with the figures of the result files, with as many decimals as were shown."""

    def anew(found: re.Match[str]) -> str:
        if found["where"] == _UNMEASURED:
            return found[0]
        decimals = len(found["shown"].partition(".")[2])
        comma = "," if "," in found["shown"] or decimals == 0 else ""
        return f"{value_of(found['where']):{comma}.{decimals}f}<!-- {found['where']} -->"

    return _CITED.sub(anew, text)


def uncited(text: str) -> list[str]:
    """Figures with a unit that no comment follows, outside of code."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    prose = re.sub(r"\[[^\]]*\]\([^)]*\)", lambda link: link[0].partition("](")[0], prose)
    return [found[0] for found in _BARE.finditer(prose)]


def main() -> None:
    """Command line."""
    for page in sorted({*PAGES, *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))}):
        text = (ROOT / page).read_text(encoding="utf-8")
        if (anew := rewritten(text)) != text:
            (ROOT / page).write_text(anew, encoding="utf-8")
            print(page)


if __name__ == "__main__":
    sys.exit(main())
