"""The sums of a calibration, which merge exactly, and the figures that follow from them. Needs no torch.

D = hidden size, L = decoder layers.
"""

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.files import refuse_special
from capa_export.base.precision import FP16_MAX
from capa_export.bundle.store import digest_of
from capa_export.calibrate.scaled_sets import EFFECT, FfnEffect
from capa_export.config.recipe import FFN

if TYPE_CHECKING:
    from capa_export.model.model import Model

__all__ = [
    "CALIBRATION",
    "ROUNDING",
    "SINK_THRESHOLD",
    "Calibration",
    "LayerSums",
    "check_owner",
    "merged",
    "scales_digest",
    "summed",
]

CALIBRATION = "calibration.safetensors"
ROUNDING = "rounding"
"""Key, in what the stage says, of what was asked for the weights that it measured."""
SINK_THRESHOLD = 20.0
"""phi above which a token is an attention sink (VisAttnSink, arXiv 2503.03321; CAPA uses the same)."""

_CONSISTENT = 0.25
"""A sink channel exceeds the threshold in at least this fraction of the layers."""


@dataclass
class LayerSums:
    """FP64 sums over the visual tokens of one layer; x enters the FFN block, y leaves it."""

    xx: np.ndarray
    """[D] sum of x * x."""
    xy: np.ndarray
    yy: np.ndarray
    visual_tokens: int = 0
    visual_cosine: float = 0.0
    """Sum of cosine(x, y)."""
    text_tokens: int = 0
    text_cosine: float = 0.0
    sinks: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """Channels whose RMS-normed magnitude exceeds the threshold -> visual tokens with exactly those."""

    @classmethod
    def zeros(cls, size: int) -> "LayerSums":
        """Sums over no token; `size` is D."""
        return cls(np.zeros(size), np.zeros(size), np.zeros(size))

    def add(self, others: "LayerSums") -> None:
        """Add the sums over other tokens."""
        for name in (entry.name for entry in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(others, name))

    @property
    def alpha(self) -> np.ndarray:
        """Least-squares scale per channel [D] FP64: sum(x y) / sum(x x), and 1 where x vanishes."""
        degenerate = self.xx <= np.finfo(np.float64).eps * max(float(self.xx.max(initial=0.0)), 1e-30)
        return np.where(degenerate, 1.0, self.xy / np.where(degenerate, 1.0, self.xx))

    @property
    def alpha_spread(self) -> dict[str, float]:
        """Percentiles of alpha over the channels."""
        percentiles = {"min": 0, "p05": 5, "median": 50, "p95": 95, "max": 100}
        return dict(zip(percentiles, np.percentile(self.alpha, list(percentiles.values())).tolist(), strict=True))

    @property
    def cosine(self) -> float:
        """Mean cosine(x, y) of the visual tokens."""
        return self.visual_cosine / max(self.visual_tokens, 1)

    @property
    def relative_error(self) -> float:
        """|| y - alpha x || / || y || over all visual tokens."""
        alpha = self.alpha
        residual = self.yy - 2 * alpha * self.xy + alpha**2 * self.xx
        return float(np.sqrt(max(residual.sum(), 0.0) / max(self.yy.sum(), 1e-30)))


