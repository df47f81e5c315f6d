"""The stages of a build, in order: calibrate, graph and bind, engine, validate. Each is skipped if it is current."""

from dataclasses import replace
from functools import partial
from itertools import chain, islice
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import capa_export
from capa_export.base.code import versions
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.progress import silent, tracked
from capa_export.base.workers import chunks, in_order, spread
from capa_export.bundle.store import Bundle
from capa_export.calibrate.audit import audit
from capa_export.calibrate.sums import CALIBRATION, Calibration, summed
from capa_export.calibrate.unfinished import UnfinishedSums
from capa_export.config.recipe import Recipe, ranges
from capa_export.config.target import Target
from capa_export.export.in_place import Shards
from capa_export.job import ONNX, Job, alpha_digest, run_stage, say, say_weights
from capa_export.model.generation import eos_token_ids, read_generation
from capa_export.parity.against_golden import GOLDEN
from capa_export.parity.stage import validate
from capa_export.parity.validation import Wanted
from capa_export.plan.eager_memory import exceeds_memory, require_eager_memory
from capa_export.report.schema import ParityReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from capa_export.data.samples import Sample, Samples
__all__ = ["adopt_calibration", "build", "calibrate", "export", "note_digests", "validate"]

_SAMPLES_A_TASK = 4
_CALIBRATION_CODE = ("capa_export.calibrate.layerwise", "capa_export.calibrate.measure", "capa_export.job")
_PACKAGES = ("onnxscript", "onnx-ir", "onnx", "onnxruntime", "torch", "transformers")
_EXPORT_CODE = (
    "capa_export.export.genai",
    "capa_export.export.stage",
    "capa_export.model.generation",
    "capa_export.model.processors.resolved",
)


def build(job: Job, target: Target, wanted: Wanted | None = None, *, auto_fp32: bool = False) -> ParityReport:
    """Everything from checkpoint to parity report; returns the report.

    Raises:
        CapaError: a stage failed; the stages before it are kept.
    """
    from capa_export.trt.stage import check_engines, check_runtime

    if target.engine is not None:
        check_runtime(target)
    _check_wishes(job)
    if target.engine is not None:
        check_engines(job, target)
    _check_room(job, target)
    with job.bundle.claimed():
        return _build(job, target, wanted, auto_fp32=auto_fp32)


def _check_room(job: Job, target: Target) -> None:
    """Refuse, before anything is run, what this machine, the device or the disk has no room for.

    Settles where the engines' weights go.
    """
    from capa_export.plan.plan import room

    plan = room(
        job.recipe,
        job.visual_tokens,
        job.source.dims,
        job.precision,
        job.bundle.folder,
        target=target,
        weights=job.weights,
        in_place=job.in_place,
        memory=job.memory,
        ffn=job.ffn,
        calibration=job.calibration,
        checkpoint={"files": job.fingerprints},
        layer_by_layer=job.layer_by_layer,
    )
    if plan["refusals"]:
        raise CapaError(plan["refusals"][0])
    if plan["weights"] is not None:
        say_weights(job.weights, plan["weights"], plan["weights_because"])
        job.weights = plan["weights"]


def _build(job: Job, target: Target, wanted: Wanted | None, *, auto_fp32: bool) -> ParityReport:
    """The stages of a build that nothing stands in the way of."""
    from capa_export.trt.stage import build_engines

    if job.in_place:
        with job.bundle.replacing() as scratch:
            Shards(job.source.checkpoint, job.precision).try_to_link(scratch)
    calibrate(job)

    def export_and_build() -> None:
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

    export_and_build()
    parity = validate(job, wanted)
    while auto_fp32 and (proposed := _proposed(parity)):
        job.recipe = job.recipe.with_options(fp32_layers=(*job.recipe.fp32_layers, *proposed))
        say(f"auto-fp32     {parity.bisection.sentence if parity.bisection else ''}")
        export_and_build()
        before, parity = parity, validate(job, wanted)
        say(f"{'':<14}{', '.join(proposed)} in FP32: {_worst(before)} -> {_worst(parity)}")
    if auto_fp32 and not parity.passed:
        say(f"auto-fp32     nothing more to put in FP32: {parity.bisection.sentence if parity.bisection else ''}")
    return parity


