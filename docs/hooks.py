"""What the site does to pages that are read in the repository too."""

import re
from pathlib import Path
from typing import Any

__all__ = ["on_page_markdown"]

_DOCS = Path(__file__).resolve().parent
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Name a file of the repository in place of a link to it: the site has no such page."""
    folder = (_DOCS / page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if ":" in link[2] or target.is_relative_to(_DOCS) or not target.exists():
            return link[0]
        return f"{link[1]} (`{target.relative_to(_DOCS.parent)}`)"

    return _LINK.sub(named, markdown)
