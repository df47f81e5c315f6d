"""A command whose `--help` groups its options under headings."""

from collections import defaultdict
from typing import Any

from typer.core import TyperCommand

from capa_export.cli.options import OUTPUT, PANELS

__all__ = ["Command"]


class Command(TyperCommand):
    """A command that lists its options by panel.

    Typer draws panels through rich, which takes a quarter of a second to import and cuts names at 80 columns.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, and then the options in the order of `PANELS`; `--help` belongs to the last."""
        panels = defaultdict[str, list[tuple[str, str]]](list)
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                usual = "Arguments" if parameter.param_type_name == "argument" else OUTPUT
                panels[getattr(parameter, "rich_help_panel", None) or usual].append(record)
        for name in ("Arguments", *PANELS):
            if name in panels:
                with formatter.section(name):
                    formatter.write_dl(panels[name])