def _proposed(parity: ParityReport) -> tuple[str, ...]:
    """What the bisection of a failure would have in FP32 that is not yet."""
    if parity.passed or parity.bisection is None:
        return ()
    return tuple(part for part in parity.bisection.fp32_layers if part not in parity.fp32_layers)


def _worst(parity: ParityReport) -> str:
    """The verdict, and the largest error of a logit in the bundle's precision."""
    errors = [check for error in parity.export_error for check in error.checks if check.name == "relative error"]
    worst = max((inf if check.value is None else check.value for check in errors), default=0.0)
    return f"{'passed' if parity.passed else 'failed'}, relative error {worst:.1e}"


def calibrate(job: Job) -> Calibration:
    """Measure the dense model, or read what an earlier run measured."""
    from capa_export.data.samples import samples_from

    job.check_files()
    _check_workers(job)
    job.check_pictures()
    if job.calibration is not None:
        calibration = Calibration.load(job.calibration)
        _check_owner(calibration, job, job.calibration)
        with job.bundle.claimed():
            adopt_calibration(job.bundle, calibration)
            note_digests(job)
        _say_linear(calibration, job.recipe)
        return calibration

    count = job.samples or job.recipe.calibration.samples
    samples = samples_from(job.images, job.recipe, count, split="train")
    made_by = versions("torch", "transformers", code_of=_CALIBRATION_CODE)
    key = [made_by, job.checkpoint_digest, job.prompt_settings, samples.digest()]

    def work(scratch: Path) -> dict[str, Any]:
        by_layer = _by_layer(job, key)
        with job.bundle.unfinished("calibrate", [key, by_layer]) as folder:
            calibration = _measured(job, samples, UnfinishedSums(folder), by_layer=by_layer)
        calibration.save(scratch / CALIBRATION)
        return calibration.summary(job.recipe.ffn.eta, job.recipe.ffn.paper_layers)

    with job.bundle.claimed():
        run_stage(job.bundle, "calibrate", key, [CALIBRATION], work, outdates=["validate"])
        note_digests(job)
        calibration = Calibration.load(job.bundle.folder)
    _say_linear(calibration, job.recipe)
    return calibration


def _by_layer(job: Job, key: list[Any]) -> bool:
    """Whether to go layer by layer: as is asked, as an interrupted run did, or where the model does not fit."""
    if job.layer_by_layer is not None:
        return job.layer_by_layer
    if not job.workers.here:
        return False
    for by_layer in (False, True):
        folder = job.bundle.interrupted("calibrate", [key, by_layer])
        if folder is not None and UnfinishedSums(folder).load() is not None:
            return by_layer
    return exceeds_memory(job)


def _measured(job: Job, samples: "Samples", unfinished: UnfinishedSums, *, by_layer: bool) -> Calibration:
    """Measure the samples, from where an interrupted run stopped."""
    from capa_export.calibrate.layerwise import calibrate_layerwise
    from capa_export.calibrate.measure import calibrate as measure

    if unfinished.load() is not None:
        option = "--layer-by-layer" if by_layer else "--in-memory"
        say(f"{'':<14}goes on where it was interrupted, as with {option}")
    if not job.workers.here:
        return _calibrate_spread(job, samples, unfinished)
    about: Any = {"checkpoint_digest": job.checkpoint_digest, "unfinished": unfinished, "report": job.report}
    if by_layer:
        return calibrate_layerwise(job.source, job.prompter, samples, **about)
    calibration = measure(job.eager_model, job.family, job.prompter, samples, **about)
    # The stages to come need the memory more than validation needs the second that loading takes.
    job.forget_eager_model()
    return calibration


