"""Activation-aware weight quantization (AWQ, arXiv 2306.00978): factors that weights have while they are rounded.

T = prompt tokens, R = tokens kept of all prompts, I = inputs of a product, O = its outputs.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capa_export.base.progress import Report, silent
from capa_export.base.weight_types import PackedLayers
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerPlan, inputs_for
from capa_export.model.families import Family
from capa_export.model.lockstep import TOGETHER_BYTES, Part, Pass, WeightSource, grouped
from capa_export.model.prompt import Prompt
from capa_export.model.quantized.choice import PLACES, WeightChoice, layer_name
from capa_export.model.quantized.rounded import as_rounded
from capa_export.model.source import Source
from capa_export.model.streamed import StoredWeights, hollow_model

__all__ = ["Activations", "best_factors", "choose_factors", "relative_error"]

_STEPS = 20
"""Exponents that are tried: 0, 0.05 ... 0.95. The first is rounding to nearest."""
_SMALLEST = 1e-4
"""The smallest factor before all of them are centred, for inputs that are always zero."""
_KEPT = 256
"""Tokens of all prompts on which errors are measured."""
_OUTPUTS = 1024
"""Outputs of a product on which errors are measured, at most."""
_OUTPUT_PROJECTION = "self_attn.o_proj"
"""Nothing is divided before it, so that it is rounded to nearest."""


@dataclass
class Activations:
    """What enters the products that read one tensor, over all prompts."""

    sums: Tensor | None = None
    """[I] in FP64: sum of magnitudes over all tokens."""
    tokens: int = 0
    kept: list[Tensor] = field(default_factory=list[Tensor])
    """[-, I] in FP32: the inputs of some tokens of each prompt."""

    def add(self, inputs_TI: Tensor, kept: int) -> None:
        """Add a prompt, and keep about so many of its tokens, spread evenly; the last is among them."""
        sums = inputs_TI.abs().sum(0, dtype=torch.float64)
        self.sums = sums if self.sums is None else self.sums + sums
        self.tokens += len(inputs_TI)
        stride = -(-len(inputs_TI) // kept)
        self.kept.append(inputs_TI[torch.arange(len(inputs_TI) - 1, -1, -stride)])

    @property
    def mean(self) -> Tensor:
        """Mean magnitude of every input, [I] in FP32."""
        assert self.sums is not None
        return (self.sums / self.tokens).float()

    @property
    def rows(self) -> Tensor:
        """The tokens that were kept, [R, I]."""
        return torch.cat(self.kept)


def choose_factors(
    source: Source,
    prompts: Iterable[Prompt],
    form: PackedLayers,
    *,
    scales: bool = True,
    plan: Callable[[Prompt], EagerPlan] = lambda _: EagerPlan(),
    report: Report = silent,
) -> WeightChoice:
    """Choose the factors of all layers, and measure what rounding does to each layer's products.

    The plain model runs on all prompts at once, one layer after the other, and holds the weights of one.

    Args:
        source: the checkpoint with its weights plain.
        prompts: what the model is to see; those that fit into memory together are looked at.
        form: the type, and the inputs that share a scale.
        scales: whether factors are looked for at all, or errors of rounding to nearest only measured.
        plan: what is pruned of a prompt meanwhile; nothing by default.
        report: told the progress.

    Raises:
        CapaError: a tensor is missing.
    """
    weights = StoredWeights(source, report)
    model = hollow_model(source, weights)
    search = _Search(weights, form, scales)
    eager = Eager(model, search)
    size = eager.bytes_per_token
    chosen = next(iter(grouped(prompts, lambda prompt: size * len(prompt.input_ids), TOGETHER_BYTES)))
    search.kept = -(-_KEPT // len(chosen))
    with torch.inference_mode():
        passes = (_seeing(eager, source.family, prompt, plan(prompt)) for prompt in chosen)
        eager.run([search.following(number, one) for number, one in enumerate(passes)])
    return WeightChoice(factors=search.factors, errors=tuple(search.errors))


def _seeing(eager: Eager, family: Family, prompt: Prompt, plan: EagerPlan) -> Pass[None]:
    """The pass of a prompt through the model."""
    yield "tower"
    inputs = inputs_for(plan, family, eager.model, prompt)
    yield from eager.prefilling(inputs, torch.from_numpy(prompt.is_visual), plan)


@dataclass
class _Search:
    """Gives each layer its weights, and looks for its factors when all prompts have been through it."""

    weights: WeightSource
    form: PackedLayers
    scales: bool
    kept: int = 0
    """Tokens that are kept of every prompt."""
    number: int = 0
    """Of the prompt that is on its way."""
    factors: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict[str, Any])
    errors: list[float] = field(default_factory=list[float])

    def following(self, number: int, work: Pass[None]) -> Pass[None]:
        """A prompt's pass, whose steps are known as such."""
        for part in work:
            yield part
            self.number = number

    @contextmanager
    def holding(self, model: Any, part: Part) -> Generator[None]:
        with self.weights.holding(model, part):
            if not isinstance(part, int):
                yield
                return
            layer = model.model.language_model.layers[part]
            with self._watching(layer) as entered:
                yield
            self._choose(part, layer, entered)

    def holding_all(self, model: Any) -> AbstractContextManager[object]:
        raise NotImplementedError

    @contextmanager
    def _watching(self, layer: Any) -> Generator[Mapping[str, Activations]]:
        """What enters the products of a layer, by the first that reads it."""
        entered = {readers[0]: Activations() for readers in (*PLACES.values(), (_OUTPUT_PROJECTION,))}

        def watch(name: str) -> Any:
            def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
                found = entered[name]
                # Scores of tokens run projections of a layer once more.
                if len(found.kept) == self.number:
                    found.add(inputs[0][0].float(), self.kept)

            return layer.get_submodule(name).register_forward_pre_hook(hook)

        handles = [watch(name) for name in entered]
        try:
            yield entered
        finally:
            for handle in handles:
                handle.remove()

    def _choose(self, index: int, layer: Any, entered: Mapping[str, Activations]) -> None:
        errors: list[float] = []
        for divided, readers in chain(PLACES.items(), [(None, (_OUTPUT_PROJECTION,))]):
            whole = [layer.get_submodule(reader).weight for reader in readers]
            weights = [weight[:: -(-len(weight) // _OUTPUTS)] for weight in whole]
            found = entered[readers[0]]
            factors = torch.ones_like(found.mean)
            if self.scales and divided is not None:
                factors = best_factors(weights, found, self.form)
                self.factors[layer_name(index, divided)] = factors.numpy()
            errors += [relative_error(weight, factors, found.rows, self.form) for weight in weights]
        self.errors.append(fmean(errors))


def best_factors(weights: Sequence[Tensor], activations: Activations, form: PackedLayers) -> Tensor:
    """The factors [I] with which rounding changes the outputs least, among powers of the inputs' mean magnitudes.

    Args:
        weights: [O, I] each, of the products that read these inputs.
        activations: the inputs.
        form: the type, and the inputs that share a scale.
    """
    mean_I, rows_RI = activations.mean, activations.rows
    best, least = torch.ones_like(mean_I), float("inf")
    for step in range(_STEPS):
        factors_I = mean_I.pow(step / _STEPS).clamp_min(_SMALLEST)
        factors_I /= (factors_I.max() * factors_I.min()).sqrt()
        loss = sum(_squared_error(weight, factors_I, rows_RI, form) for weight in weights)
        if loss < least:
            best, least = factors_I, loss
    return best


def relative_error(weight_OI: Tensor, factors_I: Tensor, rows_RI: Tensor, form: PackedLayers) -> float:
    """|x W' - x W|^2 / |x W|^2, where W' was rounded with these factors."""
    whole = float((rows_RI @ weight_OI.T).square().sum(dtype=torch.float64))
    return _squared_error(weight_OI, factors_I, rows_RI, form) / max(whole, 1e-30)


def _squared_error(weight_OI: Tensor, factors_I: Tensor, rows_RI: Tensor, form: PackedLayers) -> float:
    rounded_OI = torch.from_numpy(as_rounded((weight_OI * factors_I).numpy(), form))
    change_OI = rounded_OI.div_(factors_I).sub_(weight_OI)
    return float((rows_RI @ change_OI.T).square().sum(dtype=torch.float64))
