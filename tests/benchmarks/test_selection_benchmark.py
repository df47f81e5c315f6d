"""The benchmark of selectors: the sentences that follow from figures, and a small run of it all."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch

from benchmarks import boards, flops
from benchmarks.real import page as real_page
from benchmarks.selection import __main__ as benchmark
from benchmarks.selection.bed import questions_drawn
from benchmarks.selection.figures import (
    AccuracyFigures,
    Conditions,
    Contest,
    Contests,
    FigureRecord,
    Row,
    ScoreDifference,
)
from benchmarks.selection.measure import tuned
from benchmarks.selection.pages import layer as layer_page
from benchmarks.selection.pages import ratio as ratio_page
from benchmarks.selection.pages import tuned as tuned_page
from benchmarks.selection.pages.index import PAGES, figures_file, render
from benchmarks.selection.pages.svg import COLOURS, Curve, Panel, look_of, numbered, plot
from capa_export.base.errors import CapaError
from capa_export.base.statistics import Difference, Rate
from capa_export.data.scenes import HARD_KINDS, KINDS
from capa_export.model.eager import Eager
from capa_export.selectors.selector import selectors
from capa_export.study.evaluate.schema import MethodScores
from capa_export.study.tune import stage as tune_stage

DOCS = Path(__file__).parents[2] / "docs" / "results"
BED = "tiny-qwen25vl"
LIGHT, DARK = (255, 255, 255), (13, 17, 23)


def _parsed(drawn: str) -> ET.Element:
    return ET.fromstring(drawn)  # noqa: S314 - our own.


# Questions.


def test_questions_are_of_all_kinds_in_turn() -> None:
    kinds = [*KINDS, *HARD_KINDS, "clutter"]
    few, more = (list(questions_drawn(count)) for count in (12, 20))
    assert [sample.kind for sample in few] == [*kinds, *kinds[:3]]
    assert [len(sample.images) for sample in few] == [2 if sample.kind == "pictures" else 1 for sample in few]
    # A smaller run's questions are among a larger one's.
    assert [sample.question for sample in few] == [sample.question for sample in more[:12]]


# Sentences.


def _row(method: str, score: float, **against: tuple[float, float, float]) -> Row:
    rate = Rate(value=score, low=score - 0.01, high=score + 0.01)
    zero = Difference(value=0, low=0, high=0)
    return Row(
        scored=MethodScores(method=method, score=rate, kept=0.25, kinds={"count": rate}, to_dense=zero),
        flops=0.5,
        against={
            other: ScoreDifference(
                method=other,
                all=Difference(value=value, low=low, high=high),
                kinds={"count": Difference(value=value, low=low, high=high)},
            )
            for other, (value, low, high) in against.items()
        },
    )


def test_a_loss_of_capa_is_said_with_its_interval() -> None:
    rows = (
        _row("dense", 0.9),
        _row("capa@2:0.9/full", 0.6),
        _row("dart:0.9/full", 0.7, capa=(0.1, 0.02, 0.18)),
        _row("random@2:0.9/full", 0.4, capa=(-0.2, -0.3, -0.1)),
        _row("divprune:0.9/full", 0.65, capa=(0.05, 0.0, 0.1)),
    )
    assert list(ratio_page.findings(AccuracyFigures(layers=12, rows=rows))) == [
        "Dense answers 90.0 (89-91) % of the questions.",
        "At ratio 0.9 capa loses to dart by 10.0 points [+2.0, +18.0].",
        "At ratio 0.9 capa beats random by 20.0 points [-30.0, -10.0].",
        "At ratio 0.9 capa loses on count to dart by 10.0 points [+2.0, +18.0].",
    ]


def test_nothing_is_said_that_intervals_do_not_carry() -> None:
    rows = (
        _row("dense", 0.3),
        _row("capa@2:0.5/full", 0.3),
        _row("dart:0.5/full", 0.4, capa=(0.1, 0.0, 0.2)),
        _row("capa@2:0.75/full", 0.3),
        _row("dart:0.75/full", 0.4, capa=(0.1, -0.1, 0.2)),
    )
    assert list(ratio_page.findings(AccuracyFigures(layers=12, rows=rows))) == [
        "Dense answers 30.0 (29-31) % of the questions.",
        "Dense itself answers under half of count (30 %): there, no difference says much of pruning.",
        "At ratios 0.5 and 0.75 no selector is surely better than capa.",
    ]


def test_one_table_shows_all_beds() -> None:
    first = AccuracyFigures(
        layers=12, rows=(_row("dense", 0.9), _row("capa@2:0.9/full", 0.6), _row("dart:0.9/full", 0.7))
    )
    second = AccuracyFigures(layers=12, rows=(_row("dense", 0.8), _row("capa@2:0.75/full", 0.5)))
    assert ratio_page.overview({"one": first, "other": second}).splitlines()[2:] == [
        "| selector | one, 0.75 | one, 0.9 | other, 0.75 | other, 0.9 |",
        "| --- | --- | --- | --- | --- |",
        "| dense | 90.0 (89-91) | 90.0 (89-91) | 80.0 (79-81) | 80.0 (79-81) |",
        "| capa |  | 60.0 (59-61) | 50.0 (49-51) |  |",
        "| dart |  | 70.0 (69-71) |  |  |",
    ]


def test_layers_are_told_by_their_share_of_the_depth() -> None:
    rows = (
        _row("dense", 0.9),
        _row("capa@2:0.9/full", 0.6, random=(-0.1, -0.2, -0.05)),
        _row("random@2:0.9/full", 0.7, capa=(0.1, 0.05, 0.2)),
        _row("capa@8:0.9/full", 0.9, random=(0.0, -0.1, 0.1)),
        _row("random@8:0.9/full", 0.9, capa=(0.0, -0.1, 0.1)),
    )
    _, costs, *others = layer_page.findings(AccuracyFigures(layers=12, rows=rows))
    assert costs.startswith("At ratio 0.9 capa is above dense, in points, by: layer 2 (early, 17 %) +0.0 [+0.0, +0.0]")
    assert costs.endswith("and layer 8 (late, 67 %) +0.0 [+0.0, +0.0].")
    assert others == [
        "At layer 2 (early, 17 %) and ratio 0.9 capa loses to random by 10.0 points [+5.0, +20.0].",
        "At ratio 0.9 and layer 8 no selector is surely better than capa.",
        "At ratio 0.9 and layers 2 and 8 no selector is surely better than random.",
    ]


def _contest(tuned: str, own: str | None, **listed: str) -> Contest:
    return Contest(
        like="divprune:0.9",
        budget=0.25,
        own=own,
        listed=listed,
        tuned=tuned,
        others=(),
        verdict="so",
        tried=9,
        samples=8,
    )


def test_what_tune_finds_is_held_against_all_of_equal_cost() -> None:
    own, best, dart = "capa@1:0.8/full", "dart:0.5+capa@3:0.9/full", "dart:0.7/full"
    pairs = {"own": (0.2, 0.1, 0.3), "dart": (0.1, -0.1, 0.2), "random": (-0.3, -0.4, -0.2)}
    rows = (_row("dense", 0.9), _row(best, 0.8, **pairs), _row(own, 0.6), _row(dart, 0.7), _row("random@2:0.5/full", 1))

    def said(contest: Contest) -> list[str]:
        figures = Contests(layers=12, rows=rows, contests=(contest,))
        assert all(method in tuned_page.page(figures) for method in (contest.tuned, *contest.listed.values()))
        return list(tuned_page.findings(figures))[1:]

    where = "At the cost of divprune:0.9 (25.0 % of dense) tune"
    takes = f"{where} takes {best}, which answers 80.0 (79-81) %; the recipe's own"
    beside = "Of the listed selectors at that cost it is not surely apart from dart; it surely loses to random."
    assert said(_contest(best, own, dart=dart, random="random@2:0.5/full")) == [
        f"{takes}, {own}, 60.0 (59-61) %: surely more, +20.0 [+10.0, +30.0] points.",
        beside,
    ]
    assert said(_contest(best, None, dart=dart, random="random@2:0.5/full")) == [f"{takes} cannot be had.", beside]
    assert said(_contest(own, own, dart=dart)) == [
        f"{where} finds nothing that agrees better with dense than the recipe's own, {own}."
    ]


# Plots.


def _luminance(colour: Sequence[int]) -> float:
    """As WCAG has it."""
    parts = [value / 255 for value in colour]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("background", [LIGHT, DARK])
def test_lines_stand_out_in_light_and_dark(name: str, background: tuple[int, int, int]) -> None:
    line = [int(COLOURS[name][start : start + 2], 16) for start in (1, 3, 5)]
    low, high = sorted((_luminance(line), _luminance(background)))
    assert (high + 0.05) / (low + 0.05) >= 3


def test_every_selector_has_a_look_of_its_own() -> None:
    assert len({look_of(name) for name in selectors()}) == len(selectors())


def test_labels_do_not_lie_on_each_other() -> None:
    lines = [
        Curve(name, [(0.25, 0.5), (0.95, 0.5 + index / 1e4)], look_of(name)) for index, name in enumerate(selectors())
    ]
    drawn = _parsed(plot([Panel("a < b", "ratio", "right", lines, numbered((0.25, 0.95)), ("dense", 1.0))]))
    texts = [
        (one.text, float(one.attrib["x"]), float(one.attrib["y"])) for one in drawn.iter() if one.tag.endswith("text")
    ]
    labels = sorted(y for text, _, y in texts if text in selectors())
    assert len(labels) == len(selectors()) and np.diff(labels).min() > 12
    assert min(labels) > 0 and max(labels) < 320
    assert any(text == "a < b" for text, _, _ in texts)


# Pages.


def test_results_in_git_are_what_their_figures_say() -> None:
    counted = {"flops.md": flops.page(flops.counted()), "boards.md": boards.page(boards.counted())}
    files = render(DOCS) | real_page.render() | counted
    pages = [path for pattern in ("*.md", "*.svg") for path in DOCS.glob(pattern)]
    assert {path.name: path.read_text(encoding="utf-8") for path in pages} == files


def test_the_overview_begins_with_plots_and_a_table_and_folds_the_sentences() -> None:
    overview = render(DOCS)["README.md"]
    first = [line[:2] for line in overview.splitlines() if line[:2] in ("![", "| ", "<d", "- ")]
    assert list(dict.fromkeys(first)) == ["![", "| ", "<d", "- "]
    shown = re.sub(r"<details markdown>.*?</details>", "", overview, flags=re.DOTALL)
    assert "- " not in {line[:2] for line in shown.splitlines()}
    assert overview.count("<details markdown>") == 1 + 3 * len(PAGES)


def test_figures_of_another_version_are_refused(tmp_path: Path) -> None:
    path = figures_file(tmp_path, "sinks", BED)
    path.parent.mkdir()
    path.write_text('{"about": {}}')
    with pytest.raises(CapaError, match=r"sinks-tiny-qwen25vl.json: .*; measure it again"):
        render(tmp_path)


def test_the_cost_is_told_beforehand() -> None:
    """Of the default run, in minutes of one core."""
    cost = {part: 3 * benchmark.minutes(part, selectors(), 180) for part in benchmark.PARTS}
    assert 95 < sum(cost.values()) < 125
    # 180 questions, twelve selectors at five ratios and, scaled, at two.
    assert cost["ratio"] == pytest.approx(3 * 180 * (1 + 12 * 7) * 0.045 / 60)


def _run(folder: Path, *options: str) -> None:
    shared = ["--bed", BED, "--questions", "4", "--samples", "2", "--selector", "random"]
    benchmark.main([*shared, "--out", str(folder / "out"), "--docs", str(folder / "docs"), *options])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every part, on four questions."""
    folder = tmp_path_factory.mktemp("selection")
    with pytest.MonkeyPatch.context() as patched:
        # A search among two selectors is one, and takes a fifth of the time.
        for module in (tune_stage, tuned):
            patched.setattr(module, "offered", lambda _family: (("capa", "random"), ()))
        _run(folder)
    return folder


