"""Golden samples: the eager model's results on a few prompts, left in a bundle to validate it without a checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from capa_export.base.code import versions
from capa_export.bundle.store import ONNX, Bundle, run_stage
from capa_export.config.options import ValidationOptions
from capa_export.config.recipe import Recipe
from capa_export.model.model import Model
from capa_export.parity.validation import (
    goes_by_layer,
    held_out,
    open_oracle,
    scales_of,
    sidecar_files,
    stored_calibration,
)
from capa_export.report.schema import ParityReport

__all__ = ["GOLDEN", "store_golden"]

GOLDEN = "golden"


def store_golden(
    model: Model, bundle: Bundle, recipe: Recipe, options: ValidationOptions, parity: ParityReport
) -> None:
    """Store the eager model's results on the first few prompts in the bundle."""
    exported = bundle.stage("export")["result"]
    scales = scales_of(exported, stored_calibration(bundle))
    samples = held_out(recipe, replace(options, samples=None), options.store_golden, repeat=True)
    steps = recipe.parity.steps
    prune, pictures = recipe.prune.model_dump(mode="json"), recipe.pictures.model_dump(exclude_none=True)
    sidecars = sidecar_files(bundle)
    method_error = parity.method_error.model_dump(mode="json")
    made_by = versions("torch", "transformers", code_of=[__name__])
    key = [made_by, bundle.digest("export"), samples.digest(), steps, prune, model.prompt_settings, method_error]

    def work(scratch: Path) -> dict[str, Any]:
        from capa_export.parity.records import write_records

        (scratch / GOLDEN).mkdir()
        sliced = goes_by_layer(model, options, exported["precision"])
        oracle = open_oracle(model, bundle, recipe, scales, bundle.folder / ONNX, sliced=sliced)
        write_records(scratch / GOLDEN, oracle, samples, steps, model.report)
        latency = bundle.stage("validate")["result"]["latency"]
        seen = {"prune": prune, "pictures": pictures}
        return {"method_error": method_error, "latency": latency, "sidecars": sidecars, **seen}

    run_stage(bundle, GOLDEN, key, [GOLDEN], work)
