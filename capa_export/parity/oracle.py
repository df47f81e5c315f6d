"""What is validated: a bundle's graphs beside the eager model they were made from."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from capa_export.config.schedule import Prune
from capa_export.export.graphs import Graphs
from capa_export.model.eager import Eager, EagerPlan
from capa_export.model.families import Family
from capa_export.model.lockstep import RESIDENT, TOGETHER_BYTES, WeightSource, grouped
from capa_export.model.prompt import Prompt, Prompter

__all__ = ["Subject"]

T = TypeVar("T")


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
    fp32_onnx: Path | Graphs
    """The same graphs in FP32, with `DENSE` beside them."""
    eos_token_ids: Sequence[int]
    fp32_layers: Sequence[str] = ()
    """Parts that are computed in FP32 whatever the precision."""
    weights: WeightSource = RESIDENT
    """What gives the model's parts theirs."""

    @property
    def eager(self) -> Eager:
        """The model, run by hand."""
        return Eager(self.model, self.weights)

    def grouped(self, prompted: Iterable[tuple[Prompt, T]], *, answers: int) -> Iterator[list[tuple[Prompt, T]]]:
        """Prompts, with whatever comes along, in groups that go through the model together: alone if it is in memory.

        Args:
            prompted: in order.
            answers: caches of each prompt that are held at once.
        """
        size = answers * self._bytes_per_token()
        limit = 0 if self.weights is RESIDENT else TOGETHER_BYTES
        return grouped(prompted, lambda one: size * len(one[0].input_ids), limit)

    def _bytes_per_token(self) -> int:
        """Of keys and values of all layers in FP32."""
        config = self.model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim

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
