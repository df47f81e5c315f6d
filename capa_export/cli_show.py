"""Commands that look and change nothing: what is shipped, and what a bundle holds."""

import json
from pathlib import Path
from typing import Any

from capa_export.cli_options import BundleArg, JsonOpt

__all__ = ["inspect", "models", "print_json", "targets"]


def print_json(value: Any) -> None:
    """A result, for programs."""
    print(json.dumps(value, indent=2, default=str))


def inspect(bundle: BundleArg, as_json: JsonOpt = False) -> None:
    """Show what a bundle holds and what made it; check its files."""
    from capa_export.bundle import Bundle
    from capa_export.tables import bundle_table

    opened = Bundle.open(bundle)
    manifest = opened.manifest
    opened.verify(*manifest["stages"])
    if as_json:
        print_json(manifest)
    else:
        bundle_table(opened.folder, manifest)


def models(as_json: JsonOpt = False) -> None:
    """List the shipped recipes."""
    from capa_export.recipe import load_recipe
    from capa_export.shipped import shipped_names

    recipes = [load_recipe(name) for name in shipped_names("graphs")]
    if as_json:
        print_json([recipe.model_dump(mode="json") for recipe in recipes])
        return
    for recipe in recipes:
        layers = ", ".join(str(stage.layer) for stage in recipe.prune.schedule)
        others = f" (or {', '.join(map(str, recipe.prune.alternatives))})" if recipe.prune.alternatives else ""
        where = "shipped with capa-export" if Path(recipe.checkpoint).is_dir() else recipe.checkpoint
        print(f"{recipe.name:<16}{where:<32}prunes at layer {layers}{others}")


def targets(as_json: JsonOpt = False) -> None:
    """List the shipped targets."""
    from capa_export.shipped import shipped_names
    from capa_export.target import load_target

    known = [load_target(name) for name in shipped_names("engines")]
    if as_json:
        print_json([target.model_dump(mode="json") for target in known])
        return
    for target in known:
        made = target.engine
        print(
            f"{target.name:<16}"
            + (f"{made.runtime}, SM {', '.join(made.compute_capabilities)}" if made else "ONNX only")
        )
