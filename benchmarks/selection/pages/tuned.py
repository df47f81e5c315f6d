"""The page of what `tune` finds."""

from collections.abc import Iterator

from benchmarks.selection.figures import Contest, Contests
from benchmarks.selection.pages.ratio import of_dense
from benchmarks.selection.pages.svg import COLOURS, Curve, LineStyle, Panel, look_of, plot
from benchmarks.selection.pages.words import better, joined, points, rate, table, worse
from capa_export.selectors.selector import load_selector

__all__ = ["FIGURES", "TITLE", "findings", "page", "plots"]

TITLE = "What tune finds at equal cost"
FIGURES = Contests
_HOW = """\
`tune` saw scenes of the training stream only. Every selector acts at its own place, with the smallest ratio that meets
the cost, and with the recipe's linear FFNs; where the layers before it alone cost more, it is left out. "tune above it"
is about the first of the finalists, which was chosen before these questions."""
_TUNE = LineStyle(COLOURS["vermillion"], dashed=True, width=2.6)


def findings(figures: Contests) -> Iterator[str]:
    """Against the recipe's own schedule, and against every selector."""
    yield from of_dense(figures)
    for contest in figures.contests:
        row = figures.row(contest.tuned)
        where = f"At the cost of {contest.like} ({100 * contest.budget:.1f} % of dense)"
        if contest.tuned == contest.own:
            yield f"{where} tune finds nothing that agrees better with dense than the recipe's own, {contest.own}."
            continue
        own = "the recipe's own cannot be had"
        if contest.own is not None:
            found = row.against["own"].all
            sure = "surely more" if better(found) else "surely fewer" if worse(found) else "no sure difference"
            score = rate(figures.row(contest.own).scored.score)
            own = f"the recipe's own, {contest.own}, {score} %: {sure}, {points(found, bare=True)} points"
        yield f"{where} tune takes {contest.tuned}, which answers {rate(row.scored.score)} %; {own}."
        others = {name: each.all for name, each in row.against.items() if name != "own"}
        beaten = [name for name, each in others.items() if better(each)]
        even = [name for name, each in others.items() if not better(each) and not worse(each)]
        above = [name for name, each in others.items() if worse(each)]
        parts = [
            f"{what} {joined(names)}"
            for what, names in (
                ("it surely beats", beaten),
                ("it is not surely apart from", even),
                ("it surely loses to", above),
            )
            if names
        ]
        yield f"Of the listed selectors at that cost {'; '.join(parts)}."


def page(figures: Contests) -> str:
    """Tables."""
    parts = [_HOW]
    for contest in figures.contests:
        parts.append(
            f"At the cost of {contest.like}, {100 * contest.budget:.1f} % of dense on {contest.samples} samples; "
            f"{contest.tried} methods tried. Its own words: {contest.verdict}."
        )
        header = ["method", "right answers", "tune above it", "FLOPs, % of dense"]
        parts.append(table(header, (_line(figures, contest, name, method) for name, method in _named(contest))))
    return "\n\n".join(parts)


def _named(contest: Contest) -> Iterator[tuple[str, str]]:
    """Yield the title of each row of the table, and its method."""
    yield "tune", contest.tuned
    yield from (("finalist", other) for other in contest.others if other != contest.own)
    if contest.own is not None:
        yield "own", contest.own
    yield from contest.listed.items()


def _line(figures: Contests, contest: Contest, name: str, method: str) -> list[str]:
    row, against = figures.row(method), figures.row(contest.tuned).against
    above = points(against[name].all, bare=True) if name in against else ""
    called = f"`{method}`" if name in contest.listed else f"{name}: `{method}`"
    return [called, rate(row.scored.score), above, f"{100 * row.flops:.1f}"]


def plots(figures: Contests) -> str:
    """Inside the decoder, and before it, with what `tune` finds in both."""
    assert figures.dense.score is not None
    listed = list(figures.contests[0].listed)
    before = [name for name in listed if load_selector(name).place == "input"]
    groups = {
        "Selectors inside the decoder": [name for name in listed if name not in before],
        "Selectors before the decoder": before,
    }
    tuned = Curve("tune", _curve(figures, [contest.tuned for contest in figures.contests]), _TUNE)
    return plot(
        [
            Panel(
                title=title,
                x="cost, % of dense",
                y="right answers",
                ticks={at: f"{100 * contest.budget:.0f}" for at, contest in enumerate(figures.contests)},
                rule=("dense", figures.dense.score.value),
                lines=[tuned, *(Curve(name, _curve(figures, _of(figures, name)), look_of(name)) for name in names)],
            )
            for title, names in groups.items()
        ]
    )


def _of(figures: Contests, selector: str) -> list[str]:
    """The methods of a selector; none where it fits no budget."""
    return [contest.listed.get(selector, "") for contest in figures.contests]


def _curve(figures: Contests, methods: list[str]) -> list[tuple[float, float]]:
    scores = [(at, figures.row(method).scored.score) for at, method in enumerate(methods) if method]
    return [(at, score.value) for at, score in scores if score is not None]
