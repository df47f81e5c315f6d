"""Draws the picture at the head of README: one question, what each method keeps of the picture, and its answer.

make demo; python -m benchmarks.front --bundle out/demo
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from capa_export.api.bundle import Bundle
from capa_export.base.files import write_whole
from capa_export.report.pictures import fitted, overlay
from capa_export.study.explain.schema import Explanation

__all__ = ["FOLDER", "PICTURE", "QUESTION", "Answers", "answers_of", "draw"]

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
PICTURE = Path(__file__).resolve().parents[1] / "graphs" / "checkpoints" / "tiny-qwen25vl" / "scene.png"
QUESTION = "How many shapes are blue?"
_SHOWN = {"dense": "all tokens", "capa@2:0.75": "CAPA", "random@2:0.75": "random"}
"""The methods drawn, by the words over them."""
_GAP, _HEAD, _FOOT = 24, 92, 58
_INK, _RIGHT, _WRONG = (32, 33, 36), (27, 115, 64), (179, 38, 30)


@dataclass(frozen=True)
class Answers:
    """Method -> (visual tokens kept, answer), dense first."""

    found: Mapping[str, tuple[tuple[int, ...], str]]

    def right(self) -> list[str]:
        """Methods that answer as dense does."""
        return [name for name, (_, answer) in self.found.items() if answer == self.found["dense"][1]]


def answers_of(found: Explanation) -> Answers:
    return Answers({method.method: (method.kept, method.answer) for method in found.methods})


def draw(picture: Image.Image, question: str, found: Answers, grid: tuple[int, int]) -> Image.Image:
    """Draw the question over the methods that are shown, side by side, each with its answer below.

    Args:
        picture: that was asked about.
        question: that was asked.
        found: the answers.
        grid: rows and columns of visual tokens over the picture.
    """
    side = fitted(picture).width
    width = len(_SHOWN) * side + (len(_SHOWN) + 1) * _GAP
    sheet = Image.new("RGB", (width, _HEAD + side + _FOOT), "white")
    pen, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(30), ImageFont.load_default(24)
    pen.text((_GAP, 10), question, _INK, large)
    right = found.right()
    for column, (name, words) in enumerate(_SHOWN.items()):
        kept, answer = found.found[name]
        left = _GAP + column * (side + _GAP)
        total = grid[0] * grid[1]
        pen.text((left, 56), f"{words}: {len(kept)} of {total} visual tokens", _INK, small)
        sheet.paste(fitted(picture) if len(kept) == total else overlay(picture, *grid, kept), (left, _HEAD))
        good = name in right
        pen.text((left, _HEAD + side + 12), f"answer: {answer}", _RIGHT if good else _WRONG, large)
        if not good:
            pen.text((left + 170, _HEAD + side + 16), "wrong", _WRONG, small)
    return sheet


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.front", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("out/demo"), help="as `make demo` builds it")
    options = parser.parse_args(arguments)
    found = Bundle(options.bundle).explain(QUESTION, [PICTURE], page=options.bundle / "explain.html")
    (grid,) = found.grids
    FOLDER.mkdir(exist_ok=True)
    with Image.open(PICTURE) as picture:
        sheet = draw(picture, QUESTION, answers_of(found), (grid.rows, grid.cols))
    sheet.quantize(256).save(FOLDER / "kept.png", "PNG", optimize=True)
    keys = {"question", "visual_tokens", "linear_layers", "methods"}
    write_whole(FOLDER / "kept.json", found.model_dump_json(indent=1, include=keys) + "\n")


if __name__ == "__main__":
    main()
