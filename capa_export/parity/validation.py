"""The base of both validations of a bundle: its artefacts, its options, and the report of the figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from capa_export.base.toml import shipped_names
from capa_export.bundle.store import ONNX, PARITY, REPORT, Bundle, file_digest
from capa_export.calibrate.sums import CALIBRATION, Calibration
from capa_export.config.options import ValidationOptions
from capa_export.config.recipe import Recipe
from capa_export.config.target import load_target
from capa_export.model.generation import eos_token_ids
from capa_export.model.memory import exceeds_memory, validation_bytes
from capa_export.model.model import Model
from capa_export.report.schema import Answers, MethodError, ParityReport, Stage, write_parity

if TYPE_CHECKING:
    from capa_export.base.precision import Precision
    from capa_export.data.samples import Samples
    from capa_export.export.graphs import Graphs
    from capa_export.parity.records import Records
    from capa_export.parity.validate import Comparison
    from capa_export.report.pages import Example
    from capa_export.run.engine import BuiltEngines

__all__ = [
    "Validation",
    "goes_by_layer",
    "held_out",
    "layer_notes",
    "open_oracle",
    "scales_of",
    "sidecar_files",
    "stored_calibration",
]

_ON_CPU = {
    "fp32": "ONNX Runtime's CPU provider ran everything in FP32.",
    "fp16": "ONNX Runtime's CPU provider computes FP16 partly in FP32: these figures bound the export, not the GPU.",
    "bf16": "ONNX Runtime's CPU provider has no bf16 kernels: the bf16 weights were run in FP32 arithmetic.",
}


class Validation:
    """A validation of a bundle, whose kinds differ in where the oracle's results come from."""

    oracle: Literal["eager", "golden"]

    def __init__(
        self, model: Model, bundle: Bundle, recipe: Recipe, options: ValidationOptions, built: "BuiltEngines | None"
    ) -> None:
        self.model, self.bundle, self.recipe, self.options, self.built = model, bundle, recipe, options, built
        self.exported: dict[str, Any] = self.bundle.stage("export")["result"]
        self.precision: Precision = self.exported["precision"]
        self.calibration = stored_calibration(self.bundle)

    def key(self) -> Any:
        """Everything that the result depends on besides the bundle, as JSON."""
        raise NotImplementedError

    def run(self, scratch: Path) -> dict[str, Any]:
        """Validate, and write the report and its page."""
        raise NotImplementedError

    def engine_model(self) -> Any:
        """The bundle's engines on the GPU."""
        from capa_export.run.engine_model import EngineModel

        assert self.built is not None
        return EngineModel(self.built)

    def finish(
        self,
        scratch: Path,
        compared: "Sequence[Comparison]",
        records: "Records",
        method_error: MethodError,
        examples: "Sequence[Example]",
        latency: dict[str, Any] | None,
        *,
        notes: Sequence[str] = (),
        warnings: Sequence[str] = (),
        **found: Any,
    ) -> ParityReport:
        """Write `parity.json` and `report.html`."""
        from capa_export.report.pages import write_report

        recipe, exported = self.recipe, self.exported
        errors = [error for one in compared for error in one.export_error]
        selection = [choice for one in compared for choice in one.selection]
        failures = [check.failure for one in (*errors, *selection) for check in one.checks if check.failure]
        warnings = [*warnings, *dict.fromkeys(warning for one in compared for warning in one.warnings)]
        if method_error.beats_random is False:
            warnings = [*warnings, *method_error.words[:1]]
        if self.options.strict:
            failures += [f"--strict: {warning}" for warning in warnings]
        notes = [
            *filter(None, [self.options.note]),
            self._ran_on,
            *notes,
            *(note for one in compared for note in one.notes),
        ]
        if self.built is None:
            notes.append("No engine was run.")
        parity = ParityReport(
            passed=not failures,
            failures=tuple(failures),
            warnings=tuple(warnings),
            strict=self.options.strict,
            oracle=self.oracle,
            prompts=records.samples,
            num_prompts=len(records),
            seed=self.options.seed or 0,
            gates="" if self.options.gate is None else file_digest(self.options.gate),
            schedule=tuple(Stage(**stage.model_dump()) for stage in recipe.prune.schedule),
            linear_layers=tuple(exported["linear_layers"]),
            fp32_layers=tuple(exported.get("fp32_layers", ())),
            export_error=tuple(errors),
            selection=tuple(selection),
            method_error=method_error,
            answers=self._answers(method_error),
            notes=tuple(notes),
            **found,
        )
        write_parity(scratch / PARITY, parity)
        calibration = self.calibration
        write_report(
            scratch / REPORT,
            manifest=self.bundle.manifest,
            parity=parity,
            calibration=calibration.summary(recipe.ffn) if calibration else None,
            plan=self._plan(),
            examples=examples,
            latency=latency,
        )
        return parity

    def _plan(self) -> dict[str, Any]:
        """The plan of the bundle, and the forecast of the shipped target that it has engines for."""
        from capa_export.plan.plan import dry_run

        targets = [
            name.removeprefix("engine/") for name in self.bundle.manifest["stages"] if name.startswith("engine/")
        ]
        shipped = next((target for target in targets if target in shipped_names("engines")), None)
        return dry_run(
            self.recipe,
            # Where the image processor's settings lie beside the config.
            str(self.bundle.folder / ONNX / "visual"),
            self.bundle.folder,
            self.precision,
            ffn=bool(self.exported["linear_layers"]),
            target=None if shipped is None else load_target(shipped),
        )

    @property
    def _ran_on(self) -> str:
        """What computed the bundle's graphs."""
        if self.options.provider == "cpu":
            return _ON_CPU[self.precision]
        return f"ONNX Runtime's {self.options.provider} provider ran the bundle's graphs, its CPU provider the others."

    def _answers(self, found: MethodError) -> Answers | None:
        """The verdict on the method; None where it was not measured."""
        capa = next((method.same_answer for method in found.methods if method.name == "capa"), None)
        if capa is None:
            return None
        return Answers(
            same=round(capa.value * found.questions),
            questions=found.questions,
            least_agreement=self.recipe.method.least_agreement,
            accepted=self.options.accept_method_loss,
        )


