"""The page of the published decoder, from the records in benchmarks/results and the figures of `tiny-llava15`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.real.questions import SCENES
from benchmarks.selection.figures import AccuracyFigures, FigureRecord, read_record
from benchmarks.selection.pages.index import figures_file
from benchmarks.selection.pages.words import grid, joined, listed, points, rate, stage_of, table, worse
from capa_export.base.files import write_whole
from capa_export.base.statistics import Difference
from capa_export.base.toml import Settings
from capa_export.calibrate.scaled_sets import FfnEffect
from capa_export.config.recipe import ranges
from capa_export.config.schedule import FFNs, Stage
from capa_export.study.evaluate.schema import MethodScores

__all__ = [
    "DOCS",
    "PAGE",
    "RESULTS",
    "FfnFigures",
    "FfnScores",
    "RealFigures",
    "beside",
    "findings",
    "page",
    "read_latest",
    "render",
    "scaled",
    "treated",
    "write_pages",
]

RESULTS = Path(__file__).parents[1] / "results"
DOCS = Path(__file__).parents[2] / "docs" / "results"
PAGE = "real.md"
_TINY = "tiny-llava15"
_INTRODUCTION = """# A published decoder

[All results](README.md)

The test beds are trained from nothing on drawn scenes. Here the decoder is one that others trained on text,
SmolLM2-135M-Instruct, with its 30 layers, its tokenizer and its chat template; it was only taught to see, by a small
vision tower, a projector and changes of rank 16 of its attention
([how](../../benchmarks/real/README.md)). Its FFNs are the published ones. It is asked in plain English what color a
shape is and what shape has a color, where two or three shapes are alone (easy) and where four to seven stand among grey
glyphs (clutter); 64 visual tokens a picture, FFNs full. Tables and sentences are generated from the figures; "surely"
means that the 95 % interval of the paired difference lies on one side of 0."""
_NEAREST = f"""What is surely lost where, on the scenes with clutter and on those of {_TINY}, which was trained from
nothing and is asked more kinds of questions about the same sort of scenes. Layers are compared that lie nearest by
their share of the depth; that of {_TINY} is in brackets."""
_EFFECT = "*-effect-real-clutter.json"
"""What `capa-export build` on the scenes with clutter left in its bundle as `ffn_effect.json`."""
_FFNS = "*-ffn-real-clutter.json"
"""What `python -m benchmarks.real.ffn` writes."""

_CASES = (
    "Lost on both",
    "Lost on the published decoder alone",
    f"Lost on {_TINY} alone",
    "Surely lost on neither",
)


class RealFigures(Settings):
    """Scores of some methods on one sort of scenes."""

    scenes: str
    layers: int
    """Layers of the decoder."""
    methods: tuple[MethodScores, ...]
    """Dense first."""

    @property
    def dense(self) -> MethodScores:
        return self.methods[0]

    @property
    def stages(self) -> dict[tuple[str, int, float], MethodScores]:
        """Scores by selector, layer and ratio."""
        return {_place(stage_of(scored.method)): scored for scored in self.methods[1:]}


class FfnScores(Settings):
    """One treatment of the visual FFNs of a set of layers, and its scores."""

    schedule: str
    """What drops tokens meanwhile, or `dense`."""
    treatment: FFNs
    layers: tuple[int, ...]
    """Where FFNs are treated so, ascending."""
    scored: MethodScores | None = None

    @property
    def name(self) -> str:
        """`dense` where nothing is changed."""
        return f"{self.schedule}, {self.treatment} in {ranges(self.layers)}" if self.layers else self.schedule


class FfnFigures(Settings):
    """Scores by what becomes of visual FFNs, on one sort of scenes."""

    scenes: str
    rows: tuple[FfnScores, ...]
    """Dense with all FFNs first."""


def _place(stage: Stage) -> tuple[str, int, float]:
    return stage.selector, stage.layer, stage.ratio


def _places(name: str, layers: Sequence[str]) -> str:
    """A selector with the layers behind which it acts; none of them means before the decoder."""
    if not layers:
        return f"{name} before the decoder"
    return f"{name} behind layer{'s' * (len(layers) > 1)} {joined(layers)}"


def read_latest(results: Path = RESULTS) -> dict[str, FigureRecord[RealFigures]]:
    """The last record of each sort of scenes."""
    last = {scenes: sorted(results.glob(f"????-??-??-real-{scenes}.json"))[-1:] for scenes in SCENES}
    return {scenes: read_record(path, RealFigures) for scenes, paths in last.items() for path in paths}


def findings(figures: RealFigures, questions: int) -> Iterator[str]:
    """Sentences on what is surely lost."""
    yield f"Dense answers {rate(figures.dense.score)} % of {questions} questions."
    rows = figures.stages
    for ratio in sorted({ratio for _, _, ratio in rows}):
        found: dict[str, dict[str, list[str]]] = {"surely below dense": {}, "not surely below it": {}}
        for (name, layer, at), scored in rows.items():
            if at == ratio and scored.to_dense is not None:
                said = "surely below dense" if worse(scored.to_dense) else "not surely below it"
                found[said].setdefault(name, []).extend([str(layer)] * (layer >= 0))
        for said, places in found.items():
            if places:
                where = joined([_places(name, layers) for name, layers in places.items()])
                yield f"With {100 * ratio:.0f} % removed {said}: {where}."


def _tables(figures: RealFigures) -> Iterator[str]:
    rows = figures.stages
    inside = list(dict.fromkeys(name for name, layer, _ in rows if layer >= 0))
    before = list(dict.fromkeys(name for name, layer, _ in rows if layer < 0))
    columns = {
        f"{layer}, {100 * ratio:.0f} %": (layer, ratio)
        for ratio in sorted({ratio for _, _, ratio in rows})
        for layer in sorted({layer for _, layer, _ in rows})
        if layer >= 0
    }
    yield table(
        ["", "all", *figures.dense.kinds], [["dense", *map(rate, (figures.dense.score, *figures.dense.kinds.values()))]]
    )
    said = {
        "Share of right answers in %, by the layer behind which tokens are removed and how many are:": _right,
        "Points above dense:": _above,
        "KL(dense || pruned) of the first token, in nats, mean:": _nats,
    }
    for title, say in said.items():
        yield title
        yield grid(inside, list(columns), lambda name, column, say=say: say(rows[(name, *columns[column])]))
    for name in before:
        yield f"{name}, before the decoder:"
        yield table(
            ["removed", "right answers", "points above dense", "KL"],
            [
                [f"{100 * ratio:.0f} %", *(say(scored) for say in said.values())]
                for (of, layer, ratio), scored in rows.items()
                if (of, layer) == (name, -1)
            ],
        )


def _right(scored: MethodScores) -> str:
    return rate(scored.score)


def _above(scored: MethodScores) -> str:
    return points(scored.to_dense, bare=True)


def _nats(scored: MethodScores) -> str:
    return "" if scored.kl is None else f"{scored.kl:.3f}"


def beside(figures: RealFigures, tiny: AccuracyFigures) -> Iterator[str]:
    """What is surely lost here and there, at the nearest depth that was measured there."""
    there = {_place(stage_of(row.scored.method)): row.scored.to_dense for row in tiny.rows[1:]}
    depths = sorted({layer for _, layer, _ in there})
    cases: list[dict[tuple[str, float], list[str]]] = [{} for _ in _CASES]
    rows: list[list[str]] = []
    for (name, layer, ratio), scored in figures.stages.items():
        near = min(depths, key=lambda other: abs(other / tiny.layers - layer / figures.layers))
        other = there.get((name, near, ratio))
        if layer < 0 or scored.to_dense is None or other is None:
            continue
        cases[_case(scored.to_dense, other)].setdefault((name, ratio), []).append(f"{layer} ({near})")
        place = f"{_places(name, [f'{layer} ({near})'])}, {100 * ratio:.0f} %"
        rows.append([place, points(scored.to_dense, bare=True), points(other, bare=True)])
    yield listed(
        f"{said}: {'; '.join(f'{_places(name, at)}, {100 * ratio:.0f} %' for (name, ratio), at in found.items())}."
        for said, found in zip(_CASES, cases, strict=True)
        if found
    )
    yield table(["selector, where, removed", "published decoder", _TINY], rows)


def _case(here: Difference, there: Difference) -> int:
    if worse(here):
        return 0 if worse(there) else 1
    return 2 if worse(there) else 3


def scaled(effect: FfnEffect) -> Iterator[str]:
    """What scales in the place of FFNs cost, by the number of layers."""
    every, chosen = effect.tried[0], effect.chosen
    yield (
        f"Of 30 layers {len(every.layers)} have a mean cosine above {effect.eta:g}. A build with\n"
        "[real.toml](../../benchmarks/real/real.toml) on the scenes with clutter tries sets of them on\n"
        f"{effect.samples} prompts, under {effect.schedule}, and scales {len(chosen.layers)}: "
        f"{ranges(chosen.layers)}.\nKL is that of the next token to the same pruning with all FFNs."
    )
    rows = [
        [str(len(one.layers)), f"{one.kl:.4f}" if one.kl is not None else "not finite", f"{100 * one.agreement:.1f}"]
        for one in sorted(effect.tried, key=lambda one: len(one.layers))
    ]
    yield table(["layers as scales", "KL, nats", "next tokens as dense, %"], rows)


def treated(record: FigureRecord[FfnFigures]) -> Iterator[str]:
    """What scales cost beside FFNs that are left out, by the number of layers."""
    rows = {(row.schedule, row.treatment, len(row.layers)): row.scored for row in record.figures.rows}
    schedules = list(dict.fromkeys(schedule for schedule, _, _ in rows))
    sizes = sorted({size for _, _, size in rows if size})
    yield (
        f"Right answers of {record.about.questions} in %, and KL(dense || this) of the first token, by the number of\n"
        "layers whose visual FFNs are treated so, in the order of their relative error:"
    )
    columns = [f"{schedule.removesuffix('/full')}, {said}" for schedule in schedules for said in ("right", "KL")]
    cells = [["all whole", *(say(rows[schedule, "full", 0]) for schedule in schedules for say in (_rate, _kl))]]
    for treatment, said in (("scale", "as scales"), ("skip", "left out")):
        for size in sizes:
            found = [rows[schedule, treatment, size] for schedule in schedules]
            cells.append([f"{size} {said}", *(say(scored) for scored in found for say in (_rate, _kl))])
    yield table(["visual FFNs", *columns], cells)


def _rate(scored: MethodScores | None) -> str:
    return "" if scored is None else _right(scored)


def _kl(scored: MethodScores | None) -> str:
    return "" if scored is None else _nats(scored)


def page(
    records: Mapping[str, FigureRecord[RealFigures]],
    tiny: AccuracyFigures,
    effect: FfnEffect | None,
    ffns: FigureRecord[FfnFigures] | None = None,
) -> str:
    """The page."""
    parts = [_INTRODUCTION]
    for scenes, record in records.items():
        parts += [
            f"## {scenes.capitalize()}",
            listed(findings(record.figures, record.about.questions)),
            *_tables(record.figures),
        ]
    if "clutter" in records:
        parts += [
            "## What holds on a published decoder, and what only on ours",
            _NEAREST,
            *beside(records["clutter"].figures, tiny),
        ]
    if effect is not None:
        parts += ["## Scales for FFNs", *scaled(effect)]
    if ffns is not None:
        parts += treated(ffns)
    parts.append("## How")
    named = {**records, **({"scales for FFNs": ffns} if ffns is not None else {})}
    for scenes, record in named.items():
        about = record.about
        parts.append(
            f"{scenes}: {about.questions} questions, seed {about.seed}, checkpoint `{about.checkpoint}`; "
            f"`{about.command}`, {about.date}, {about.device}; "
            f"{', '.join(f'{name} {version}' for name, version in about.versions.items())}."
        )
    return "\n\n".join(parts) + "\n"


def render(results: Path = RESULTS) -> dict[str, str]:
    """The page by its name, from the records in `results`; nothing where there are none."""
    records = read_latest(results)
    if not records:
        return {}
    tiny = read_record(figures_file(DOCS, "layer", _TINY), AccuracyFigures).figures
    effects = sorted(results.glob(_EFFECT))
    ffns = [read_record(path, FfnFigures) for path in sorted(results.glob(_FFNS))[-1:]]
    return {PAGE: page(records, tiny, FfnEffect.load(effects[-1]) if effects else None, ffns[0] if ffns else None)}


def write_pages() -> list[Path]:
    """Write what `render` makes."""
    for name, text in render().items():
        write_whole(DOCS / name, text)
    return [DOCS / name for name in render()]
