"""The stage that validates a bundle: against the eager model, or against golden samples that it left behind."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from capa_export.bundle import Bundle, file_digest
from capa_export.calibration import CALIBRATION, Calibration
from capa_export.errors import CapaError
from capa_export.gates import with_gates
from capa_export.job import ONNX, PARITY, REPORT, Job, alpha_digest, eos_token_ids, run_stage, say, tool_versions
from capa_export.measure import processor
from capa_export.parity.schema import PROMPTS, MethodError, ParityReport, Stage, read_parity, write_parity
from capa_export.recipe import Recipe

if TYPE_CHECKING:
    from capa_export.execution import BuiltEngines
    from capa_export.parity.record import Records
    from capa_export.parity.report import Example
    from capa_export.parity.validate import Compared
    from capa_export.samples import Samples
    from capa_export.sliced import Graphs

__all__ = ["GOLDEN", "Wanted", "validate"]

GOLDEN = "golden"

_ON_CPU = {
    "fp32": "ONNX Runtime's CPU provider ran everything in FP32.",
    "fp16": "ONNX Runtime's CPU provider computes FP16 partly in FP32: these figures bound the export, not the GPU.",
    "bf16": "ONNX Runtime's CPU provider has no bf16 kernels: the bf16 weights were run in FP32 arithmetic.",
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a bundle is to be validated."""

    engine: str | None = None
    """Target whose engines are run on the GPU and held to the same gates."""
    golden: bool = False
    """Whether the stored samples stand for the eager model, so that no checkpoint is needed."""
    samples: int | None = None
    """Prompts compared and questions asked, in place of the recipe's numbers."""
    seed: int | None = None
    """Of other samples than the usual ones."""
    gate: Path | None = None
    """Bounds in place of the recipe's."""
    strict: bool = False
    """Whether warnings are failures."""
    bisect: bool = False
    """Whether to look for the place where an artefact that failed leaves the eager model."""
    store_golden: int = 0
    """Samples to leave in the bundle."""


def validate(job: Job, wanted: Wanted | None = None) -> ParityReport:
    """Hold the bundle against the eager model, or against what that made of the golden samples.

    Returns:
        What is also in `parity.json`; the caller turns `passed` into an exit code.

    Raises:
        CapaError: a file of the bundle was changed, or the checkpoint is another.
    """
    wanted = wanted or Wanted()
    bundle = replace(job.bundle, read_all=True)
    built = None
    if wanted.engine is not None:
        from capa_export.execution import require_engines

        built = require_engines(bundle, wanted.engine)
        bundle.verify(f"engine/{wanted.engine}")
    bundle.verify("export", *(["calibrate"] if "calibrate" in bundle.manifest["stages"] else []))
    recipe = job.recipe.model_copy(update={"parity": with_gates(job.recipe.parity, wanted.gate)})
    validation = (_AgainstGolden if wanted.golden else _AgainstEager)(job, recipe, wanted, built)
    key = [
        tool_versions("onnxruntime", "torch", "transformers"),
        bundle.digest("export"),
        recipe.model_dump(mode="json"),
        [wanted.strict, wanted.seed, wanted.bisect],
        validation.key(),
        *([] if built is None else [bundle.digest(f"engine/{wanted.engine}"), built.gpu.name]),
    ]
    run_stage(bundle, "validate", key, [PARITY, REPORT], validation.run)
    parity = read_parity(bundle.folder / PARITY)
    if wanted.store_golden and parity.passed:
        _store_golden(job, recipe, wanted, parity)
    elif wanted.store_golden:
        say(f"{GOLDEN:<14}not stored: they would vouch for a bundle that failed")
    return parity


