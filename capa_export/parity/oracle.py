"""The oracle of a validation: the eager model that a bundle was made from, pruned as the bundle is."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from capa_export.config.schedule import Prune
from capa_export.export.graphs import Graphs
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerPlan
from capa_export.model.families import Family
from capa_export.model.lockstep import RESIDENT, WeightSource
from capa_export.model.prompt import Prompt, Prompter

__all__ = ["Oracle"]

T = TypeVar("T")


@dataclass(frozen=True)
class Oracle:
    """The eager model of a bundle, its pruning, and the graphs to hold against it."""

    model: Any
    """The Hugging Face model in FP32."""
    family: Family
    prompter: Prompter
    prune: Prune
    scales: Mapping[int, np.ndarray]
    precision: str
    onnx: Path
    """The bundle's `onnx` folder."""
    fp32_onnx: Path | Graphs
    """The reference graphs: the bundle's in FP32, with `DENSE` beside them."""
    eos_token_ids: Sequence[int]
    fp32_layers: Sequence[str] = ()
    """Parts that are computed in FP32 in every precision, as `--fp32-layers` names them."""
    weights: WeightSource = RESIDENT
    """Source of the weights of the model's parts."""

    @property
    def eager(self) -> Eager:
        """The model, run layer by layer."""
        return Eager(self.model, self.weights)

    def grouped(self, prompted: Iterable[tuple[Prompt, T]], *, answers: int) -> Iterator[list[tuple[Prompt, T]]]:
        """Group prompts that go through the model together; one by one where the model is in memory.

        Args:
            prompted: prompts in order, each with any other value.
            answers: number of caches held at once for each prompt.
        """
        return self.eager.grouped(prompted, lambda one: len(one[0].input_ids), caches=answers)

    @property
    def pruned_by(self) -> str:
        """The names of the selectors, for people."""
        names = list(dict.fromkeys(chosen.name for chosen in self.prune.selectors.values()))
        return "CAPA" if names == ["capa"] else " and ".join(names)

    def num_keep(self, prompt: Prompt) -> list[int]:
        """Number of visual tokens kept after each stage."""
        return self.prune.num_keep(prompt.image_lengths)

    def plan(self, prompt: Prompt) -> EagerPlan:
        """The eager plan of the bundle's pruning for one prompt."""
        keep = {stage.layer: count for stage, count in zip(self.prune.schedule, self.num_keep(prompt), strict=True)}
        scales = {layer: torch.from_numpy(alpha).float() for layer, alpha in self.scales.items()}
        return EagerPlan(keep, scales, self.prune.selectors, min_keep_per_image=self.prune.min_keep_per_image)
