"""The export stage: writes the graphs of a recipe and streams the weights into them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import capa_export
from capa_export.base.code import versions
from capa_export.base.components import bill_of_materials
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.progress import say
from capa_export.bundle.store import ONNX, Bundle, run_stage
from capa_export.calibrate.audit import audit
from capa_export.calibrate.stage import with_effect
from capa_export.calibrate.sums import CALIBRATION, Calibration, check_owner, scales_digest
from capa_export.calibrate.weights import take_choice
from capa_export.config.options import BuildOptions
from capa_export.export.folder import write_folder
from capa_export.export.graphs import pruning
from capa_export.export.packing import packing_words
from capa_export.model.files import check_files
from capa_export.model.generation import read_generation
from capa_export.model.model import Model
from capa_export.model.quantized.tensor import quantization

__all__ = ["check_wishes", "export"]

_PACKAGES = ("onnxscript", "onnx-ir", "onnx", "onnxruntime", "torch", "transformers")
_CODE = ("capa_export.export.folder",)
"""Modules whose code the files depend on."""


def check_wishes(model: Model, options: BuildOptions) -> None:
    """Refuse what does not fit the model: a schedule, sizes of pictures, weights; and settings that `run` would refuse.

    Raises:
        CapaError: there are some.
    """
    model.check_layers()
    model.check_pictures()
    if options.in_place and model.source.rounds:
        raise CapaError(
            f"--weights in-place reads the checkpoint's own weights, and {model.recipe.rounding_words} rounds "
            "them; leave one of the two away",
            ExitCode.USAGE,
        )
    read_generation(model.source.checkpoint.sidecars).check()


def export(model: Model, bundle: Bundle, options: BuildOptions) -> None:
    """Write the ONNX files of a bundle, which has a calibration unless FFNs stay as they are.

    Raises:
        CapaError: an option or a file does not fit the model, or the disk or a dtype is too small for the weights.
    """
    check_wishes(model, options)
    check_files(model)
    with bundle.claimed():
        _export(model, bundle, options)


def _export(model: Model, bundle: Bundle, options: BuildOptions) -> None:
    model.remember_digests(bundle)
    take_choice(model, bundle, options)
    calibration, scales = _calibrated(model, bundle, options)
    alpha, fp32_layers = scales_digest(scales), _fp32_layers(model, options, calibration)

    # A calibration needed them, and a signature does; weights in place are too many bytes to read for anything less.
    unread = options.in_place and calibration is None and not bundle.signing

    def digests() -> dict[str, str]:
        return {} if unread and not model.remember_digests(bundle) else model.digests

    def key() -> list[Any]:
        return [
            versions("onnxscript", "onnx-ir", code_of=_CODE),
            ["in place", model.fingerprints, *["unread"] * unread] if options.in_place else model.digest,
            options.precision,
            model.recipe.quantize,
            pruning(model.recipe.prune),
            model.sidecar_digests,
            alpha,
            fp32_layers,
        ]

    def work(scratch: Path) -> dict[str, Any]:
        # Before anything is written.
        processors = model.prompter.tokenizer, model.prompter.image_processor
        if not options.in_place:
            model.hash_meanwhile()
        files, facts = write_folder(
            *(model.source, processors, model.recipe.prune, options.precision, scratch / ONNX),
            scales=scales,
            fp32_layers=fp32_layers,
            in_place=options.in_place,
            code=model.trust_remote_code,
            report=model.report,
        )
        known = digests()
        linked = {f"{ONNX}/{file}": known.get(entry["shard"]) for file, entry in files.items() if "shard" in entry}
        sha256 = {f"{ONNX}/{file}": entry["sha256"] for file, entry in files.items() if "sha256" in entry}
        made = {"files": files, "linear_layers": sorted(scales), "alpha": alpha, "fp32_layers": fp32_layers, **facts}
        return {**made, "sbom": bill_of_materials(), "linked": linked, "sha256": sha256}

    def about() -> dict[str, Any]:
        return {
            "tool": {"capa-export": capa_export.__version__, **versions(*_PACKAGES, code_of=_CODE)},
            "command": list(options.command),
            "recipe": model.recipe.model_dump(mode="json"),
            "checkpoint": {
                "source": model.checkpoint_source,
                "revision": model.revision,
                "files": model.fingerprints,
                "sha256": digests(),
                "quantization": quantization(model.source.checkpoint.tensors),
            },
            "calibration_samples": calibration.samples if calibration else 0,
            **({"hashed": model.hashed} if digests() else {}),
        }

    run_stage(
        bundle, "export", key, [ONNX], work, outdates=["engine/", "validate", "golden", "polygraphy"], about=about
    )
    if packing := bundle.stage("export")["result"]["packing"]:
        say(f"{'':<14}{packing_words(packing, options.precision)}")
    _say_kept(model, calibration)


def _calibrated(model: Model, bundle: Bundle, options: BuildOptions) -> tuple[Calibration | None, Mapping[int, Any]]:
    """The bundle's calibration, and alpha [D] of every layer whose visual FFNs become a scale."""
    path = bundle.folder / CALIBRATION
    if not (options.ffn or path.exists()):
        return None, {}
    calibration, ffn = Calibration.load(bundle.folder), model.recipe.ffn
    check_owner(calibration, model, path)
    if not options.ffn:
        return calibration, {}
    if not calibration.measured(ffn):
        # As where several were added up.
        calibration = with_effect(model, bundle, options)
    return calibration, calibration.alphas(calibration.scaled_layers(ffn))


def _fp32_layers(model: Model, options: BuildOptions, calibration: Calibration | None) -> list[str]:
    """The recipe's parts in FP32, and those that the calibration asks for."""
    if options.precision == "fp32":
        return []
    asked: tuple[str, ...] = ()
    if calibration is not None:
        asked, findings = audit(calibration.absmax, options.precision, model.source.dims, calibration.samples)
        for finding in findings:
            say(f"audit         {finding}")
    elif options.precision == "fp16":
        say("audit         no calibration, so whether FP16 holds every activation is not known")
    return sorted({*model.recipe.fp32_layers, *asked})


def _say_kept(model: Model, calibration: Calibration | None) -> None:
    """Say what stays of the picture that plans are made for, and of the prompts that a calibration has seen."""
    prune, (width, height) = model.recipe.prune, model.recipe.picture
    mean = round(calibration.mean_visual_tokens) if calibration is not None else None
    picture = prune.num_keep([model.visual_tokens])
    prompts = prune.num_keep([mean]) if mean else picture
    for stage, kept, of_mean in zip(prune.schedule, picture, prompts, strict=True):
        by = "" if stage.selector == "capa" else f" by {stage.selector}"
        of_picture = f"kept {kept} of {model.visual_tokens} visual tokens of a picture of {width} x {height}"
        say(f"{'':<14}ratio {stage.ratio:g} {stage.where}{by}: {of_picture}")
        if mean:
            say(f"{'':<14}and {of_mean} of {mean}, the mean of the calibration's prompts")
