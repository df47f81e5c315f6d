"""Validates a bundle against golden samples, which hold the eager model's results."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capa_export.base.errors import CapaError, refusing
from capa_export.bundle.store import ONNX, Bundle
from capa_export.config.options import ValidationOptions
from capa_export.config.recipe import Recipe
from capa_export.model.model import Model
from capa_export.parity.golden import GOLDEN
from capa_export.parity.validation import Validation, layer_notes, sidecar_files
from capa_export.report.schema import MethodError

if TYPE_CHECKING:
    from capa_export.run.engine import BuiltEngines

__all__ = ["AgainstGolden"]


class AgainstGolden(Validation):
    """A validation against the stored results of the eager model."""

    oracle = "golden"

    def __init__(
        self, model: Model, bundle: Bundle, recipe: Recipe, options: ValidationOptions, built: "BuiltEngines | None"
    ) -> None:
        super().__init__(model, bundle, recipe, options, built)
        replace(self.bundle, read_all=True).verify(GOLDEN)
        stored = self.bundle.stage(GOLDEN)["result"]
        pictures = recipe.pictures.model_dump(exclude_none=True)
        for what, same in (
            ("schedule", stored.get("prune") == recipe.prune.model_dump(mode="json")),
            ("size of pictures", stored.get("pictures", {}) == pictures),
        ):
            if not same:
                raise CapaError(
                    f"{self.bundle.folder}: its golden samples are of another {what}; store them again with "
                    "`capa-export validate --store-golden`"
                )

    def key(self) -> Any:
        return self.bundle.digest(GOLDEN)

    def run(self, scratch: Path) -> dict[str, Any]:
        from capa_export.parity.records import Records
        from capa_export.parity.validate import compare_engine, compare_onnx, compare_sidecars

        recipe, report, onnx = self.recipe, self.model.report, self.bundle.folder / ONNX
        stored = self.bundle.stage(GOLDEN)["result"]
        with refusing(
            f"{self.bundle.folder}: its golden samples are damaged",
            "store them again with `capa-export validate --store-golden`",
        ):
            records = Records(self.bundle.folder / GOLDEN)
            method_error = MethodError.model_validate(stored["method_error"])
            sidecars, latency = dict(stored["sidecars"]), stored["latency"]
        sliced = _graphs_go_by_layer(self.bundle, self.options)
        shipped: Any = {"sliced": sliced, "provider": self.options.provider}
        compared = [compare_onnx(onnx, self.precision, records, recipe, report, **shipped)]
        if self.built is not None:
            engines = (self.engine_model(), onnx, self.precision)
            compared.append(compare_engine(*engines, records, recipe, None, report, sliced=sliced))
        compared.append(compare_sidecars(sidecars, sidecar_files(self.bundle)))
        notes = [f"Held against {len(records)} stored golden samples; --checkpoint runs the eager model anew."]
        notes += layer_notes(self.options, sliced=sliced)
        self.finish(scratch, compared, records, method_error, (), latency, notes=notes)
        return {"latency": latency}


def _graphs_go_by_layer(bundle: Bundle, options: ValidationOptions) -> bool:
    """Whether the bundle's graphs alone run in slices: as the options say, or where they exceed memory."""
    from capa_export.base.machine import available_memory
    from capa_export.plan.device_memory import onnx_runtime_bytes
    from capa_export.run.bundled import bundled_dims

    if options.layer_by_layer is not None:
        return options.layer_by_layer
    # As they are and opened up, side by side.
    return 2 * onnx_runtime_bytes(bundled_dims(bundle), exact=True) > available_memory()