class _Validation:
    """What both kinds of validation share: the bundle's artefacts, and what is made of the figures."""

    oracle: Literal["eager", "golden"]

    def __init__(self, job: Job, recipe: Recipe, wanted: Wanted, built: "BuiltEngines | None") -> None:
        self.job, self.recipe, self.wanted, self.built = job, recipe, wanted, built
        self.bundle = job.bundle
        self.exported: dict[str, Any] = self.bundle.stage("export")["result"]
        self.precision: Literal["fp16", "bf16", "fp32"] = self.exported["precision"]
        self.calibration = _calibration(self.bundle)

    def key(self) -> Any:
        """What the result depends on besides the bundle."""
        raise NotImplementedError

    def run(self, scratch: Path) -> dict[str, Any]:
        """Validate, and write the report and its page."""
        raise NotImplementedError

    def engine_model(self) -> Any:
        """The bundle's engines on the GPU."""
        from capa_export.engine_runtime import EngineModel

        assert self.built is not None
        return EngineModel(self.built)

    def finish(
        self,
        scratch: Path,
        compared: "Sequence[Compared]",
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
        from capa_export.dry_run import dry_run
        from capa_export.parity.report import write_report

        recipe, exported = self.recipe, self.exported
        errors = [error for one in compared for error in one.export_error]
        selection = [choice for one in compared for choice in one.selection]
        failures = [check.failure for one in (*errors, *selection) for check in one.checks if check.failure]
        warnings = [*warnings, *dict.fromkeys(warning for one in compared for warning in one.warnings)]
        if method_error.beats_random is False:
            warnings = [*warnings, *method_error.words[:1]]
        if self.wanted.strict:
            failures += [f"--strict: {warning}" for warning in warnings]
        notes = [_ON_CPU[self.precision], *notes, *(note for one in compared for note in one.notes)]
        if self.built is None:
            notes.append("No engine was run.")
        parity = ParityReport(
            passed=not failures,
            failures=tuple(failures),
            warnings=tuple(warnings),
            strict=self.wanted.strict,
            oracle=self.oracle,
            prompts=records.samples,
            num_prompts=len(records),
            seed=self.wanted.seed or 0,
            gates="" if self.wanted.gate is None else file_digest(self.wanted.gate),
            schedule=tuple(Stage(**stage.model_dump()) for stage in recipe.prune.schedule),
            linear_layers=tuple(exported["linear_layers"]),
            fp32_layers=tuple(exported.get("fp32_layers", ())),
            export_error=tuple(errors),
            selection=tuple(selection),
            method_error=method_error,
            notes=tuple(notes),
            **found,
        )
        write_parity(scratch / PARITY, parity)
        # Where the image processor's settings lie beside the config.
        config = self.bundle.folder / ONNX / "visual"
        calibration = self.calibration
        write_report(
            scratch / REPORT,
            manifest=self.bundle.manifest,
            parity=parity,
            calibration=calibration.summary(recipe.ffn.eta, recipe.ffn.paper_layers) if calibration else None,
            plan=dry_run(recipe, str(config), self.bundle.folder, self.precision, ffn=bool(exported["linear_layers"])),
            examples=examples,
            latency=latency,
        )
        return parity


class _AgainstEager(_Validation):
    """The eager model is run anew."""

    oracle = "eager"

    def __init__(self, job: Job, recipe: Recipe, wanted: Wanted, built: "BuiltEngines | None") -> None:
        super().__init__(job, recipe, wanted, built)
        recorded = self.bundle.manifest["checkpoint"]
        if recorded.get("files") != job.fingerprints and recorded["sha256"] != job.digests:
            raise CapaError(
                f"{job.checkpoint}: is not the checkpoint this bundle was made from; pass it with --checkpoint"
            )
        linear = self.exported["linear_layers"]
        layers = self.calibration.layers if self.calibration else []
        self.scales = {layer: layers[layer].alpha for layer in linear} if layers else {}
        if self.exported["alpha"] != alpha_digest(self.scales):
            path = self.bundle.folder / CALIBRATION
            raise CapaError(f"{path}: changed since the export; run `capa-export export` again")
        count, questions = recipe.parity.prompts, recipe.parity.accuracy_samples
        self.prompts = _samples(job, recipe, wanted, count, repeat=True)
        self.questions = _samples(job, recipe, wanted, questions, repeat=False)

    def key(self) -> Any:
        stop = eos_token_ids(self.job.source.checkpoint.sidecars)
        return [self.prompts.digest(), self.questions.digest(), self.job.prompt_settings, stop]

    def run(self, scratch: Path) -> dict[str, Any]:
        from capa_export.bundled import bundled_prompter
        from capa_export.parity.method import method_effect
        from capa_export.parity.record import write_records
        from capa_export.parity.validate import (
            compare_dense,
            compare_engine,
            compare_onnx,
            compare_prompts,
            replayed_oracle,
        )

        job, recipe, report = self.job, self.recipe, self.job.report
        sliced = _exceeds_memory(job, self.precision)
        seen: Any = {"bounds": recipe.pictures, "trust_remote_code": job.trust_remote_code}
        bundled = bundled_prompter(self.bundle, **seen)
        with TemporaryDirectory(dir=scratch) as folder:
            kept = Path(folder) / "records"
            kept.mkdir()
            twin = self._twin(Path(folder) / "twin", sliced=sliced)
            subject = _subject(job, recipe, self.exported, self.scales, twin, sliced=sliced)
            # What the bundle holds; before it, where that is not FP32, the same graphs in FP32.
            fp32 = subject.onnx if self.precision == "fp32" else twin
            records = write_records(kept, subject, self.prompts, recipe.parity.steps, report)
            compared = [
                compare_prompts(job.prompter, bundled, self.prompts, self._changed_sidecars()),
                dense := compare_dense(subject, records, recipe, report),
                capa := compare_onnx(fp32, "fp32", records, recipe, report, sliced=sliced),
            ]
            if fp32 != subject.onnx:
                compared.append(compare_onnx(subject.onnx, self.precision, records, recipe, report, sliced=sliced))
            if self.built is not None:
                expected = replayed_oracle(subject)
                engines = (self.engine_model(), subject.onnx, self.precision)
                compared.append(compare_engine(*engines, records, recipe, expected, report, sliced=sliced))
            seed = self.wanted.seed or 0
            steps = recipe.parity.steps
            effect, examples = method_effect(subject, self.questions, seed, steps, report)
            found = {
                "bisection": self._bisection(compared, subject.onnx, twin, records, sliced=sliced),
                "prompts_sha256": self.prompts.digest(),
            }
            notes = _on_layers(job, sliced=sliced)
            if self.wanted.seed is not None and job.images is not None:
                notes.append("Samples of another seed: calibration may have seen some of them.")
            few = _few_pictures(self.prompts)
            latency = None if sliced else _latency(dense, capa)
            parity = self.finish(
                scratch, compared, records, effect, examples, latency, notes=notes, warnings=few, **found
            )
        return {"passed": parity.passed, "latency": latency}

    def _changed_sidecars(self) -> list[str]:
        """Copies of the checkpoint's tokenizer and processor files that are not what they were copied from."""
        published = self.job.sidecar_digests
        copies = (name for name in _sidecars(self.bundle) if name.startswith((f"{ONNX}/llm/", f"{ONNX}/visual/")))
        present = self.bundle.stage("export")["files"]
        return [name for name in copies if present[name] != published.get(Path(name).name, present[name])]

    def _twin(self, folder: Path, *, sliced: bool) -> "Path | Graphs":
        """The bundle's graphs and the dense one, in FP32: in files, or where they run in slices, not written."""
        from capa_export.export import graphs_in_fp32, write_onnx

        source = self.job.source
        options: dict[str, Any] = {**self.job.pruning, "scales": self.scales}
        if sliced:
            return graphs_in_fp32(source, **options)
        write_onnx(source, "fp32", folder, **options, dense=True, report=self.job.report)
        return folder

    def _bisection(
        self,
        compared: "Sequence[Compared]",
        onnx: Path,
        twin: "Path | Graphs",
        records: "Records",
        *,
        sliced: bool,
    ) -> Any:
        """Where the first artefact that failed leaves the eager model, if that is asked for."""
        rows = [row for one in compared for row in (*one.export_error, *one.selection)]
        failed = {row.artefact for row in rows if any(check.failure for check in row.checks)}
        if not self.wanted.bisect or not failed - {PROMPTS}:
            return None
        from capa_export.parity.bisect import bisect

        # What is wrong with the twin is wrong with the graphs themselves.
        of_twin = self.precision != "fp32" and any(artefact.startswith("fp32") for artefact in failed)
        folder, precision = (twin, "fp32") if of_twin else (onnx, self.precision)
        return bisect(folder, precision, twin, records, self.job.report, sliced=sliced)


class _AgainstGolden(_Validation):
    """The stored samples say what the eager model made of them."""

    oracle = "golden"

    def __init__(self, job: Job, recipe: Recipe, wanted: Wanted, built: "BuiltEngines | None") -> None:
        super().__init__(job, recipe, wanted, built)
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
        from capa_export.parity.record import Records
        from capa_export.parity.validate import compare_engine, compare_onnx, compare_sidecars

        recipe, report, onnx = self.recipe, self.job.report, self.bundle.folder / ONNX
        stored = self.bundle.stage(GOLDEN)["result"]
        records = Records(self.bundle.folder / GOLDEN)
        sliced = _graphs_exceed_memory(self.job)
        compared = [compare_onnx(onnx, self.precision, records, recipe, report, sliced=sliced)]
        if self.built is not None:
            engines = (self.engine_model(), onnx, self.precision)
            compared.append(compare_engine(*engines, records, recipe, None, report, sliced=sliced))
        compared.append(compare_sidecars(stored["sidecars"], _sidecars(self.bundle)))
        notes = [f"Held against {len(records)} stored golden samples; --checkpoint runs the eager model anew."]
        notes += _on_layers(self.job, sliced=sliced)
        method_error = MethodError.model_validate(stored["method_error"])
        self.finish(scratch, compared, records, method_error, (), stored["latency"], notes=notes)
        return {"latency": stored["latency"]}


def _store_golden(job: Job, recipe: Recipe, wanted: Wanted, parity: ParityReport) -> None:
    """Leave what the eager model makes of the first few prompts in the bundle."""
    bundle = job.bundle
    exported, calibration = bundle.stage("export")["result"], _calibration(bundle)
    layers = calibration.layers if calibration else []
    scales = {layer: layers[layer].alpha for layer in exported["linear_layers"]} if layers else {}
    samples = _samples(job, recipe, replace(wanted, samples=None), wanted.store_golden, repeat=True)
    steps = recipe.parity.steps
    prune, pictures = recipe.prune.model_dump(mode="json"), recipe.pictures.model_dump(exclude_none=True)
    sidecars = _sidecars(bundle)
    method_error = parity.method_error.model_dump(mode="json")
    versions = tool_versions("torch", "transformers")
    key = [versions, bundle.digest("export"), samples.digest(), steps, prune, job.prompt_settings, method_error]

    def work(scratch: Path) -> dict[str, Any]:
        from capa_export.parity.record import write_records

        (scratch / GOLDEN).mkdir()
        sliced = _exceeds_memory(job, exported["precision"])
        subject = _subject(job, recipe, exported, scales, bundle.folder / ONNX, sliced=sliced)
        write_records(scratch / GOLDEN, subject, samples, steps, job.report)
        latency = bundle.stage("validate")["result"]["latency"]
        seen = {"prune": prune, "pictures": pictures}
        return {"method_error": method_error, "latency": latency, "sidecars": sidecars, **seen}

    run_stage(bundle, GOLDEN, key, [GOLDEN], work)


def _sidecars(bundle: Bundle) -> dict[str, str]:
    """SHA-256 of tokenizer, template, config and processor files, which the golden samples' prompts came from."""
    files = bundle.stage("export")["files"]
    return {name: digest for name, digest in files.items() if not name.endswith((".onnx", ".data", ".safetensors"))}


def _exceeds_memory(job: Job, precision: str) -> bool:
    """Whether to go layer by layer: as is asked, or where the models do not fit, which is then said."""
    from capa_export.dry_run import validation_bytes
    from capa_export.measure import available_memory

    if job.layer_by_layer is not None:
        return job.layer_by_layer
    needed, available = validation_bytes(job.source.checkpoint.num_parameters, precision), available_memory()
    if exceeds := needed > available:
        say(
            f"{'':<14}layer by layer: eager models and graphs take {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are "
            "free; --in-memory tries all the same"
        )
    return exceeds


def _graphs_exceed_memory(job: Job) -> bool:
    """Whether the bundle's graphs alone go slice by slice: as is asked, or where they do not fit."""
    from capa_export.bundled import bundled_dims
    from capa_export.device_memory import onnx_runtime_bytes
    from capa_export.measure import available_memory

    if job.layer_by_layer is not None:
        return job.layer_by_layer
    # As they are and opened up, side by side.
    return 2 * onnx_runtime_bytes(bundled_dims(job.bundle)) > available_memory()


def _on_layers(job: Job, *, sliced: bool) -> list[str]:
    """What is to be said of a validation layer by layer."""
    because = "as was asked" if job.layer_by_layer else "since the models exceed this machine's memory"
    return [f"Model and graphs ran layer by layer, each graph in slices, {because}."] if sliced else []


def _subject(
    job: Job, recipe: Recipe, exported: dict[str, Any], scales: Any, twin: "Path | Graphs", *, sliced: bool
) -> Any:
    from capa_export.lockstep import RESIDENT
    from capa_export.parity.subject import Subject
    from capa_export.streamed import StoredWeights, hollow_model

    weights = StoredWeights(job.source, job.report) if sliced else None
    return Subject(
        model=job.eager_model if weights is None else hollow_model(job.source, weights),
        weights=weights or RESIDENT,
        family=job.family,
        prompter=job.prompter,
        prune=recipe.prune,
        scales=scales,
        precision=exported["precision"],
        onnx=job.bundle.folder / ONNX,
        fp32_onnx=twin,
        eos_token_ids=eos_token_ids(job.source.checkpoint.sidecars),
        fp32_layers=exported.get("fp32_layers", ()),
    )


def _samples(job: Job, recipe: Recipe, wanted: Wanted, count: int, *, repeat: bool) -> "Samples":
    from capa_export.samples import samples_from

    count = count if wanted.samples is None else wanted.samples
    return samples_from(job.images, recipe, count, split="held_out", repeat=repeat, seed=wanted.seed)


def _calibration(bundle: Bundle) -> Calibration | None:
    return Calibration.load(bundle.folder) if (bundle.folder / CALIBRATION).exists() else None


def _latency(dense: "Compared", capa: "Compared") -> dict[str, Any]:
    """Medians of the FP32 graphs on this CPU, dense against CAPA."""
    rows = [
        {"name": name, "dense_ms": dense.milliseconds[name], "capa_ms": value}
        for name, value in capa.milliseconds.items()
    ]
    return {"machine": f"{processor()}, {os.cpu_count()} cores, ONNX Runtime {version('onnxruntime')}", "rows": rows}


def _few_pictures(prompts: "Samples") -> list[str]:
    different = len(prompts.conversations or prompts.files)
    if not different or different >= prompts.count:
        return []
    what = "conversations" if prompts.conversations else "pictures"
    return [f"Only {different} different {what} for {prompts.count} prompts: give as many in --images."]
