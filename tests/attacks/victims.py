"""What attacks start from: a small checkpoint, its recipe, a picture and its bundle, copied before they are changed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capa_export.bundle.manifest import encode_manifest
from capa_export.bundle.store import MANIFEST, Bundle
from tests.conftest import recorded

__all__ = ["Attack", "Victim", "beginning", "changed_json"]


@dataclass(frozen=True, slots=True)
class Victim:
    """Paths of what is attacked, and the folder of one attack."""

    checkpoint: Path
    recipe: Path
    pictures: Path
    bundle: Path
    folder: Path
    """For what the attack makes; empty before."""

    def checkpoint_with(self, file: str, change: Callable[[Any], Any]) -> Path:
        """A copy of the checkpoint in which a JSON file says something else."""
        copy = Path(shutil.copytree(self.checkpoint, self.folder / "checkpoint"))
        changed_json(copy / file, change)
        return copy

    def bundle_with(self, file: str, change: Callable[[Any], Any]) -> Path:
        """A copy of the bundle in which a JSON file of the export says something else, its digests included."""
        copy = Path(shutil.copytree(self.bundle, self.folder / "bundle"))
        changed_json(copy / file, change)
        recorded(Bundle(copy))
        return copy

    def bundle_saying(self, change: Callable[[dict[str, Any]], Any]) -> Path:
        """A copy of the bundle whose manifest says something else, and whose digest fits."""
        copy = Path(shutil.copytree(self.bundle, self.folder / "bundle"))
        entries = json.loads((copy / MANIFEST).read_text())
        entries.pop("digest")
        entries = change(entries) or entries
        (copy / MANIFEST).write_bytes(encode_manifest(entries))
        return copy

    def export(self, checkpoint: Path) -> list[object]:
        """Export a checkpoint."""
        out = self.folder / "out"
        return ["export", "-m", self.recipe, "--checkpoint", checkpoint, "--schedule", "capa@2:0.75/full", "-o", out]

    def plan(self, checkpoint: Path) -> list[object]:
        return ["plan", "-m", self.recipe, "--checkpoint", checkpoint, "-t", "onnx"]

    def calibrate(self, checkpoint: Path) -> list[object]:
        out = self.folder / "out"
        return ["calibrate", "-m", self.recipe, "--checkpoint", checkpoint, "--images", self.pictures, "-o", out]

    def run(self, bundle: Path | None = None, *more: object) -> list[object]:
        """Ask a bundle about a picture."""
        return ["run", bundle or self.bundle, "--prompt", "what ?", "--image", self.pictures / "0.png", *more]

    def look(self, picture: Path) -> list[object]:
        """Ask the bundle about this picture."""
        return ["run", self.bundle, "--prompt", "what ?", "--image", picture, "--max-new-tokens", 2]


Attack = Callable[[Victim], list[object]]


def beginning(value: object) -> str:
    """The first characters of a value, which may be a list of a million numbers."""
    return str(value[:9] if isinstance(value, list) else value)[:20]


def changed_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file; `change` returns another value, or changes the one that it is given."""
    data = json.loads(path.read_text(encoding="utf-8"))
    other = change(data)
    path.write_text(json.dumps(data if other is None else other), encoding="utf-8")
