"""The page of the published decoder: sentences from figures, and methods that are measured."""

from pathlib import Path

from benchmarks.real import page
from benchmarks.real.measure import method_texts
from benchmarks.real.page import FfnFigures, FfnScores, RealFigures, beside, findings, read_latest, treated
from benchmarks.selection.figures import AccuracyFigures, Conditions, FigureRecord, Row
from capa_export.base.statistics import Difference, Rate
from capa_export.calibrate.scaled_sets import FfnEffect, ScaledSet
from capa_export.config.schedule import FFNs, parse_method
from capa_export.study.evaluate.schema import MethodScores

LOST, HELD = Difference(value=-0.3, low=-0.5, high=-0.1), Difference(value=-0.1, low=-0.2, high=0.0)
DENSE = MethodScores(method="dense", score=Rate(value=0.9, low=0.8, high=0.95), kept=1.0)


def scored(method: str, difference: Difference) -> MethodScores:
    return MethodScores(
        method=method, score=Rate(value=0.6, low=0.5, high=0.7), to_dense=difference, kl=0.1234, kept=0.25
    )


HERE = RealFigures(
    scenes="clutter",
    layers=30,
    methods=(
        DENSE,
        scored("capa@4:0.75/full", LOST),
        scored("random@4:0.75/full", LOST),
        scored("capa@12:0.75/full", HELD),
        scored("random@12:0.75/full", LOST),
        scored("cdpruner:0.75/full", HELD),
    ),
)
THERE = AccuracyFigures(
    layers=12,
    rows=tuple(
        Row(scored=one, flops=1.0)
        for one in (
            DENSE,
            scored("capa@1:0.75/full", LOST),
            scored("capa@2:0.75/full", HELD),
            scored("random@2:0.75/full", LOST),
            scored("capa@5:0.75/full", HELD),
            scored("random@5:0.75/full", LOST),
        )
    ),
)

ABOUT = Conditions(
    command="measure",
    date="2026-01-01",
    device="a core",
    versions={"numpy": "2"},
    checkpoint="abc",
    questions=3,
    seed=1,
)


def test_every_method_is_measured_at_every_place_with_full_ffns() -> None:
    methods = [parse_method(text) for text in method_texts()]
    assert {method.ffn for method in methods} == {"full"}
    places = [(stage.selector, stage.layer, stage.ratio) for method in methods for stage in method.stages]
    inside = {(s, n, r) for s in ("capa", "attention", "random", "fastv") for n in (4, 8, 12) for r in (0.75, 0.9)}
    assert set(places) == inside | {("cdpruner", -1, 0.75), ("cdpruner", -1, 0.9)}
    assert len(places) == 26


def test_sentences_tell_what_is_surely_lost() -> None:
    assert list(findings(HERE, 40)) == [
        "Dense answers 90.0 (80-95) % of 40 questions.",
        "With 75 % removed surely below dense: capa behind layer 4 and random behind layers 4 and 12.",
        "With 75 % removed not surely below it: capa behind layer 12 and cdpruner before the decoder.",
    ]


def test_both_sorts_of_decoders_stand_beside_each_other_at_the_nearest_depth() -> None:
    lists, table = beside(HERE, THERE)
    assert lists.splitlines() == [
        "- Lost on both: random behind layers 4 (2) and 12 (5), 75 %.",
        "- Lost on the published decoder alone: capa behind layer 4 (2), 75 %.",
        "- Surely lost on neither: capa behind layer 12 (5), 75 %.",
    ]
    assert "| capa behind layer 4 (2), 75 % | -30.0 [-50.0, -10.0] | -10.0 [-20.0, +0.0] |" in table.splitlines()


def test_what_only_the_test_bed_loses_is_told_apart() -> None:
    kept = HERE.model_copy(update={"methods": (DENSE, scored("random@12:0.75/full", HELD))})
    assert next(beside(kept, THERE)) == "- Lost on tiny-llava15 alone: random behind layer 12 (5), 75 %."


def test_the_page_has_a_section_for_each_sort_of_scenes(tmp_path: Path) -> None:
    for date, figures in (("2026-01-01", HERE.model_copy(update={"layers": 2})), ("2026-01-02", HERE)):
        record = FigureRecord[RealFigures](about=ABOUT, figures=figures)
        (tmp_path / f"{date}-real-clutter.json").write_text(record.model_dump_json())
    (tmp_path / "2026-01-01-real-size-qwen.json").write_text("{}")
    records = read_latest(tmp_path)
    assert [(scenes, record.figures.layers) for scenes, record in records.items()] == [("clutter", 30)]
    text = page.page(records, THERE, effect())
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Clutter",
        "## What holds on a published decoder, and what only on ours",
        "## Scales for FFNs",
        "## How",
    ]
    assert "| capa | 0.123 | 0.123 |" in text.splitlines()
    assert "clutter: 3 questions, seed 1, checkpoint `abc`; `measure`, 2026-01-01, a core; numpy 2." in text


def test_scales_stand_beside_ffns_left_out_by_the_number_of_layers() -> None:
    def row(treatment: FFNs, layers: tuple[int, ...], kl: float | None) -> FfnScores:
        found = MethodScores(method="any", score=Rate(value=0.9, low=0.8, high=0.95), kl=kl, kept=1.0)
        return FfnScores(schedule="dense", treatment=treatment, layers=layers, scored=found)

    rows = (row("full", (), None), row("scale", (1, 2), 0.01), row("skip", (1, 2), 0.5))
    assert [one.name for one in rows] == ["dense", "dense, scale in 1-2", "dense, skip in 1-2"]
    record = FigureRecord[FfnFigures](about=ABOUT, figures=FfnFigures(scenes="clutter", rows=rows))
    _, table = treated(record)
    assert table.splitlines()[2:] == [
        "| all whole | 90.0 (80-95) |  |",
        "| 2 as scales | 90.0 (80-95) | 0.010 |",
        "| 2 left out | 90.0 (80-95) | 0.500 |",
    ]
    assert "## How\n\nscales for FFNs: 3 questions" in page.page({}, THERE, None, record)


def test_there_is_no_page_of_nothing(tmp_path: Path) -> None:
    assert page.render(tmp_path) == {}


def effect() -> FfnEffect:
    sets = [ScaledSet(layers=layers, kl=kl, agreement=0.9) for layers, kl in (((1, 2, 3), 0.5), ((2,), 0.001))]
    return FfnEffect(calibration="", eta=0.9, budget=0.02, schedule="capa@1:0.5", samples=7, tried=tuple(sets))


def test_scales_by_the_number_of_layers() -> None:
    words, figures = page.scaled(effect())
    assert "3 have a mean cosine above 0.9" in words and "on\n7 prompts, under capa@1:0.5, and scales 1: 2." in words
    assert [line.split(" | ")[0] for line in figures.splitlines()[2:]] == ["| 1", "| 3"]
