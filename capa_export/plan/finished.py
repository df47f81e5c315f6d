"""Finds the stages of a bundle that a build with other options need not run again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capa_export.bundle.store import MANIFEST, Bundle, digest_of
from capa_export.calibrate.sums import CALIBRATION, ROUNDING, Calibration, scales_digest
from capa_export.config.recipe import Recipe, recipe_of
from capa_export.model.quantized.choice import QUANTIZE

__all__ = ["finished_stages", "plain_layers"]


def finished_stages(
    folder: Path | None,
    recipe: Recipe,
    precision: str,
    *,
    ffn: bool,
    calibration: Path | None,
    in_place: bool,
    checkpoint: Mapping[str, Any],
    weights: str | None,
) -> set[str]:
    """Names of the stages that would not run again, as far as their records tell; no file is read for it.

    Args:
        folder: the bundle's; it need not exist.
        recipe: with the command line's choices in it.
        precision: of weights and activations.
        ffn: whether visual FFNs are replaced at all.
        calibration: a file or bundle that stands in place of a run.
        in_place: whether the ONNX files read the checkpoint's own shards.
        checkpoint: what is known of it, of what manifests record: `source` and `revision`, or `files`.
        weights: where engines find theirs.
    """
    done = set[str]() if calibration is None else {"calibrate"}
    if folder is None or not (folder / MANIFEST).is_file():
        return done
    manifest = Bundle(folder).manifest
    stages = manifest["stages"]
    if (
        calibration is None
        and (folder / CALIBRATION).is_file()
        and _agrees(manifest.get("hashed"), checkpoint)
        and stages.get("calibrate", {}).get("result", {}).get(ROUNDING) == recipe.rounding
    ):
        done |= {"calibrate"} & stages.keys()
        calibration = folder
    exported = stages.get("export", {}).get("result")
    if exported is None or not _agrees(manifest.get("checkpoint"), checkpoint):
        return done
    recorded, wanted = manifest["recipe"], recipe.model_dump(mode="json")
    if (
        exported["precision"] == precision
        and exported["alpha"] == _alpha(recipe, calibration, ffn=ffn)
        and bool(stages["export"].get("linked")) == in_place
        and all(recorded.get(key) == wanted[key] for key in ("prune", "fp32_layers"))
        and recipe_of(manifest, folder).rounding == recipe.rounding
    ):
        engines = {name for name in stages if name.startswith("engine/")}
        done |= {"export", *(name for name in engines if stages[name]["result"]["weights"] == weights)}
        if recorded == wanted:
            done |= {"validate"} & stages.keys()
    return done


def plain_layers(folder: Path | None, recipe: Recipe, checkpoint: Mapping[str, Any]) -> list[int] | None:
    """The decoder layers that samples left plain in a bundle; None where they have yet to decide.

    Args:
        folder: the bundle's; it need not exist.
        recipe: with the command line's choices in it.
        checkpoint: as `finished_stages` takes it.
    """
    if not recipe.auto_precision:
        return []
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    manifest = Bundle(folder).manifest
    decided, hashed = manifest["stages"].get(QUANTIZE, {}).get("result"), manifest.get("hashed")
    if decided is None or hashed is None or not _agrees(hashed, checkpoint):
        return None
    return decided["plain"] if decided["of"] == digest_of([hashed["sha256"], recipe.rounding]) else None


def _agrees(recorded: Mapping[str, Any] | None, checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint agrees with a recorded one in all that is known of it."""
    return recorded is not None and all(recorded.get(key, value) == value for key, value in checkpoint.items())


def _alpha(recipe: Recipe, calibration: Path | None, *, ffn: bool) -> str | None:
    """Digest of the scales that an export would take, as its record has it; None where they are yet to be measured."""
    if not ffn:
        return scales_digest({})
    found = None if calibration is None else Calibration.load(calibration)
    if found is None or not found.measured(recipe.ffn):
        return None
    return scales_digest(found.alphas(found.scaled_layers(recipe.ffn)))