def note_digests(job: Job) -> None:
    """Spare the next command reading the whole checkpoint."""
    with job.bundle.claimed():
        known = {"source": job.checkpoint_source, "revision": job.revision}
        job.bundle.update(hashed={**known, "files": job.fingerprints, "sha256": job.digests})


def _calibrate_spread(job: Job, samples: "Samples", unfinished: UnfinishedSums) -> Calibration:
    """What one process would measure, to the last bit where each has as many threads."""
    apart = replace(job, checkpoint=job.checkpoint_source, report=silent)
    before = unfinished.load()
    done = before.samples if before else 0
    tasks = chunks(islice(samples, done, None), _SAMPLES_A_TASK)
    results = in_order(spread(partial(_measurer, apart, job.checkpoint_digest), tasks, job.workers))
    measured = tracked(chain.from_iterable(results), "calibrate", samples.count - done, job.report)
    return summed(measured, before, unfinished.keep)


def _measurer(job: Job, checkpoint_digest: str) -> "Callable[[Sequence[Sample]], list[Calibration]]":
    """Of a worker process: opens the model, and measures each of the samples it is given."""
    from capa_export.calibrate.measure import measure

    model, family, prompter = job.eager_model, job.family, job.prompter
    return lambda samples: [measure(model, family, prompter, sample, checkpoint_digest) for sample in samples]


def _check_workers(job: Job) -> None:
    """Refuse workers that this machine's memory, or another option, does not allow."""
    if job.workers.here:
        return
    if job.layer_by_layer:
        raise CapaError("--layer-by-layer runs in one process: drop it, or --workers and --ray", ExitCode.USAGE)
    require_eager_memory(job)


def _check_wishes(job: Job) -> None:
    """Refuse a schedule or sizes of pictures that do not fit the model, and settings that `run` would refuse."""
    job.check_layers()
    job.check_pictures()
    read_generation(job.source.checkpoint.sidecars).check()


def adopt_calibration(bundle: Bundle, calibration: Calibration) -> None:
    """Put a calibration made elsewhere into a bundle."""

    def work(scratch: Path) -> dict[str, Any]:
        calibration.save(scratch / CALIBRATION)
        return {"samples": calibration.samples, "adopted": True}

    key = ["adopted", calibration.digest()]
    run_stage(bundle, "calibrate", key, [CALIBRATION], work, outdates=["validate"])


