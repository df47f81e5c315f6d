"""Every selector on the test beds: accuracy, and what the digest of CAPA's paper leaves open.

Measures, then writes tables, plots and sentences into docs/results. What --out holds is not measured again.

python -m benchmarks.selection --workers 2 --out out/selection
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.selection.bed import SEED, SelectionBed, open_bed
from benchmarks.selection.figures import FigureRecord, conditions, read_record
from benchmarks.selection.measure import ffn, layer, linearity, ratio, sinks, stability, tuned
from benchmarks.selection.pages.index import PAGES, figures_file, render
from benchmarks.tiny.beds import BEDS
from capa_export.base.code import versions
from capa_export.base.errors import CapaError
from capa_export.base.files import write_whole
from capa_export.base.progress import progress
from capa_export.base.toml import Settings
from capa_export.bundle.store import digest_of
from capa_export.selectors.selector import load_selector, selectors

_DOCS = Path(__file__).parents[2] / "docs" / "results"
_QUESTIONS = 180
_SECONDS_A_PREFILL = 0.045
"""Seconds of a prefill with the steps that follow, on one core."""


@dataclass(frozen=True)
class Part:
    """A part that can be measured alone."""

    measure: Callable[[SelectionBed, Sequence[str], int], Settings]
    prefills: Callable[[int], int]
    """Prefills for each question, by the number of selectors."""
    share: float = 1.0
    """Share of the questions that the part is measured on."""

    def count(self, questions: int) -> int:
        return max(1, round(questions * self.share))


PARTS = {
    "ratio": Part(ratio.measure, ratio.prefills),
    "layer": Part(layer.measure, layer.prefills, 0.4),
    "tuned": Part(tuned.measure, tuned.prefills),
    "ffn": Part(ffn.measure, ffn.prefills),
    "linearity": Part(linearity.measure, linearity.prefills, 0.5),
    "sinks": Part(sinks.measure, sinks.prefills, 0.25),
    "stability": Part(stability.measure, stability.prefills, 0.4),
}


def minutes(part: str, chosen: Sequence[str], questions: int) -> float:
    """Minutes that a part takes of one core on one bed."""
    inside = [name for name in chosen if load_selector(name).place != "input"]
    prefills = PARTS[part].prefills(len(inside if part == "layer" else chosen))
    return PARTS[part].count(questions) * prefills * _SECONDS_A_PREFILL / 60


def measured(bed: SelectionBed, part: str, chosen: Sequence[str], questions: int) -> tuple[dict[str, Any], int]:
    """A part's figures, measured or as they were, and the number of questions they rest on."""
    count = PARTS[part].count(questions)
    key = digest_of(
        [
            versions("torch", "transformers", code_of=[PARTS[part].measure.__module__]),
            [bed.model.digest, bed.model.prompt_settings, bed.options.samples],
            [question.digest() for question in bed.read(count)],
            list(chosen),
        ]
    )
    path = bed.folder / f"{part}.json"
    page = PAGES[part]
    if path.is_file() and (kept := _CachedFigures.model_validate_json(path.read_text(encoding="utf-8"))).key == key:
        return kept.figures, count
    found = PARTS[part].measure(bed, chosen, count)
    assert isinstance(found, page.FIGURES)
    figures = found.model_dump(mode="json")
    write_whole(path, _CachedFigures(key=key, figures=figures).model_dump_json(indent=1))
    return figures, count


class _CachedFigures(Settings):
    """A part's figures in --out."""

    key: str
    """Digest of all that the figures follow from."""
    figures: dict[str, Any]


def publish(docs: Path, bed: SelectionBed, part: str, figures: dict[str, Any], count: int, command: str) -> None:
    """Put figures where pages are made of them; the same ones keep their date."""
    path = figures_file(docs, part, bed.name)
    page = PAGES[part]
    about = conditions(command, checkpoint=bed.model.digest, questions=count, seed=SEED)
    record: FigureRecord[Any] = FigureRecord[page.FIGURES](about=about, figures=figures)
    if path.is_file() and read_record(path, page.FIGURES).figures == record.figures:
        return
    write_whole(path, record.model_dump_json(indent=1) + "\n")


def write_pages(docs: Path) -> list[str]:
    """Write the pages that follow from the figures; returns their names."""
    files = render(docs)
    for name, text in files.items():
        write_whole(docs / name, text)
    return sorted(files)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.selection", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="answers, calibrations and figures, to go on from")
    parser.add_argument("--bed", nargs="+", choices=BEDS, default=list(BEDS))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    parser.add_argument(
        "--selector", nargs="+", choices=selectors(), default=list(selectors()), help="capa is always one"
    )
    parser.add_argument("--questions", type=int, default=_QUESTIONS, help="per bed; some parts take a share of them")
    parser.add_argument("--samples", type=int, help="of the calibration (default: the recipe's)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--docs", type=Path, default=_DOCS, help="where figures and pages go")
    parser.add_argument("--render", action="store_true", help="only make the pages again, from the figures in --docs")
    options = parser.parse_args(arguments)
    if not options.render:
        if options.out is None:
            parser.error("--out: name a folder for what is measured; or --render")
        chosen = list(dict.fromkeys(("capa", *options.selector)))
        command = f"python -m benchmarks.selection {shlex.join(arguments)}"
        cost = {part: len(options.bed) * minutes(part, chosen, options.questions) for part in options.only}
        parts = ", ".join(f"{part} {each:.1f}" for part, each in cost.items())
        print(f"about {sum(cost.values()):.0f} minutes of one core, calibration aside: {parts}", file=sys.stderr)
        with progress() as report:
            for name in options.bed:
                bed = open_bed(
                    name,
                    options.out,
                    options.questions,
                    workers=options.workers,
                    samples_calibrated=options.samples,
                    report=report,
                )
                for part in options.only:
                    publish(options.docs, bed, part, *measured(bed, part, chosen, options.questions), command)
                    print(f"{name}: {part} is measured", file=sys.stderr)
    for name in write_pages(options.docs):
        print(options.docs / name)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except CapaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