@dataclass(frozen=True)
class Calibration:
    """The sums of every layer and the largest magnitudes, over all samples."""

    checkpoint_digest: str
    """Digest of the weights it was measured on: alpha is wrong for any others."""
    samples: int
    layers: Sequence[LayerSums]
    absmax: dict[str, float]
    """Largest magnitudes by module path: outputs of blocks, attentions, FFNs, norms and projections; inputs of norms
    and projections under `PATH.input`; an attention's `.query`, `.key` and `.value`, rotated, and its `.scores`,
    before the softmax, masked ones too."""

    effect: FfnEffect | None = None
    """What sets of scales do to the answers; None where that was not measured with these sums."""

    @property
    def mean_visual_tokens(self) -> float:
        """Mean number of visual tokens of a sample."""
        return self.layers[0].visual_tokens / max(self.samples, 1)

    def linear_layers(self, eta: float) -> tuple[int, ...]:
        """Layers whose visual FFN a scale may replace: mean cosine above eta."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.cosine > eta)

    def measured(self, ffn: FFN) -> bool:
        """Whether the effect is known by which layers are chosen."""
        return self.effect is not None and self.effect.answers(self.digest(), ffn)

    def scaled_layers(self, ffn: FFN, eta: float | None = None) -> tuple[int, ...]:
        """Layers whose visual FFN a scale replaces: the largest set within the budget.

        Args:
            ffn: the recipe's threshold and budget.
            eta: another threshold, which then decides by cosine alone.

        Raises:
            CapaError: what sets of scales do to the answers was not measured.
        """
        if eta is not None and eta != ffn.eta:
            return self.linear_layers(eta)
        if self.effect is None or not self.measured(ffn):
            raise CapaError(
                f"the calibration does not say what scales cost at eta {ffn.eta:g} and {ffn.budget:g} nats; "
                "run `capa-export calibrate` again with the same recipe"
            )
        return self.effect.chosen.layers

    def alphas(self, layers: Iterable[int]) -> dict[int, np.ndarray]:
        """Layer -> alpha [D] FP64."""
        return {layer: self.layers[layer].alpha for layer in layers}

    @property
    def sink_channels(self) -> tuple[int, ...]:
        """Channels that mark sinks: beyond the threshold in at least a quarter of the layers."""
        counts = Counter(channel for layer in self.layers for channel in {c for dims in layer.sinks for c in dims})
        return tuple(sorted(channel for channel, count in counts.items() if count >= _CONSISTENT * len(self.layers)))

    def sink_tokens(self, layer: int) -> int:
        """Visual tokens of a layer with phi > 20 on a sink channel."""
        channels = set(self.sink_channels)
        return sum(count for dims, count in self.layers[layer].sinks.items() if channels.intersection(dims))

    def summary(self, ffn: FFN) -> dict[str, Any]:
        """The figures that tables and `--json` show: per layer, then ranges and sinks."""
        worst, largest = max(self.absmax.items(), key=lambda item: item[1], default=("", 0.0))
        return {
            "samples": self.samples,
            "visual_tokens": self.layers[0].visual_tokens,
            "eta": ffn.eta,
            "budget": ffn.budget,
            "linear_layers": list(self.linear_layers(ffn.eta)),
            "scaled_layers": list(self.scaled_layers(ffn)) if self.measured(ffn) else None,
            "scales_tried": [one.model_dump(mode="json") for one in self.effect.tried] if self.effect else [],
            "paper_layers": list(ffn.paper_layers),
            "layers": [
                {
                    "layer": index,
                    "cosine_visual": layer.cosine,
                    "cosine_text": layer.text_cosine / max(layer.text_tokens, 1),
                    "relative_error": layer.relative_error,
                    "alpha": layer.alpha_spread,
                    "sink_tokens": self.sink_tokens(index),
                }
                for index, layer in enumerate(self.layers)
            ],
            "sink_channels": list(self.sink_channels),
            "absmax": self.absmax,
            "largest": {"block": worst, "absmax": largest, "of_fp16_max": largest / FP16_MAX},
        }

    def digest(self) -> str:
        """SHA-256 over all sums, counts and magnitudes."""
        sums = [getattr(layer, name).tobytes() for layer in self.layers for name in ("xx", "xy", "yy")]
        return hashlib.sha256(b"".join([*sums, self._about().encode()])).hexdigest()

    def save(self, path: Path) -> None:
        """Write the sums as tensors, and all else as metadata of the same file.

        Raises:
            CapaError: the file cannot be written.
        """
        tensors = {
            f"layers.{index}.{name}": getattr(layer, name)
            for index, layer in enumerate(self.layers)
            for name in ("xx", "xy", "yy")
        }
        try:
            save_file(tensors, path, metadata={"capa_calibration": self._about(), "digest": self.digest()})
        except SafetensorError as error:
            raise CapaError(f"{path}: cannot be written: {error}", ExitCode.EXPORT) from error
        path.chmod(0o644)

    def _about(self) -> str:
        counts = [
            {
                "visual_tokens": layer.visual_tokens,
                "visual_cosine": layer.visual_cosine,
                "text_tokens": layer.text_tokens,
                "text_cosine": layer.text_cosine,
                "sinks": sorted([list(dims), count] for dims, count in layer.sinks.items()),
            }
            for layer in self.layers
        ]
        about = {
            "version": 1,
            "checkpoint_digest": self.checkpoint_digest,
            "samples": self.samples,
            "absmax": self.absmax,
            "layers": counts,
        }
        return json.dumps(about, sort_keys=True)

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read a file that `save` wrote, and the effect beside it.

        Args:
            path: of the file, or of the bundle folder it is in.

        Raises:
            CapaError: the file is missing, damaged, or no calibration.
        """
        has_effect = True
        if path.is_dir():
            from capa_export.bundle.store import Bundle

            bundle = Bundle.open(path)
            has_effect = "effect" in bundle.manifest["stages"]
            bundle.verify("calibrate", *(["effect"] if has_effect else []))
            path /= CALIBRATION
        refuse_special(path)
        beside = path.with_name(EFFECT)
        effect = FfnEffect.load(beside) if has_effect and beside.is_file() else None
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                about = json.loads(metadata["capa_calibration"])
                layers = [
                    LayerSums(
                        *(file.get_tensor(f"layers.{index}.{name}") for name in ("xx", "xy", "yy")),
                        **{key: value for key, value in counts.items() if key != "sinks"},
                        sinks=Counter({tuple(dims): count for dims, count in counts["sinks"]}),
                    )
                    for index, counts in enumerate(about["layers"])
                ]
            calibration = cls(about["checkpoint_digest"], about["samples"], layers, about["absmax"], effect)
            # Calibrations of earlier versions have no digest.
            if metadata.get("digest", calibration.digest()) != calibration.digest():
                raise ValueError("its digest differs from what it holds: it was changed since it was measured")
        except FileNotFoundError as error:
            raise CapaError(f"{path}: no such calibration; `capa-export calibrate` writes one") from error
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise CapaError(f"{path}: not a calibration of capa-export ({error})") from error
        return calibration


