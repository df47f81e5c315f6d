"""Draws the picture at the head of README: one question, what each method keeps of the picture, and its answer.

make demo; python -m benchmarks.front --bundle out/demo

With Chromium installed, `--browser` photographs the report and the explanation for the docs, too.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from capa_export.api.bundle import Bundle
from capa_export.base.files import write_whole
from capa_export.report.pictures import fitted, overlay
from capa_export.study.explain.schema import Explanation

__all__ = ["FOLDER", "PICTURE", "QUESTION", "SCREENSHOTS", "Answers", "Screenshot", "answers_of", "draw", "photograph"]

_ROOT = Path(__file__).resolve().parents[1]
FOLDER = _ROOT / "docs" / "pictures"
PICTURE = _ROOT / "graphs" / "checkpoints" / "tiny-qwen25vl" / "scene.png"
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


@dataclass(frozen=True)
class Screenshot:
    """One look at a page of a bundle."""

    name: str
    page: str
    """File in the bundle."""
    width: int
    height: int
    dark: bool = False


SCREENSHOTS = (
    Screenshot("report", "report.html", 1280, 960),
    Screenshot("report-phone", "report.html", 390, 844, dark=True),
    Screenshot("explain", "explain.html", 1280, 960),
)


def photograph(bundle: Path, browser: str, folder: Path = FOLDER) -> list[Path]:
    """Photograph a bundle's pages with Chromium, without scrolling; returns the pictures."""
    written: list[Path] = []
    for shot in SCREENSHOTS:
        path = folder / f"{shot.name}.png"
        with tempfile.TemporaryDirectory() as profile:
            raw, page = Path(profile) / "raw.png", Path(profile) / shot.page
            # Pictures in the docs show no folder of the machine that they were taken on.
            page.write_text((bundle / shot.page).read_text(encoding="utf-8").replace(f"{_ROOT}/", ""), encoding="utf-8")
            flags = [
                "--headless",
                "--no-sandbox",
                "--hide-scrollbars",
                f"--user-data-dir={profile}",
                f"--blink-settings=preferredColorScheme={int(not shot.dark)}",
                f"--window-size={shot.width},{shot.height}",
                f"--screenshot={raw}",
            ]
            subprocess.run([browser, *flags, page.as_uri()], check=True, capture_output=True)
            with Image.open(raw) as picture:
                picture.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path, "PNG", optimize=True)
        written.append(path)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.front", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("out/demo"), help="as `make demo` builds it")
    parser.add_argument("--browser", nargs="?", const="chromium", help="Chromium, to photograph pages with")
    options = parser.parse_args(arguments)
    found = Bundle(options.bundle).explain(QUESTION, [PICTURE], page=options.bundle / "explain.html")
    (grid,) = found.grids
    FOLDER.mkdir(exist_ok=True)
    with Image.open(PICTURE) as picture:
        sheet = draw(picture, QUESTION, answers_of(found), (grid.rows, grid.cols))
    sheet.quantize(256).save(FOLDER / "kept.png", "PNG", optimize=True)
    keys = {"question", "visual_tokens", "linear_layers", "methods"}
    write_whole(FOLDER / "kept.json", found.model_dump_json(indent=1, include=keys) + "\n")
    if options.browser:
        photograph(options.bundle, options.browser)


if __name__ == "__main__":
    main()
