"""The problems that kernels are measured on: each operator at the sizes of real models, and its reference result."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from capa_export.kernels import contribution_score, token_gather, topk_keep, visual_scale
from capa_export.kernels.operator import Operator

__all__ = ["HALVES", "SIZES", "Problem", "problems"]

_MODULES = (contribution_score, topk_keep, token_gather, visual_scale)

SIZES: Mapping[str, Mapping[str, int]] = {
    "Qwen2.5-VL-7B": {"hidden_size": 3584, "heads": 28, "kv_heads": 4, "tokens": 1072, "kept": 304},
    "LLaVA-1.5-7B": {"hidden_size": 4096, "heads": 32, "kv_heads": 32, "tokens": 624, "kept": 192},
    "Qwen2.5-VL-7B, 16k": {"hidden_size": 3584, "heads": 28, "kv_heads": 4, "tokens": 16432, "kept": 4144},
}
"""Sizes of each model; 48 tokens are text, and a head has 128 elements."""

_RTOL = {"ContributionScore": 4e-6}
"""Relative tolerances, as in the tests: scores are FP32 sums in another order; all else is equal to the bit."""

HALVES: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    """One operator with random inputs of one size."""

    module: Any
    model: str
    sizes: Mapping[str, int]
    half: str
    device: str = "cuda"

    @property
    def name(self) -> str:
        dtype = f", {self.half}" if self.has_real else ""
        return f"{self.operator.name}, {self.model}{dtype}"

    @property
    def operator(self) -> Operator:
        return self.module.OPERATOR

    @property
    def has_real(self) -> bool:
        return any(tensor.dtype == "real" for tensor in self.operator.inputs.values())

    @cached_property
    def size(self) -> Any:
        """Every size by name."""
        given = {"batch": 1, "num_text": 48, "head_size": 128, **self.sizes}
        width = given["head_size"]
        return SimpleNamespace(projection=given["heads"] * width, rotary_size=width // 2, **given)

    @cached_property
    def attributes(self) -> dict[str, float]:
        values = {"scale": self.size.head_size**-0.5, "min_keep_per_image": 1}
        return {name: values[name] for name in self.operator.attributes}

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Contiguous, with batch axis; text is spread over the prompt."""
        generator = torch.Generator(self.device).manual_seed(0)

        def positions(count: int) -> torch.Tensor:
            order = torch.randperm(self.size.tokens, generator=generator, device=self.device)
            return order[:count].sort().values[None]

        def random(name: str) -> torch.Tensor:
            tensor = self.operator.inputs[name]
            shape = [one if isinstance(one, int) else getattr(self.size, one) for one in tensor.shape]
            if name in self.operator.value_inputs:
                return torch.tensor([getattr(self.size, self.operator.value_inputs[name])])
            if tensor.dtype == "int64":
                return positions(shape[-1])
            values = torch.randn(shape, generator=generator, device=self.device)
            if tensor.dtype == "real":
                return values.to(HALVES[self.half])
            return values.index_fill(1, positions(self.size.num_text)[0], torch.inf)

        return {name: random(name) for name in self.operator.inputs}

    @cached_property
    def graph_inputs(self) -> dict[str, Any]:
        """Inputs and attributes as the node has them, sizes as numbers."""
        given: dict[str, Any] = dict(self.attributes)
        for name, tensor in self.inputs.items():
            without_batch = len(self.operator.inputs[name].graph_shape) < tensor.ndim
            given[name] = tensor[0] if without_batch else tensor
        return given | {name: int(self.inputs[name]) for name in self.operator.value_inputs}

    def check(self, outputs: Any) -> None:
        """Refuse outputs, with or without batch axis, that are not the reference's.

        Raises:
            AssertionError: they are not.
        """
        expected = self.module.reference(*self.inputs.values(), **self.attributes)
        many, own = ((one if isinstance(one, tuple) else (one,)) for one in (expected, outputs))
        rtol = _RTOL.get(self.operator.name, 0)
        for name, wanted, output in zip(self.operator.outputs, many, own, strict=True):
            torch.testing.assert_close(
                output.reshape(wanted.shape), wanted, rtol=rtol, atol=0, equal_nan=True, msg=f"{name}: {{}}".format
            )


def problems(device: str = "cuda", sizes: Mapping[str, Mapping[str, int]] = SIZES) -> Iterator[Problem]:
    """Every operator at every size, in both halves where it has any."""
    for model, of_model in sizes.items():
        for half in HALVES:
            for module in _MODULES:
                problem = Problem(module, model, of_model, half, device)
                if problem.has_real or half == "fp16":
                    yield problem