def figures_of(folder: Path, part: str) -> Any:
    record: FigureRecord[Any] = FigureRecord[PAGES[part].FIGURES].model_validate_json(
        figures_file(folder / "docs", part, BED).read_text(encoding="utf-8")
    )
    return record.figures


def _contents(folder: Path) -> Mapping[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_all_parts_are_measured_and_written(small: Path) -> None:
    names = {path.name for path in (small / "docs").iterdir()}
    pages = {name for part in PAGES for name in (f"{part}.md", f"{part}-{BED}.svg")}
    assert names == {"README.md", "figures", *pages}
    for path in (small / "docs").glob("*.svg"):
        assert _parsed(path.read_text()).tag.endswith("svg")
    readme = (small / "docs" / "README.md").read_text()
    assert all(f"({part}.md)" in readme for part in PAGES)
    about = Conditions.model_validate(json.loads(figures_file(small / "docs", "ratio", BED).read_text())["about"])
    assert about.command.startswith("python -m benchmarks.selection --bed tiny-qwen25vl") and about.questions == 4


@pytest.mark.slow
def test_figures_belong_together(small: Path) -> None:
    ratio = {row.scored.method: row for row in figures_of(small, "ratio").rows}
    wanted = [f"{name}@2:{at}/full" for at, name in product((0.25, 0.5, 0.75, 0.9, 0.95), ("capa", "random"))]
    wanted += [f"{name}@2:{at}/scale" for at, name in product((0.75, 0.9), ("capa", "random"))]
    assert list(ratio) == ["dense", *wanted]
    random, capa = ratio["random@2:0.95/full"], ratio["capa@2:0.95/full"]
    assert random.against["capa"].all.value == pytest.approx(random.scored.score.value - capa.scored.score.value)
    assert ratio["dense"].flops == 1 > ratio["capa@2:0.25/full"].flops > capa.flops > ratio["capa@2:0.9/scale"].flops
    # 4 of 64 tokens.
    assert capa.scored.kept == 4 / 64
    layers = [row.scored.method for row in figures_of(small, "layer").rows]
    assert layers[1:5] == [f"{name}@1:{at}/full" for at, name in product((0.75, 0.9), ("capa", "random"))]
    assert len(layers) == 1 + 6 * 2 * 2
    found = {row.scored.method: row for row in figures_of(small, "ffn").rows}
    assert {"dense/scale", "dense/skip", "dense/per-image", "capa@2:0.75/skip", "dense/eta=0.99"} < set(found)
    saved = [found[f"dense/eta={eta:g}"].flops for eta in (0.9, 0.94, 0.96, 0.99)]
    assert saved == sorted(saved) and found["dense/scale"].flops == found["dense/eta=0.96"].flops
    linear = figures_of(small, "linearity")
    assert (linear.visual_tokens, len(linear.layers)) == (2 * 64, 12)
    for layer in linear.layers:
        assert layer.visual.p05 <= layer.visual.p50 <= layer.visual.p95
        assert layer.linear == (figures_of(small, "ffn").linear["0.96"].count(linear.layers.index(layer)) == 1)
    contests = figures_of(small, "tuned")
    asked = {row.scored.method: row for row in contests.rows}
    for contest in contests.contests:
        assert {contest.tuned, *contest.listed.values(), *contest.others} <= set(asked)
    assert contests.contests[0].own == "capa@2:0.75/eta=0.96" == contests.contests[0].listed["capa"]
    budgets = [contest.budget for contest in contests.contests]
    assert budgets == sorted(budgets, reverse=True)
    steady = figures_of(small, "stability")
    assert steady.prompts[0] == 2 and {one.selector for one in steady.drift} == {"capa", "random"}
    assert all(0 <= step.value <= 1 for one in steady.drift for step in one.steps)


@pytest.mark.slow
def test_nothing_is_measured_twice(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _contents(small)

    def prefill(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Eager, "prefill", prefill)
    _run(small)
    assert _contents(small) == before


@pytest.mark.slow
def test_pages_are_made_again_from_figures_alone(small: Path) -> None:
    docs = small / "docs"
    before = _contents(docs)
    for path in (*docs.glob("*.md"), *docs.glob("*.svg")):
        path.unlink()
    benchmark.main(["--render", "--docs", str(docs)])
    assert _contents(docs) == before


@pytest.mark.slow
def test_workers_measure_the_same(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another number of threads adds in another order.
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    _run(tmp_path, "--only", "stability", "--workers", "2")
    apart, alone = (figures_of(folder, "stability") for folder in (tmp_path, small))
    assert (apart.drift, apart.agreement) == (alone.drift, alone.agreement)


def test_a_folder_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--bed", BED])
    assert "--out: name a folder for what is measured; or --render" in capsys.readouterr().err
