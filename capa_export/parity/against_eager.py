"""Validates a bundle against the eager model, which is run anew."""

import os
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from capa_export.base.errors import CapaError
from capa_export.base.machine import processor
from capa_export.bundle.store import ONNX, Bundle
from capa_export.calibrate.sums import CALIBRATION, scales_digest
from capa_export.config.options import ValidationOptions
from capa_export.config.recipe import Recipe
from capa_export.export.graphs import pruning
from capa_export.model.generation import eos_token_ids
from capa_export.model.model import Model
from capa_export.parity.validation import (
    Validation,
    goes_by_layer,
    held_out,
    layer_notes,
    open_oracle,
    scales_of,
    sidecar_files,
)
from capa_export.report.schema import PROMPTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from capa_export.data.samples import Samples
    from capa_export.export.graphs import Graphs
    from capa_export.parity.records import Records
    from capa_export.parity.validate import Comparison
    from capa_export.run.engine import BuiltEngines
    from capa_export.run.onnx import Sessions

__all__ = ["AgainstEager"]


class AgainstEager(Validation):
    """A validation that runs the eager model."""

    oracle = "eager"

    def __init__(
        self, model: Model, bundle: Bundle, recipe: Recipe, options: ValidationOptions, built: "BuiltEngines | None"
    ) -> None:
        super().__init__(model, bundle, recipe, options, built)
        model.remember_digests(bundle)
        if not model.made(bundle):
            raise CapaError(
                f"{model.checkpoint}: is not the checkpoint this bundle was made from; pass it with --checkpoint"
            )
        self.scales = scales_of(self.exported, self.calibration)
        if self.exported["alpha"] != scales_digest(self.scales):
            path = bundle.folder / CALIBRATION
            raise CapaError(f"{path}: changed since the export; run `capa-export export` again")
        self.prompts = held_out(recipe, options, recipe.parity.prompts, repeat=True)
        self.questions = held_out(recipe, options, recipe.parity.accuracy_samples, repeat=False)

    def key(self) -> Any:
        stop = eos_token_ids(self.model.source.checkpoint.sidecars)
        return [self.prompts.digest(), self.questions.digest(), self.model.prompt_settings, stop]

    def run(self, scratch: Path) -> dict[str, Any]:
        from capa_export.parity.method import measure_method
        from capa_export.parity.quantization_error import measure_quantization
        from capa_export.parity.records import write_records
        from capa_export.parity.validate import (
            compare_dense,
            compare_engine,
            compare_onnx,
            compare_prompts,
            make_replay,
        )
        from capa_export.run.bundled import bundled_prompter

        model, recipe, report = self.model, self.recipe, self.model.report
        sliced = goes_by_layer(model, self.options, self.precision)
        seen: Any = {"bounds": recipe.pictures, "trust_remote_code": model.trust_remote_code}
        bundled = bundled_prompter(self.bundle, **seen)
        with TemporaryDirectory(dir=scratch) as folder:
            kept = Path(folder) / "records"
            kept.mkdir()
            reference = self._reference_graphs(Path(folder) / "reference", sliced=sliced)
            shipped: Any = {"sliced": sliced, "provider": self.options.provider}
            oracle = open_oracle(model, self.bundle, recipe, self.scales, reference, sliced=sliced)
            # What the bundle holds; before it, where that is not FP32, the same graphs in FP32.
            fp32 = oracle.onnx if self.precision == "fp32" else reference
            records = write_records(kept, oracle, self.prompts, recipe.parity.steps, report)
            # Two models share most of these graphs; they are as large as the weights, and none is to stay open.
            opened: Sessions | None = None if fp32 == oracle.onnx else {}
            compared = [
                compare_prompts(model.prompter, bundled, self.prompts, self._changed_sidecars()),
                dense := compare_dense(oracle, records, recipe, report, sessions=opened),
                capa := compare_onnx(
                    *(fp32, "fp32", records, recipe, report),
                    sliced=sliced,
                    provider=self.options.provider if fp32 == oracle.onnx else "cpu",
                    sessions=opened,
                ),
            ]
            if opened is not None:
                opened.clear()
            if fp32 != oracle.onnx:
                compared.append(compare_onnx(oracle.onnx, self.precision, records, recipe, report, **shipped))
            if self.built is not None:
                replay = make_replay(oracle)
                engines = (self.engine_model(), oracle.onnx, self.precision)
                compared.append(compare_engine(*engines, records, recipe, replay, report, sliced=sliced))
            seed = self.options.seed or 0
            steps = recipe.parity.steps
            effect, examples = measure_method(oracle, self.questions, seed, steps, report)
            found = {
                "quantization_error": measure_quantization(oracle, model, self.prompts, report),
                "bisection": self._bisection(compared, oracle.onnx, reference, records, sliced=sliced),
                "prompts_sha256": self.prompts.digest(),
            }
            notes = layer_notes(self.options, sliced=sliced)
            if self.options.seed is not None and self.options.images is not None:
                notes.append("Samples of another seed: calibration may have seen some of them.")
            few = _few_pictures(self.prompts)
            latency = None if sliced else _latency(dense, capa)
            parity = self.finish(
                scratch, compared, records, effect, examples, latency, notes=notes, warnings=few, **found
            )
        return {"passed": parity.passed, "latency": latency}

    def _changed_sidecars(self) -> list[str]:
        """The bundle's copies of tokenizer and processor files that differ from the checkpoint's."""
        published = self.model.sidecar_digests
        copies = (name for name in sidecar_files(self.bundle) if name.startswith((f"{ONNX}/llm/", f"{ONNX}/visual/")))
        present = self.bundle.stage("export")["files"]
        return [name for name in copies if present[name] != published.get(Path(name).name, present[name])]

    def _reference_graphs(self, folder: Path, *, sliced: bool) -> "Path | Graphs":
        """The reference graphs: the bundle's and the dense one in FP32, in a folder, or not written where sliced."""
        from capa_export.export.graphs import graphs_in_fp32, write_onnx

        source = self.model.source
        options: dict[str, Any] = {**pruning(self.recipe.prune), "scales": self.scales}
        if sliced:
            return graphs_in_fp32(source, **options)
        write_onnx(source, "fp32", folder, **options, dense=True, report=self.model.report)
        return folder

    def _bisection(
        self,
        compared: "Sequence[Comparison]",
        onnx: Path,
        reference: "Path | Graphs",
        records: "Records",
        *,
        sliced: bool,
    ) -> Any:
        """Bisect the first artefact that failed, where the options say so."""
        rows = [row for one in compared for row in (*one.export_error, *one.selection)]
        failed = {row.artefact for row in rows if any(check.failure for check in row.checks)}
        if not self.options.bisect or not failed - {PROMPTS}:
            return None
        from capa_export.parity.bisect import bisect

        # A fault of the reference graphs is a fault of every graph.
        of_reference = self.precision != "fp32" and any(artefact.startswith("fp32") for artefact in failed)
        folder, precision = (reference, "fp32") if of_reference else (onnx, self.precision)
        return bisect(folder, precision, reference, records, self.model.report, sliced=sliced)


def _latency(dense: "Comparison", capa: "Comparison") -> dict[str, Any]:
    """Median times of the FP32 graphs on this CPU, dense against CAPA, in milliseconds."""
    rows = [
        {"name": name, "dense_ms": dense.milliseconds[name], "capa_ms": value}
        for name, value in capa.milliseconds.items()
    ]
    return {"machine": f"{processor()}, {os.cpu_count()} cores, ONNX Runtime {version('onnxruntime')}", "rows": rows}


def _few_pictures(prompts: "Samples") -> list[str]:
    """A warning where prompts repeat what they show."""
    different = len(prompts.conversations or prompts.files)
    if not different or different >= prompts.count:
        return []
    what = "conversations" if prompts.conversations else "pictures"
    return [f"Only {different} different {what} for {prompts.count} prompts: give as many in --images."]
