"""The files beside a checkpoint's weights: config, tokenizer, chat template and image processor."""

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from capa_export.base.errors import CapaError
from capa_export.model.chat_template import TEMPLATE_FILES
from capa_export.model.checkpoint import Checkpoint
from capa_export.model.hub import require_own_file

__all__ = ["copy_sidecars", "scratch_folder", "sidecars", "write_json"]

_SIDECARS = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json")
_TEXT_SIDECARS = (*TEMPLATE_FILES, "merges.txt", "vocab.json", "*.model")
_VISUAL_SIDECARS = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def sidecars(folder: Path, *, code: bool = False) -> dict[str, list[Path]]:
    """Config, tokenizer and processor files of a checkpoint, by the part of the bundle that they belong to.

    Args:
        folder: of the checkpoint.
        code: whether its own Python belongs to them.

    Raises:
        CapaError: one is a link that leaves the checkpoint, or no file.
    """
    own = ("*.py",) if code else ()
    parts = {"llm": (*_SIDECARS, *_TEXT_SIDECARS, *own), "visual": (*_VISUAL_SIDECARS, *own)}
    found = {part: sorted({path for name in names for path in folder.glob(name)}) for part, names in parts.items()}
    for path in set[Path]().union(*found.values()):
        require_own_file(path, folder)
        if path.is_dir():
            raise CapaError(f"{path}: is a folder, where a file is expected; remove it, or put the file in its place")
    return found


def copy_sidecars(checkpoint: Checkpoint, folder: Path, *, code: bool = False) -> None:
    """Copy a checkpoint's sidecars, so that the bundle needs no checkpoint to run."""
    for part, paths in sidecars(checkpoint.sidecars, code=code).items():
        for path in paths:
            place = folder / part / path.relative_to(checkpoint.sidecars)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def scratch_folder() -> Path:
    """A new folder that goes when the process ends."""
    return Path(mkdtemp(dir=_scratch().name))


@cache
def _scratch() -> "TemporaryDirectory[str]":
    return TemporaryDirectory(prefix="capa-export-")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a file as transformers writes its own."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