def export(job: Job) -> None:
    """Write the graphs and stream the weights into them."""
    _check_wishes(job)
    job.check_files()
    scales = {}
    calibration = None
    if job.ffn or (job.bundle.folder / CALIBRATION).exists():
        calibration = Calibration.load(job.bundle.folder)
        _check_owner(calibration, job, job.bundle.folder / CALIBRATION)
        if job.ffn:
            scales = calibration.scales(job.recipe.ffn.eta)
    alpha, fp32_layers = alpha_digest(scales), _fp32_layers(job, calibration)

    def digests() -> dict[str, str]:
        # A calibration needed them; weights in place are too many bytes to read for anything less.
        return job.known_digests if job.in_place and calibration is None else job.digests

    def key() -> list[Any]:
        return [
            versions("onnxscript", "onnx-ir", code_of=_EXPORT_CODE),
            ["in place", job.fingerprints] if job.in_place else job.checkpoint_digest,
            job.precision,
            job.pruning,
            job.sidecar_digests,
            alpha,
            fp32_layers,
        ]

    def work(scratch: Path) -> dict[str, Any]:
        from capa_export.export.genai import reason_against, write_genai
        from capa_export.export.stage import copy_sidecars, write_onnx
        from capa_export.model.processors.resolved import PROCESSORS, write_processors

        # Before anything is written.
        processors = job.prompter.tokenizer, job.prompter.image_processor
        if not job.in_place:
            job.hash_meanwhile()
        sizes = write_onnx(
            job.source,
            job.precision,
            scratch / ONNX,
            **job.pruning,
            scales=scales,
            fp32_layers=fp32_layers,
            in_place=job.in_place,
            report=job.report,
        )
        copy_sidecars(job.source.checkpoint, scratch / ONNX, code=job.trust_remote_code)
        needs_transformers = write_processors(*processors, scratch / ONNX / PROCESSORS)
        not_genai = reason_against(job.source, job.recipe.prune.selectors)
        if not_genai is None:
            sizes |= write_genai(
                job.source,
                job.precision,
                scratch / ONNX,
                selectors=job.recipe.prune.selectors,
                linear_layers=sorted(scales),
                eos_token_ids=eos_token_ids(scratch / ONNX / "llm"),
                min_keep_per_image=job.recipe.prune.min_keep_per_image,
                fp32_layers=fp32_layers,
            )
        known = digests()
        linked = {f"{ONNX}/{file}": known.get(size["shard"]) for file, size in sizes.items() if "shard" in size}
        made = {
            "files": sizes,
            "linear_layers": sorted(scales),
            "alpha": alpha,
            "precision": job.precision,
            "fp32_layers": fp32_layers,
            "not_for_genai": not_genai,
            "needs_transformers": needs_transformers,
        }
        sha256 = {f"{ONNX}/{file}": size["sha256"] for file, size in sizes.items() if "sha256" in size}
        return {**made, "searched_for_nan": not job.in_place, "linked": linked, "sha256": sha256}

    with job.bundle.claimed():
        run_stage(job.bundle, "export", key, [ONNX], work, outdates=["engine/", "validate", GOLDEN])
        _say_kept(job, calibration)
        job.bundle.update(
            tool={"capa-export": capa_export.__version__, **versions(*_PACKAGES, code_of=_EXPORT_CODE)},
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
            note_digests(job)


def _say_kept(job: Job, calibration: Calibration | None) -> None:
    """What stays of the picture that plans are made for, and of the prompts that a calibration has seen."""
    width, height = job.recipe.picture
    mean = round(calibration.mean_visual_tokens) if calibration is not None else None
    picture = job.recipe.prune.num_keep([job.visual_tokens])
    prompts = job.recipe.prune.num_keep([mean]) if mean else picture
    for stage, kept, of_mean in zip(job.schedule, picture, prompts, strict=True):
        by = "" if stage.selector == "capa" else f" by {stage.selector}"
        of_picture = f"kept {kept} of {job.visual_tokens} visual tokens of a picture of {width} x {height}"
        say(f"{'':<14}ratio {stage.ratio:g} {stage.where}{by}: {of_picture}")
        if mean:
            say(f"{'':<14}and {of_mean} of {mean}, the mean of the calibration's prompts")


def _say_linear(calibration: Calibration, recipe: Recipe) -> None:
    linear = calibration.linear_layers(recipe.ffn.eta)
    paper = f"; the paper lists {ranges(recipe.ffn.paper_layers)}" if recipe.ffn.paper_layers else ""
    say(f"{'':<14}visual FFNs linear (cosine > {recipe.ffn.eta:g}) in layers {ranges(linear)}{paper}")


def _check_owner(calibration: Calibration, job: Job, path: Path) -> None:
    """Refuse a calibration whose alpha belongs to other weights."""
    if calibration.checkpoint_digest != job.checkpoint_digest:
        raise CapaError(f"{path}: measured on another checkpoint than {job.checkpoint}; calibrate this one")


def _fp32_layers(job: Job, calibration: Calibration | None) -> list[str]:
    """The recipe's parts in FP32, and those that the calibration asks for."""
    if job.precision == "fp32":
        return []
    asked: tuple[str, ...] = ()
    if calibration is not None:
        asked, findings = audit(calibration.absmax, job.precision, job.source.dims)
        for finding in findings:
            say(f"audit         {finding}")
    elif job.precision == "fp16":
        say("audit         no calibration, so whether FP16 holds every activation is not known")
    return sorted({*job.recipe.fp32_layers, *asked})
