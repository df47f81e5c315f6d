"""How large pictures are seen: what the user bounds, what a device takes, and what an image processor is told of it."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import Settings
from capa_export.config.target import Target, load_target

__all__ = ["PROCESSOR_FILES", "PixelBounds", "processor_settings", "stored_settings", "whole_numbers"]

_USUAL_TARGET = "rtx"
"""The command line's own default."""
_DIMS = ("rows", "cols", "tiles")
"""Of the vision graphs' inputs, as targets limit them."""
_SETTINGS = (
    *("kind", "do_resize", "size", "patch_size", "merge_size", "temporal_patch_size"),
    *("min_patches", "max_patches", "crop_size", "pad_size"),
)
_SIZES = ("size", "crop_size", "pad_size")
_MOST_SIDE = 4096
"""Pixels of a side that an image processor makes: four times the largest that is published."""
_MOST_AREA = 1 << 25
"""Pixels that a picture is enlarged to at least: above the 25 megapixels of the largest published setting."""
_MOST_PATCHES = {"patch_size": 256, "merge_size": 16, "temporal_patch_size": 16, "min_patches": 256, "max_patches": 256}
"""Five times what is published, and more."""
_SECTIONS = (("processor_config.json", "image_processor"), ("preprocessor_config.json", None))
"""Where an image processor's settings are stored, the first that has any, and under which key."""
PROCESSOR_FILES = tuple(name for name, _ in _SECTIONS)
"""Where an image processor's settings are stored."""


class PixelBounds(Settings):
    """Between what a picture is resized to; the image processor's own bounds hold where these are silent."""

    min_pixels: int | None = Field(default=None, ge=1)
    """Least area, in place of the image processor's."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Largest area, in place of the image processor's."""
    max_rows: int | None = Field(default=None, ge=1)
    """Visual tokens on top of each other, where the vision tower takes pictures of any shape."""
    max_cols: int | None = Field(default=None, ge=1)
    """Visual tokens side by side."""
    max_tiles: int | None = Field(default=None, ge=1)
    """Tiles of a picture, its thumbnail among them, where the vision tower takes tiles."""

    @model_validator(mode="after")
    def _ordered(self) -> "PixelBounds":
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        return self

    def with_options(self, min_pixels: int | None, max_pixels: int | None) -> "PixelBounds":
        """These with the command line's choices in place.

        Raises:
            CapaError: there is no such size.
        """
        given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        for name, value in given.items():
            if value is not None and value < 1:
                raise CapaError(f"--{name.replace('_', '-')} {value}: must be above 0", ExitCode.USAGE)
        changed = self.model_copy(update={name: value for name, value in given.items() if value is not None})
        least, most = changed.min_pixels, changed.max_pixels
        if least is not None and most is not None and least > most:
            raise CapaError(f"--min-pixels {least} is above --max-pixels {most}", ExitCode.USAGE)
        return changed

    def on_target(self, target: Target | None = None) -> "PixelBounds":
        """These with what a target's engines take.

        Where it has none, pictures are as large as the usual target takes them, unless the user says how large.
        """
        engine = target.engine if target is not None else None
        if engine is None:
            if self.max_pixels is not None:
                return self
            engine = load_target(_USUAL_TARGET).require_engine()
        return self.within({f"max_{name}": engine.dims[name].max for name in _DIMS if name in engine.dims})

    def within(self, limits: Mapping[str, int]) -> "PixelBounds":
        """These where they are below the limits, by name, and else the limits."""
        own = {name: getattr(self, name) for name in limits}
        return self.model_copy(update={name: min(limit, own[name] or limit) for name, limit in limits.items()})

    def for_bundle(
        self, min_pixels: int | None, max_pixels: int | None, *, engine: Mapping[str, int] | None = None
    ) -> "PixelBounds":
        """These of a bundle with the command line's choices.

        Without an engine, the largest area that is asked for takes the place of the target's limits.

        Args:
            min_pixels: in place of the bundle's.
            max_pixels: in place of the bundle's.
            engine: limits of the engine that is run, by name; None where none is.

        Raises:
            CapaError: there is no such size.
        """
        changed = self.with_options(min_pixels, max_pixels)
        if engine is not None:
            return changed.within(engine)
        if max_pixels is None:
            return changed
        return PixelBounds(min_pixels=changed.min_pixels, max_pixels=changed.max_pixels)

    @property
    def lifted(self) -> str:
        """What would lift the target's limits, for messages."""
        without = "; where no engine runs, --max-pixels lifts them" if self.max_pixels is None else ""
        return f"a target with wider limits{without}"

    def refuse(self, reason: str) -> None:
        """Refuse bounds of the area that a model cannot keep.

        Raises:
            CapaError: there are some.
        """
        for option, value in (("--min-pixels", self.min_pixels), ("--max-pixels", self.max_pixels)):
            if value is not None:
                raise CapaError(f"{option} {value}: {reason}", ExitCode.USAGE)


def processor_settings(image_processor: Any) -> dict[str, Any]:
    """What a loaded image processor says of sizes.

    Raises:
        CapaError: no published one says anything like it, and a picture would not fit into memory.
    """
    found = {name: getattr(image_processor, name, None) for name in _SETTINGS}
    settings = whole_numbers(
        {
            name: dict(value) if name in _SIZES and not isinstance(value, int) else value
            for name, value in found.items()
            if value is not None
        }
    )
    _check_sizes(settings)
    return settings


def stored_settings(files: Mapping[str, Any]) -> dict[str, Any]:
    """The same from an image processor's files, by name, as transformers reads them.

    Args:
        files: parsed; what is not there is left out.
    """
    sections = [files.get(name, {}) if key is None else files.get(name, {}).get(key) for name, key in _SECTIONS]
    stored = whole_numbers(next((section for section in sections if section and isinstance(section, dict)), {}))
    _check_sizes(stored)
    found = {name: stored[name] for name in _SETTINGS if isinstance(stored.get(name), int)}
    edges = stored.get("size")
    size = {key: value for key, value in edges.items() if isinstance(value, int)} if isinstance(edges, dict) else {}
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if isinstance(stored.get(name), int):
            size[edge] = stored[name]
    return {**found, "size": size}


def _check_sizes(settings: Mapping[str, Any]) -> None:
    """Refuse settings by which any picture would become too large."""
    told = dict(settings)
    limits = dict(_MOST_PATCHES)
    areas = "merge_size" in settings and settings.get("kind", "patches") == "patches"
    for name in _SIZES:
        sides = settings.get(name)
        # Some publish one number for both sides.
        for key, value in sides.items() if isinstance(sides, Mapping) else [("", sides)]:
            by_area = areas and key in ("shortest_edge", "longest_edge", "min_pixels", "max_pixels")
            told[f"{name}.{key}"] = value
            limits[f"{name}.{key}"] = _MOST_AREA if by_area else _MOST_SIDE
    if areas:
        # A picture is never enlarged to its most.
        limits.pop("size.longest_edge", None)
    for name, most in limits.items():
        value = told.get(name)
        if isinstance(value, int) and value > most:
            raise CapaError(
                f"preprocessor_config.json: {name.rstrip('.')} is {value}, and at most {most} is supported; use the "
                "file that was published with the weights"
            )


def whole_numbers(value: Any) -> Any:
    """The value, with whole numbers as such where they are written as floating-point ones, which transformers takes."""
    if isinstance(value, dict):
        return {key: whole_numbers(part) for key, part in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value
