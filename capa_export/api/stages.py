"""The stages of a build that run by themselves, before the engines' and the validation's, which are a bundle's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capa_export.api.bundle import AnyPath, Bundle, path_of
from capa_export.api.models import find_model, replaces_ffns
from capa_export.api.signing import signer_of
from capa_export.base.precision import Precision
from capa_export.base.progress import Report, silent
from capa_export.base.workers import Workers
from capa_export.bundle import store
from capa_export.config.options import BuildOptions

__all__ = ["calibrate", "export"]


def calibrate(
    checkpoint: str | None = None,
    *,
    out: AnyPath,
    recipe: str | None = None,
    revision: str | None = None,
    ffn_budget: float | None = None,
    quantize: str | None = None,
    quantize_head: str | None = None,
    quantize_vision: str | None = None,
    auto_precision: bool = False,
    images: AnyPath | None = None,
    samples: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    layer_by_layer: bool | None = None,
    workers: int | None = None,
    ray: str | None = None,
    trust_remote_code: bool = False,
    progress: Report = silent,
) -> dict[str, Any]:
    """Measure which visual FFNs a scale may replace, into a bundle's folder; returns what was found.

    Args:
        checkpoint: local folder or hub id; None for the recipe's own.
        out: the bundle's folder.
        recipe: a name that `capa-export models` lists, or the path of a .toml; None for the checkpoint's.
        revision: of a hub id.
        ffn_budget: nats that scales in the place of visual FFNs may cost, in place of the recipe's.
        quantize: what the weights of the decoder's layers are to be in the build that the calibration is for.
        quantize_head: what the weight of the LM head is to be: `none`, `int8`, `int4[:GROUP]` or `fp8`.
        quantize_vision: what the weights of the vision tower's blocks are to be: `none`, `int8` or `fp8`.
        auto_precision: whether the fewest decoder layers stay as they are that bring what `quantize` costs within the
            recipe's budget.
        images: pictures and questions; the recipe's scenes where there are none.
        samples: prompts, in place of the recipe's number.
        min_pixels: least area that a picture is resized to.
        max_pixels: largest area.
        layer_by_layer: whether to hold one layer's weights in memory; None where the model does not fit.
        workers: processes that share the samples.
        ray: address of a cluster that does.
        trust_remote_code: whether the checkpoint's own Python may run.
        progress: told how far the work is.

    Raises:
        CapaError: the model or a sample does not load, or this machine has no room for the model.
    """
    from capa_export.calibrate.stage import calibrate as measure

    model = find_model(
        *(checkpoint, recipe),
        revision=revision,
        ffn_budget=ffn_budget,
        quantize=quantize,
        quantize_head=quantize_head,
        quantize_vision=quantize_vision,
        auto_precision=auto_precision,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    options = BuildOptions(
        images=path_of(images),
        samples=samples,
        layer_by_layer=layer_by_layer,
        workers=Workers(count=workers, ray=ray),
    )
    return measure(model, store.Bundle(Path(out)), options).summary(model.recipe.ffn)


def export(
    checkpoint: str | None = None,
    *,
    out: AnyPath,
    recipe: str | None = None,
    revision: str | None = None,
    schedule: str | None = None,
    ratio: float | None = None,
    min_keep_per_image: int | None = None,
    ffn_budget: float | None = None,
    images: AnyPath | None = None,
    calibration: AnyPath | None = None,
    precision: Precision = "fp16",
    quantize: str | None = None,
    quantize_head: str | None = None,
    quantize_vision: str | None = None,
    auto_precision: bool = False,
    fp32_layers: Sequence[str] | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    in_place: bool = False,
    polygraphy: bool = False,
    trust_remote_code: bool = False,
    sign: AnyPath | None = None,
    command: Sequence[str] = (),
    progress: Report = silent,
) -> Bundle:
    """Write the ONNX files of a bundle that is calibrated, or whose FFNs stay as they are.

    Args:
        checkpoint: as `build`, like all that is not told here.
        out: the bundle's folder.
        recipe: a name or a path.
        revision: of a hub id.
        schedule: as `capa@2:0.75`, in place of the recipe's; with `/full`, visual FFNs stay as they are.
        ratio: fraction of visual tokens removed.
        min_keep_per_image: visual tokens that each image keeps at least.
        ffn_budget: nats that scales in the place of visual FFNs may cost, in place of the recipe's.
        images: pictures that a finished calibration is tried on, where it does not say what its scales cost.
        calibration: a finished one, in place of the one in `out`.
        precision: of weights and activations.
        quantize: what the weights of the decoder's layers are to be.
        quantize_head: what the weight of the LM head is to be: `none`, `int8`, `int4[:GROUP]` or `fp8`.
        quantize_vision: what the weights of the vision tower's blocks are to be: `none`, `int8` or `fp8`.
        auto_precision: whether the fewest decoder layers stay as they are that bring what `quantize` costs within the
            recipe's budget.
        fp32_layers: parts in FP32.
        min_pixels: least area that a picture is resized to.
        max_pixels: largest area.
        in_place: whether the ONNX files read the checkpoint's own shards instead of a copy.
        polygraphy: whether to run the graphs on one prompt, and leave what goes in and what comes out for Polygraphy.
        trust_remote_code: whether the checkpoint's own Python may run.
        sign: file of the Ed25519 private key that signs the bundle when it is done.
        command: a command line, for the manifest.
        progress: told how far the work is.

    Raises:
        CapaError: an option or a file does not fit the model, the disk has no room for the weights, or memory none
            for the graphs.
    """
    if polygraphy:
        from capa_export.trt.polygraphy import check_polygraphy

        check_polygraphy(precision)
    bundle, signer = signer_of(store.Bundle(Path(out)), sign, exports=True)
    model = find_model(
        *(checkpoint, recipe),
        revision=revision,
        schedule=schedule,
        ratio=ratio,
        min_keep_per_image=min_keep_per_image,
        ffn_budget=ffn_budget,
        fp32_layers=fp32_layers,
        quantize=quantize,
        quantize_head=quantize_head,
        quantize_vision=quantize_vision,
        auto_precision=auto_precision,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    from capa_export.calibrate.stage import calibrate as measure
    from capa_export.export.stage import export as write_graphs

    options = BuildOptions(
        images=path_of(images),
        calibration=path_of(calibration),
        precision=precision,
        ffn=replaces_ffns(schedule),
        in_place=in_place,
        command=command,
    )
    if calibration is not None:
        measure(model, bundle, options)
    write_graphs(model, bundle, options)
    if polygraphy:
        from capa_export.trt.polygraphy import store_polygraphy

        store_polygraphy(bundle)
    if signer is not None:
        signer.sign()
    return Bundle(out)