def stored_calibration(bundle: Bundle) -> Calibration | None:
    """The bundle's calibration; None where it has none."""
    return Calibration.load(bundle.folder) if (bundle.folder / CALIBRATION).exists() else None


def scales_of(exported: dict[str, Any], calibration: Calibration | None) -> dict[int, Any]:
    """Alpha [D] of every layer whose visual FFNs the export replaced."""
    layers = calibration.layers if calibration else []
    return {layer: layers[layer].alpha for layer in exported["linear_layers"]} if layers else {}


def held_out(recipe: Recipe, options: ValidationOptions, count: int, *, repeat: bool) -> "Samples":
    """Samples that calibration does not see: `count`, or as many as the options ask for."""
    from capa_export.data.samples import samples_from

    count = count if options.samples is None else options.samples
    return samples_from(options.images, recipe, count, split="held_out", repeat=repeat, seed=options.seed)


def sidecar_files(bundle: Bundle) -> dict[str, str]:
    """SHA-256 of tokenizer, template, config and processor files, which the golden samples' prompts came from."""
    files = bundle.stage("export")["files"]
    return {name: digest for name, digest in files.items() if not name.endswith((".onnx", ".data", ".safetensors"))}


def open_oracle(
    model: Model, bundle: Bundle, recipe: Recipe, scales: Any, fp32_onnx: "Path | Graphs", *, sliced: bool
) -> Any:
    """Open the oracle of a bundle, with weights in memory, or streamed where `sliced`."""
    from capa_export.model.lockstep import RESIDENT
    from capa_export.model.streamed import StoredWeights, hollow_model
    from capa_export.parity.oracle import Oracle

    exported = bundle.stage("export")["result"]
    weights = StoredWeights(model.source, model.report) if sliced else None
    return Oracle(
        model=model.eager if weights is None else hollow_model(model.source, weights),
        weights=weights or RESIDENT,
        family=model.family,
        prompter=model.prompter,
        prune=recipe.prune,
        scales=scales,
        precision=exported["precision"],
        onnx=bundle.folder / ONNX,
        fp32_onnx=fp32_onnx,
        eos_token_ids=eos_token_ids(model.source.checkpoint.sidecars),
        fp32_layers=exported.get("fp32_layers", ()),
    )


def goes_by_layer(model: Model, options: ValidationOptions, precision: str) -> bool:
    """Whether to go layer by layer: as the options say, or where the models exceed memory, which the user is told."""
    if options.layer_by_layer is not None:
        return options.layer_by_layer
    needed = validation_bytes(model.source.checkpoint.num_parameters, precision)
    return exceeds_memory("eager models and graphs take {}", needed)


def layer_notes(options: ValidationOptions, *, sliced: bool) -> list[str]:
    """The note of the report on a validation layer by layer; empty where it is none."""
    because = "as was asked" if options.layer_by_layer else "since the models exceed this machine's memory"
    return [f"Model and graphs ran layer by layer, each graph in slices, {because}."] if sliced else []
