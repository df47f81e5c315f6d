"""All pages, from the figures that lie beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.selection.figures import Conditions, FigureRecord, read_record
from benchmarks.selection.pages import ffn, layer, linearity, ratio, sinks, stability, tuned
from benchmarks.selection.pages.words import folded, listed, table

__all__ = ["PAGES", "figures_file", "render"]

PAGES: Mapping[str, ModuleType] = {
    "ratio": ratio,
    "layer": layer,
    "tuned": tuned,
    "ffn": ffn,
    "linearity": linearity,
    "sinks": sinks,
    "stability": stability,
}
_TITLE = """# What the selectors do to answers

Every selector on the same held-out questions about drawn scenes, on the families' own architectures made small, with 64
visual tokens a picture. They tell methods apart; they are no forecast for a large model. [What follows from
it](../findings.md), in a page; [a published decoder](real.md) that was taught to see is measured apart, and [what CAPA
saves](flops.md) is counted, as is [which model fits which board](boards.md)."""
_READING = """Asked are, in turn, the colour of a shape, the shape of a colour, whether something is there, what has the
same colour, a number of two small digits, how many shapes have a colour, which of two shapes that are alike is further
up, and which of two pictures shows what; and the first four kinds once more where glyphs fill every free cell.

Sentences and tables here are generated from the [figures](figures).
"Surely", "loses" and "beats" mean that the 95 % interval of the paired difference lies on one side of 0; of right
answers it does so only where McNemar's exact test does. Of differences that are none, at most one in forty looks like a
gain all the same, and one in forty like a loss: a page makes hundreds of comparisons, and nothing is corrected for
that. CAPA's choice is made once, at prefill, where the paper makes it anew at every step.

Intervals in figures that were taken before 30 November 2026 are bootstrapped over the questions, whose single answers
were not kept. Those of right answers were since widened to 0 wherever the exact test, on all counts of pairs that can
have given net difference and interval, does not surely reject; what would have stayed open on these pages was asked
again, with the same scores. Those of drift, over 72 prompts, and the words of `tune` itself rest on the bootstrap
alone, which errs more often than one in forty."""


def figures_file(folder: Path, part: str, bed: str) -> Path:
    return folder / "figures" / f"{part}-{bed}.json"


def render(folder: Path) -> dict[str, str]:
    """Every page and plot by its name, from the figures in `folder`; none where there are no figures.

    Raises:
        CapaError: figures of another version.
    """
    files: dict[str, str] = {}
    index, abouts = list[str](), list[Conditions]()
    for part, page in PAGES.items():
        records = _records(folder, part, page)
        if not records:
            continue
        plots = {bed: f"![{page.TITLE}, {bed}]({part}-{bed}.svg)" for bed in records}
        parts = [f"# {page.TITLE}", "[All results](README.md)", *plots.values()]
        index.append(f"## [{page.TITLE}]({part}.md)")
        for bed, record in records.items():
            found = list(page.findings(record.figures))
            files[f"{part}-{bed}.svg"] = page.plots(record.figures)
            parts += [f"## {bed}", folded(_counted(found, bed), listed(found)), page.page(record.figures)]
            index.append(folded(_counted(found, bed), listed(found)))
        parts += ["## How", _subjects(records), *_runs([record.about for record in records.values()])]
        files[f"{part}.md"] = "\n\n".join(parts) + "\n"
        abouts += [record.about for record in records.values()]
        if part == "ratio":
            index = [*plots.values(), ratio.overview({bed: record.figures for bed, record in records.items()}), *index]
    if files:
        reading = folded("What was asked, and how sure the words are", _READING)
        files["README.md"] = "\n\n".join([_TITLE, *index, "## How", reading, *_runs(abouts)]) + "\n"
    return files


def _counted(sentences: Sequence[str], bed: str) -> str:
    return f"{bed}: {len(sentences)} sentence{'' if len(sentences) == 1 else 's'}"


def _records(folder: Path, part: str, page: ModuleType) -> dict[str, FigureRecord[Any]]:
    """Records of a part by bed."""
    prefix = f"{part}-"
    paths = sorted((folder / "figures").glob(f"{prefix}*.json"))
    return {path.stem.removeprefix(prefix): read_record(path, page.FIGURES) for path in paths}


def _subjects(records: Mapping[str, FigureRecord[Any]]) -> str:
    rows = [
        [bed, str(record.about.questions), str(record.about.seed), f"`{record.about.checkpoint}`"]
        for bed, record in records.items()
    ]
    return table(["bed", "questions", "seed of the scenes", "checkpoint"], rows)


def _runs(abouts: Sequence[Conditions]) -> list[str]:
    """A sentence for each way of measuring."""
    return list(
        dict.fromkeys(
            f"`{about.command}`, {about.date}, {about.device}; "
            f"{', '.join(f'{name} {version}' for name, version in about.versions.items())}."
            for about in abouts
        )
    )
