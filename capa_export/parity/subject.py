"""What is validated: a bundle's graphs beside the eager model they were made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capa_export.eager import EagerPlan
from capa_export.families import Family
from capa_export.prompt import Prompt, Prompter
from capa_export.recipe import Prune

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """What is validated, and all that it takes."""

    model: Any
    """The Hugging Face model in FP32."""
    family: Family
    prompter: Prompter
    prune: Prune
    scales: Mapping[int, np.ndarray]
    precision: str
    onnx: Path
    """The bundle's `onnx` folder."""
    fp32_onnx: Path
    """The same graphs in FP32, with `DENSE` beside them."""
    eos_token_ids: Sequence[int]
    fp32_layers: Sequence[str] = ()
    """Parts that are computed in FP32 whatever the precision."""

    @property
    def pruned_by(self) -> str:
        """What chooses the tokens, for people."""
        names = list(dict.fromkeys(chosen.name for chosen in self.prune.selectors.values()))
        return "CAPA" if names == ["capa"] else " and ".join(names)

    def num_keep(self, prompt: Prompt) -> list[int]:
        """Visual tokens kept after each stage."""
        return self.prune.num_keep(prompt.image_lengths)

    def plan(self, prompt: Prompt) -> EagerPlan:
        """CAPA as the bundle does it."""
        keep = {stage.layer: count for stage, count in zip(self.prune.schedule, self.num_keep(prompt), strict=True)}
        scales = {layer: torch.from_numpy(alpha).float() for layer, alpha in self.scales.items()}
        return EagerPlan(keep, scales, self.prune.selectors, min_keep_per_image=self.prune.min_keep_per_image)
