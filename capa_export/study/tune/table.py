"""A tuning as a table for people, on stdout."""

from capa_export.config.recipe import ranges
from capa_export.report.terminal import make_table, print_line, print_table
from capa_export.report.words import percent
from capa_export.study.tune.schema import Tuning

__all__ = ["tuning_table"]


def tuning_table(found: Tuning) -> None:
    """Print a row for each finalist."""
    table = make_table("", "FLOPs", "KL", "KL saved", "top-1", "linear")
    for row in found.finalists:
        gain = f"{row.gain.value:+.3g} ({row.gain.low:+.3g} to {row.gain.high:+.3g})" if row.gain else ""
        table.add_row(
            f"{'* ' if row.method == found.chosen else '  '}{row.method}",
            percent(row.flops),
            "" if row.kl is None else f"{row.kl:.3g}",
            "recipe's own" if row.method == found.own else gain,
            percent(row.top1),
            ranges(row.linear_layers),
        )
    print_table(
        f"Finalists of {found.tried} within {percent(found.budget)} of dense's FLOPs, on {found.judges} samples that "
        "chose none of them (intervals: 95% for all together)",
        table,
    )
    print_line(found.verdict)
    if found.left_out:
        print_line(
            f"left out, since the vision tower does not offer what they read: {', '.join(found.left_out)}", "dim"
        )
