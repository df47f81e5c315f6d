"""What users ask of a build and of a validation, beside the recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from capa_export.base.precision import Precision
from capa_export.base.workers import Workers
from capa_export.config.plugins import PluginWish
from capa_export.config.provider import Provider
from capa_export.config.weights import WeightsWish

__all__ = ["BuildOptions", "ValidationOptions"]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How a build is to be done."""

    images: Path | None = None
    """Pictures and questions of calibration and validation; the recipe's scenes where there are none."""
    samples: int | None = None
    """Prompts of the calibration, in place of the recipe's number."""
    calibration: Path | None = None
    """A calibration finished elsewhere, in place of a run: a file, or a bundle folder."""
    layer_by_layer: bool | None = None
    """Whether to calibrate and validate with one layer's weights in memory; None where the models do not fit."""
    workers: Workers = field(default_factory=Workers)
    """Where the calibration runs."""
    precision: Precision = "fp16"
    """Of weights and activations."""
    ffn: bool = True
    """Whether linear FFNs of visual tokens become a scale."""
    weights: WeightsWish = "auto"
    """Where engines find theirs."""
    memory: int | None = None
    """Bytes of the device that runs the bundle, where one of the target's is meant."""
    plugins: PluginWish = "auto"
    plugin_library: Path | None = None
    in_place: bool = False
    """Whether the ONNX files read the checkpoint's own shards instead of a copy."""
    auto_fp32: bool = False
    """Whether to put in FP32 what the bisection of a failed validation finds, and to validate again."""
    command: Sequence[str] = ()
    """The command line, for the manifest."""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """How a bundle is to be validated."""

    images: Path | None = None
    """Pictures and questions; the recipe's scenes where there are none."""
    layer_by_layer: bool | None = None
    """Whether to run with one layer's weights in memory; None where the models do not fit."""
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
    note: str | None = None
    """A sentence on whose gates these are, for the report."""
    strict: bool = False
    """Whether warnings are failures."""
    accept_method_loss: bool = False
    """Whether the bundle is fit to ship whatever the method does to the answers."""
    bisect: bool = False
    """Whether to look for the place where an artefact that failed leaves the eager model."""
    store_golden: int = 0
    """Samples to leave in the bundle."""
    provider: Provider = "cpu"
    """Of ONNX Runtime, which runs the graphs."""
