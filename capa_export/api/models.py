"""The model that a caller names, with the options that stand in place of its recipe's."""

from collections.abc import Sequence

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.progress import Report, silent
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.schedule import parse_schedule
from capa_export.config.target import Target
from capa_export.model.model import Model
from capa_export.model.recipe_choice import find_recipe

__all__ = ["find_model", "find_recipe_of", "replaces_ffns"]


def find_recipe_of(checkpoint: str | None, recipe: str | None, revision: str | None = None) -> Recipe:
    """The recipe that is named, or the one that is for the checkpoint.

    Raises:
        CapaError: neither is given, or no recipe is for the checkpoint.
    """
    if recipe is not None:
        return load_recipe(recipe)
    if checkpoint is None:
        raise CapaError("name a checkpoint, a folder or a hub id, or a recipe with --model", ExitCode.USAGE)
    return find_recipe(checkpoint, revision)


def find_model(
    checkpoint: str | None,
    recipe: str | None = None,
    *,
    revision: str | None = None,
    schedule: str | None = None,
    ratio: float | None = None,
    min_keep_per_image: int | None = None,
    ffn_budget: float | None = None,
    fp32_layers: Sequence[str] | None = None,
    quantize: str | None = None,
    quantize_head: str | None = None,
    quantize_vision: str | None = None,
    auto_precision: bool = False,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    target: Target | None = None,
    trust_remote_code: bool = False,
    progress: Report = silent,
) -> Model:
    """The checkpoint with a recipe, what is asked in place of the recipe's, and what a target takes.

    Args:
        checkpoint: local folder or hub id; None for the recipe's own.
        recipe: a name that `capa-export models` lists, or the path of a .toml; None for the checkpoint's.
        revision: of a hub id.
        schedule: as `capa@2:0.75`, in place of the recipe's; with `/full`, visual FFNs stay as they are.
        ratio: fraction of visual tokens removed.
        min_keep_per_image: visual tokens that each image keeps at least.
        ffn_budget: nats that scales in the place of visual FFNs may cost, in place of the recipe's.
        fp32_layers: parts in FP32.
        quantize: what the weights of the decoder's layers are to be: `none`, `int4[:GROUP][/rtn]`, `int8`, `fp8` or
            `nvfp4`.
        quantize_head: what the weight of the LM head is to be: `none`, `int8`, `int4[:GROUP]` or `fp8`.
        quantize_vision: what the weights of the vision tower's blocks are to be: `none`, `int8` or `fp8`.
        auto_precision: whether the fewest decoder layers stay as they are that bring what `quantize` costs within the
            recipe's budget.
        min_pixels: least area that a picture is resized to.
        max_pixels: largest area.
        target: whose engines limit the pictures.
        trust_remote_code: whether the checkpoint's own Python may run.
        progress: told how far the work is.

    Raises:
        CapaError: neither is given, no recipe is for the checkpoint, or an option is out of range.
    """
    chosen = find_recipe_of(checkpoint, recipe, revision)
    changed = chosen.with_options(
        schedule=None if schedule is None else parse_schedule(schedule),
        ratio=ratio,
        min_keep_per_image=min_keep_per_image,
        ffn_budget=ffn_budget,
        fp32_layers=fp32_layers,
        quantize=quantize,
        quantize_head=quantize_head,
        quantize_vision=quantize_vision,
        auto_precision=auto_precision,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
    return Model(
        recipe=changed.model_copy(update={"pictures": changed.pictures.on_target(target)}),
        checkpoint=checkpoint or chosen.checkpoint,
        revision=revision,
        trust_remote_code=trust_remote_code,
        report=progress,
    )


def replaces_ffns(schedule: str | None) -> bool:
    """Whether linear FFNs of visual tokens become a scale."""
    return schedule is None or parse_schedule(schedule).ffn == "scale"
