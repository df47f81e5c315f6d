"""A bundle alone: what it says of its model, and whether this machine has room to run it."""

from dataclasses import replace
from typing import Any

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError
from capa_export.base.machine import available_memory
from capa_export.base.weight_types import PackedLayers
from capa_export.bundle.store import ONNX, Bundle
from capa_export.config.pixels import PixelBounds
from capa_export.config.recipe import recipe_of
from capa_export.model.checkpoint import fetch_config
from capa_export.model.families import load_family
from capa_export.model.processors.resolved import PROCESSORS, read_processors
from capa_export.model.prompt import Prompter
from capa_export.plan.device_memory import onnx_runtime_bytes

__all__ = ["bundled_bounds", "bundled_dims", "bundled_prompter", "require_memory"]


def bundled_bounds(
    bundle: Bundle, min_pixels: int | None, max_pixels: int | None, *, engine: str | None = None
) -> PixelBounds:
    """Between what it resizes pictures, with the command line's choices in place.

    Args:
        bundle: the bundle.
        min_pixels: in place of its own.
        max_pixels: in place of its own.
        engine: target whose engines are run; their limits hold, too, whichever target the bundle was made for.

    Raises:
        CapaError: there is no such size, or there are no such engines.
    """
    recorded = recipe_of(bundle.manifest, bundle.folder).pictures
    # Of engines that were built when this was not recorded, the bundle's limits are all that is known.
    limits = None if engine is None else bundle.stage(f"engine/{engine}")["result"].get("pictures", {})
    return recorded.for_bundle(min_pixels, max_pixels, engine=limits)


def bundled_dims(bundle: Bundle) -> ModelDims[Any]:
    """The dimensions of a bundle's model.

    Raises:
        CapaError: the config cannot be read, or is another model's.
    """
    folder = bundle.folder / ONNX / "llm"
    family = load_family(recipe_of(bundle.manifest, bundle.folder).family)
    dims = family.model_dims(fetch_config(str(folder)), where=str(folder / "config.json"))
    packing = bundle.manifest["stages"].get("export", {}).get("result", {}).get("packing") or {}
    packed, head, plain = None, packing.get("head"), len(packing.get("plain", ()))
    if packing.get("packed"):
        kind = packing.get("type", "int4")
        # An earlier version did not say it.
        packed = PackedLayers(kind=kind, group=packing["group"], has_zeros=packing.get("zeros", kind == "int4"))
    packed_head = None if head is None else PackedLayers(kind=head["type"], group=head["group"])
    tower = packing.get("vision")
    packed_vision = None if tower is None else PackedLayers(kind=tower["type"], group=None)
    decoder = replace(dims.decoder, packed=packed, num_plain=plain, packed_head=packed_head)
    return replace(dims, decoder=decoder, packed_vision=packed_vision)


def bundled_prompter(bundle: Bundle, *, bounds: PixelBounds | None = None, trust_remote_code: bool = False) -> Prompter:
    """The bundle's tokenizer, chat template and image processor; `bounds` of pictures take the place of the bundle's.

    Transformers is imported only where the bundle needs it.

    Raises:
        CapaError: a file is missing, or does not load.
    """
    folder = bundle.folder / ONNX
    recipe = recipe_of(bundle.manifest, bundle.folder)
    return Prompter(
        *(folder / "llm", folder / "visual", load_family(recipe.family), bundled_dims(bundle)),
        bounds=recipe.pictures if bounds is None else bounds,
        trust_remote_code=trust_remote_code,
        processors=read_processors(folder / PROCESSORS),
    )


def require_memory(*bundles: Bundle, copies: int = 1) -> None:
    """Refuse, before they are loaded, bundles that ONNX Runtime has no room for on this machine.

    Args:
        bundles: whose graphs are loaded side by side.
        copies: processes that load them.

    Raises:
        CapaError: they take more memory than is available, or nothing was exported, or a file of it was changed.
    """
    for bundle in bundles:
        bundle.verify("export", weights=False)
    needed = copies * sum(onnx_runtime_bytes(bundled_dims(bundle)) for bundle in bundles)
    available = available_memory()
    if needed > available:
        remedy = "use fewer --workers" if copies > 1 else "end other programs, or use a machine with more"
        raise CapaError(
            f"{' and '.join(str(bundle.folder) for bundle in bundles)}: running the graphs takes {needed / 1e9:.1f} GB "
            f"of memory, {available / 1e9:.1f} GB are available; {remedy}"
        )