def check_owner(calibration: Calibration, model: "Model", path: Path) -> None:
    """Refuse a calibration whose alpha belongs to other weights.

    Raises:
        CapaError: it was measured on another checkpoint.
    """
    if calibration.checkpoint_digest != model.digest:
        raise CapaError(f"{path}: measured on another checkpoint than {model.checkpoint}; calibrate this one")


def merged(parts: Sequence[Calibration]) -> Calibration:
    """One calibration from several runs, whatever their order, since every figure is a sum or a maximum.

    Raises:
        CapaError: the runs are of different checkpoints, or one is given twice.
    """
    parts = sorted(parts, key=Calibration.digest)
    first = parts[0]
    if len({part.digest() for part in parts}) < len(parts):
        raise CapaError("the same calibration is given twice; its samples would count twice")
    if any(part.checkpoint_digest != first.checkpoint_digest for part in parts):
        raise CapaError(
            "calibrations of different checkpoints do not merge, nor those of weights that are rounded otherwise; "
            "`--quantize int4/rtn` rounds alike on every machine"
        )
    return summed(parts)


def summed(
    parts: Iterable[Calibration], before: Calibration | None = None, keep: Callable[[Calibration], None] | None = None
) -> Calibration:
    """Add the calibrations of one checkpoint in the order given.

    Args:
        parts: calibrations; at least one where `before` is None.
        before: the sum of earlier parts.
        keep: called with the sum after each part.
    """
    total = before
    for part in parts:
        if total is None:
            total = copy.deepcopy(part)
        else:
            for sums, others in zip(total.layers, part.layers, strict=True):
                sums.add(others)
            for name, largest in part.absmax.items():
                total.absmax[name] = max(total.absmax.get(name, 0.0), largest)
            total = replace(total, samples=total.samples + part.samples)
        if keep is not None:
            keep(total)
    assert total is not None
    return replace(total, absmax=dict(sorted(total.absmax.items())), effect=None)


def scales_digest(scales: Mapping[int, np.ndarray]) -> str:
    """SHA-256 over the scale [D] of every layer that has one."""
    return digest_of({layer: alpha.tolist() for layer, alpha in scales.items()})
