"""What several commands make of their arguments."""

import shlex
from pathlib import Path

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.progress import say

__all__ = ["check_places", "one_checkpoint", "with_schedule", "words"]


def one_checkpoint(source: str | None, checkpoint: str | None) -> str | None:
    """The checkpoint that is given as the command's argument or as `--checkpoint`.

    Raises:
        CapaError: both are given.
    """
    if source is not None and checkpoint is not None:
        raise CapaError(f"the checkpoint is given twice: {source}, and --checkpoint {checkpoint}", ExitCode.USAGE)
    return source or checkpoint


def with_schedule(
    source: str | None,
    model: str | None,
    revision: str | None,
    schedule: str | None,
    ratio: float | None,
    prune_layer: int | None,
    selector: str | None,
    ffn: bool | None,
) -> tuple[str | None, float | None]:
    """The schedule and the ratio that are asked for.

    For the options that `--schedule` replaces, stderr says what to write instead.

    Raises:
        CapaError: the schedule comes with an option that it replaces, or an option is out of range.
    """
    values = {"--ratio": ratio, "--prune-layer": prune_layer, "--selector": selector}
    given = [f"{option} {value}" for option, value in values.items() if value is not None]
    given += [] if ffn is None else ["--ffn" if ffn else "--no-ffn"]
    if schedule is not None and given:
        raise CapaError(f"--schedule {schedule} says it all: drop {' '.join(given)}", ExitCode.USAGE)
    if (prune_layer, selector, ffn) == (None, None, None):
        return schedule, ratio
    from capa_export.api.models import find_recipe_of
    from capa_export.config.schedule import schedule_text

    recipe = find_recipe_of(source, model, revision)
    recipe = recipe.with_options(ratio=ratio, prune_layer=prune_layer, selector=selector)
    text = schedule_text(recipe.prune.schedule) + ("/full" if ffn is False else "")
    say(f"{' '.join(given)} is --schedule {shlex.quote(text)} from the next version on")
    return text, None


def words(text: str | None) -> list[str] | None:
    """The words between commas."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def check_places(*paths: Path | None) -> None:
    """Refuse to work for long for a file that could not be written.

    Raises:
        CapaError: a path is a folder, or its folder does not exist.
    """
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            problem = "is a folder" if path.is_dir() else "its folder does not exist"
            raise CapaError(f"{path}: {problem}; name a file in a folder that exists", ExitCode.USAGE)
