"""Writes what the decoder is asked, held out and for calibration: `python -m benchmarks.real.questions --out DIR`.

The scenes are those of the test beds, the questions plain English: "What color is the star?", answered "red".
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.tiny.dataset import write_dataset
from capa_export.data.scenes import SceneSample, samples

__all__ = ["CALIBRATION", "HELD_OUT", "LEARNT", "SCENES", "asked_in_words", "in_words", "main"]

LEARNT = ("color_of", "shape_of")
"""Kinds of questions that are answered; the others of the test beds were not learnt."""
SCENES: dict[str, dict[str, Any]] = {
    "easy": {"num_sprites": (2, 3), "clutter": False},
    "clutter": {},
}
"""Options of the drawing: two or three shapes alone, or four to seven among grey glyphs."""
HELD_OUT, CALIBRATION = 11, 12
"""Seeds of the drawing."""


def in_words(question: str) -> str:
    """A question of the test beds as people write it."""
    return f"{question[0].upper()}{question[1:].removesuffix(' ?')}?"


def asked_in_words(scenes: str, count: int, *, seed: int) -> Iterator[SceneSample]:
    """Held-out questions of the kinds that were learnt, in turn."""
    for sample in samples(count, seed=seed, kinds=LEARNT, **SCENES[scenes]):
        yield replace(sample, question=in_words(sample.question))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--per-kind", type=int, default=100, help="held-out questions of each kind (default: 100)")
    parser.add_argument("--calibration", type=int, default=100, help="pictures to calibrate on (default: 100)")
    args = parser.parse_args()
    for scenes in SCENES:
        asked = asked_in_words(scenes, args.per_kind * len(LEARNT), seed=HELD_OUT)
        print(write_dataset(args.out / scenes, asked))
        seen = asked_in_words(scenes, args.calibration, seed=CALIBRATION)
        print(write_dataset(args.out / f"{scenes}-calibration", seen))


if __name__ == "__main__":
    main()
