"""The stages of a build, in order: calibrate, graph and bind, engine, validate. Each is skipped if it is current."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from capa_export.bundle import Bundle, digest_of
from capa_export.calibration import CALIBRATION, FP16_MAX, Calibration
from capa_export.errors import CapaError
from capa_export.in_place import Shards
from capa_export.job import ONNX, PARITY, REPORT, Job, eos_token_ids, run_stage, say, tool_versions
from capa_export.recipe import Recipe, ranges
from capa_export.target import Target

__all__ = ["adopt_calibration", "build", "calibrate", "export", "validate"]


def build(job: Job, target: Target) -> dict[str, Any]:
    """Everything from checkpoint to parity report; returns the report.

    Raises:
        CapaError: a stage failed; the stages before it are kept.
    """
    from capa_export.build_engines import build_engines, check_engines, check_runtime

    if target.engine is not None:
        check_runtime(target)
    job.check_layers()
    if target.engine is not None:
        check_engines(job, target)
    if job.in_place:
        with job.bundle.replacing() as scratch:
            Shards(job.source.checkpoint, job.precision).try_to_link(scratch)
    calibrate(job)
    export(job)
    if target.engine is not None:
        build_engines(
            job.bundle,
            target,
            weights=job.weights,
            report=job.report,
            plugins=job.plugins,
            plugin_library=job.plugin_library,
        )
    return validate(job)


def calibrate(job: Job) -> Calibration:
    """Measure the dense model, or read what an earlier run measured."""
    from capa_export.export import check_tensors
    from capa_export.samples import samples_from

    if job.calibration is not None:
        calibration = Calibration.load(job.calibration)
        _check_owner(calibration, job, job.calibration)
        adopt_calibration(job.bundle, calibration)
        _note_digests(job)
        _say_linear(calibration, job.recipe)
        return calibration

    count = job.samples or job.recipe.calibration.samples
    samples = samples_from(job.images, job.recipe, count, split="train")
    versions = tool_versions("torch", "transformers")
    key = [versions, job.checkpoint_digest, job.sidecar_digests, samples.digest()]

    def work(scratch: Path) -> dict[str, Any]:
        from capa_export.calibrate import calibrate as measure
        from capa_export.calibrate_layerwise import calibrate_layerwise

        about: Any = {"checkpoint_digest": job.checkpoint_digest, "report": job.report}
        if _exceeds_memory(job) if job.layer_by_layer is None else job.layer_by_layer:
            calibration = calibrate_layerwise(job.source, job.prompter, samples, **about, folder=scratch)
        else:
            calibration = measure(job.eager_model, job.family, job.prompter, samples, **about)
        calibration.save(scratch / CALIBRATION)
        return calibration.summary(job.recipe.ffn.eta, job.recipe.ffn.paper_layers)

    check_tensors(job.source)
    run_stage(job.bundle, "calibrate", key, [CALIBRATION], work, outdates=["validate"])
    _note_digests(job)
    calibration = Calibration.load(job.bundle.folder)
    _say_linear(calibration, job.recipe)
    return calibration


def _note_digests(job: Job) -> None:
    """Spare the next command reading the whole checkpoint."""
    job.bundle.update(hashed={"files": job.fingerprints, "sha256": job.digests})


def _exceeds_memory(job: Job) -> bool:
    """Whether the eager model does not fit, which is then said."""
    from capa_export.dry_run import calibration_bytes
    from capa_export.measure import available_memory

    needed, available = calibration_bytes(job.source.checkpoint.num_parameters), available_memory()
    if exceeds := needed > available:
        say(
            f"{'':<14}layer by layer: the model takes {needed / 1e9:.1f} GB in FP32, "
            f"{available / 1e9:.1f} GB are free; --in-memory tries all the same"
        )
    return exceeds


def adopt_calibration(bundle: Bundle, calibration: Calibration) -> None:
    """Put a calibration made elsewhere into a bundle."""

    def work(scratch: Path) -> dict[str, Any]:
        calibration.save(scratch / CALIBRATION)
        return {"samples": calibration.samples, "adopted": True}

    key = ["adopted", calibration.digest()]
    run_stage(bundle, "calibrate", key, [CALIBRATION], work, outdates=["validate"])


def export(job: Job) -> None:
    """Write the graphs and stream the weights into them."""
    from capa_export.export import check_tensors

    job.check_layers()
    check_tensors(job.source)
    scales = {}
    calibration = None
    if job.ffn or (job.bundle.folder / CALIBRATION).exists():
        calibration = Calibration.load(job.bundle.folder)
        _check_owner(calibration, job, job.bundle.folder / CALIBRATION)
        _audit(calibration, job)
        if job.ffn:
            linear = calibration.linear_layers(job.recipe.ffn.eta)
            scales = {layer: calibration.layers[layer].alpha for layer in linear}
    alpha = _alpha_digest(scales)

    def digests() -> dict[str, str]:
        # A calibration needed them; weights in place are too many bytes to read for anything less.
        return job.known_digests if job.in_place and calibration is None else job.digests

    def key() -> list[Any]:
        return [
            tool_versions("onnxscript", "onnx-ir"),
            ["in place", job.fingerprints] if job.in_place else job.checkpoint_digest,
            job.precision,
            job.pruning,
            job.sidecar_digests,
            alpha,
        ]

    def work(scratch: Path) -> dict[str, Any]:
        from capa_export.export import copy_sidecars, write_onnx

        if not job.in_place:
            job.hash_meanwhile()
        sizes = write_onnx(
            job.source,
            job.precision,
            scratch / ONNX,
            **job.pruning,
            scales=scales,
            in_place=job.in_place,
            report=job.report,
        )
        copy_sidecars(job.source.checkpoint, scratch / ONNX)
        known = digests()
        linked = {f"{ONNX}/{file}": known.get(size["shard"]) for file, size in sizes.items() if "shard" in size}
        made = {"files": sizes, "linear_layers": sorted(scales), "alpha": alpha, "precision": job.precision}
        sha256 = {f"{ONNX}/{file}": size["sha256"] for file, size in sizes.items() if "sha256" in size}
        return {**made, "searched_for_nan": not job.in_place, "linked": linked, "sha256": sha256}

    run_stage(job.bundle, "export", key, [ONNX], work, outdates=["engine/", "validate"])
    visual = job.recipe.visual_tokens
    for stage, kept in zip(job.schedule, job.recipe.prune.num_keep([visual]), strict=True):
        say(f"{'':<14}ratio {stage.ratio:g} after layer {stage.layer}: kept {kept} of {visual} visual tokens")
    job.bundle.update(
        tool=tool_versions("onnxscript", "onnx-ir", "onnx", "onnxruntime", "torch", "transformers"),
        command=list(job.command),
        recipe=job.recipe.model_dump(mode="json"),
        checkpoint={
            "source": job.checkpoint_source,
            "revision": job.revision,
            "files": job.fingerprints,
            "sha256": digests(),
        },
        calibration_samples=calibration.samples if calibration else 0,
    )
    if digests():
        _note_digests(job)


def validate(job: Job, engine: str | None = None) -> dict[str, Any]:
    """Hold the bundle against the eager model.

    Args:
        job: what to validate, and on what.
        engine: target whose engines are run on the GPU and held to the same gates.

    Returns:
        The parity report, which is also in `parity.json`; the caller turns `passed` into an exit code.
    """
    from tempfile import TemporaryDirectory

    from capa_export.samples import samples_from

    bundle, parity = job.bundle, job.recipe.parity
    built = None
    if engine is not None:
        from capa_export.execution import require_engines

        built = require_engines(bundle, engine)
        bundle.verify(f"engine/{engine}")
    bundle.verify("export")
    result = bundle.stage("export")["result"]
    recorded = bundle.manifest["checkpoint"]
    if recorded.get("files") != job.fingerprints and recorded["sha256"] != job.digests:
        raise CapaError(f"{job.checkpoint}: is not the checkpoint this bundle was made from; pass it with --checkpoint")
    calibration = Calibration.load(bundle.folder) if (bundle.folder / CALIBRATION).exists() else None
    scales = {layer: calibration.layers[layer].alpha for layer in result["linear_layers"]} if calibration else {}
    if result["alpha"] != _alpha_digest(scales):
        raise CapaError(f"{bundle.folder / CALIBRATION}: changed since the export; run `capa-export export` again")
    prompts = samples_from(job.images, job.recipe, parity.prompts, split="held_out", repeat=True)
    questions = samples_from(job.images, job.recipe, parity.accuracy_samples, split="held_out")
    key = [
        tool_versions("onnxruntime", "torch", "transformers"),
        bundle.digest("export"),
        job.recipe.prune.model_dump(),
        parity.model_dump(),
        prompts.digest(),
        questions.digest(),
        *([] if built is None else [bundle.digest(f"engine/{engine}"), built.gpu.name]),
    ]

    def work(scratch: Path) -> dict[str, Any]:
        from capa_export.dry_run import dry_run
        from capa_export.export import write_onnx
        from capa_export.report import write_report
        from capa_export.subject import Subject
        from capa_export.validate import validate as compare

        with TemporaryDirectory(dir=scratch) as twin:
            write_onnx(job.source, "fp32", Path(twin), **job.pruning, scales=scales, dense=True, report=job.report)
            subject = Subject(
                model=job.eager_model,
                family=job.family,
                prompter=job.prompter,
                prune=job.recipe.prune,
                scales=scales,
                precision=result["precision"],
                onnx=bundle.folder / ONNX,
                fp32_onnx=Path(twin),
                eos_token_ids=eos_token_ids(job.source.checkpoint.folder),
            )
            model = None
            if built is not None:
                from capa_export.engine_runtime import EngineModel

                model = EngineModel(built)
            parity_report, examples = compare(subject, job.recipe, prompts, questions, job.report, model)
        (scratch / PARITY).write_text(json.dumps(parity_report, indent=2) + "\n", encoding="utf-8")
        plan = dry_run(
            job.recipe, str(job.source.checkpoint.folder), bundle.folder, result["precision"], ffn=bool(scales)
        )
        write_report(
            scratch / REPORT,
            manifest=bundle.manifest,
            parity=parity_report,
            calibration=calibration.summary(job.recipe.ffn.eta, job.recipe.ffn.paper_layers) if calibration else None,
            plan=plan,
            examples=examples,
        )
        return parity_report

    return run_stage(bundle, "validate", key, [PARITY, REPORT], work)


def _alpha_digest(scales: Mapping[int, np.ndarray]) -> str:
    return digest_of({layer: alpha.tolist() for layer, alpha in scales.items()})


def _say_linear(calibration: Calibration, recipe: Recipe) -> None:
    linear = calibration.linear_layers(recipe.ffn.eta)
    paper = f"; the paper lists {ranges(recipe.ffn.paper_layers)}" if recipe.ffn.paper_layers else ""
    say(f"{'':<14}visual FFNs linear (cosine > {recipe.ffn.eta:g}) in layers {ranges(linear)}{paper}")


def _check_owner(calibration: Calibration, job: Job, path: Path) -> None:
    """Refuse a calibration whose alpha belongs to other weights."""
    if calibration.checkpoint_digest != job.checkpoint_digest:
        raise CapaError(f"{path}: measured on another checkpoint than {job.checkpoint}; calibrate this one")


def _audit(calibration: Calibration, job: Job) -> None:
    """Refuse FP16 where calibration saw a value that it cannot hold."""
    if job.precision != "fp16":
        return
    for name, largest in calibration.absmax.items():
        if largest > FP16_MAX:
            raise CapaError(
                f"{name} reaches {largest:.3g}, above {FP16_MAX:.0f}, the largest FP16 number; "
                "build with --precision bf16"
            )
        if largest > FP16_MAX / 4:
            say(f"warning: {name} reaches {largest:.3g}, {largest / FP16_MAX:.0%} of the largest FP16 number")
