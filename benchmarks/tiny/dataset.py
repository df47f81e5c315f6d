"""Writes held-out scenes as users have data: `python -m benchmarks.tiny.dataset --out DIR`."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from capa_export.data.scenes import HARD_KINDS, KINDS, SceneSample, samples

__all__ = ["main", "write_dataset"]

_SEED = 7
"""Neither that of the published evaluation nor that of calibration."""


def write_dataset(folder: Path, drawn: Iterable[SceneSample]) -> Path:
    """Writes each picture as a PNG, and a .jsonl file with one conversation, answer and kind per line.

    Returns:
        The .jsonl file; the paths in it are relative to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for index, sample in enumerate(drawn):
        content: list[dict[str, str]] = []
        for place, image in enumerate(sample.images):
            name = f"{index:05}_{place}.png"
            image.save(folder / name)
            content.append({"type": "image", "path": name})
        content.append({"type": "text", "text": sample.question})
        line: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
        lines.append(json.dumps({**line, "answer": sample.answer, "kind": sample.kind}))
    path = folder / "scenes.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
    return path


def main() -> None:
    """Command line."""
    known = (*KINDS, *HARD_KINDS)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--per-kind", type=int, default=100, help="questions of each kind (default: 100)")
    parser.add_argument("--kinds", nargs="+", choices=known, default=known, help="default: all")
    parser.add_argument("--heavy", action="store_true", help="fill every free cell with a large glyph, half coloured")
    parser.add_argument("--seed", type=int, default=_SEED)
    args = parser.parse_args()
    count = args.per_kind * len(args.kinds)
    print(write_dataset(args.out, samples(count, seed=args.seed, kinds=args.kinds, heavy=args.heavy)))


if __name__ == "__main__":
    main()
