"""The search for factors: what it finds is the best of its grid, and better than rounding weights as they are."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capa_export.base.weight_types import PackedLayers
from capa_export.calibrate.activation_aware import Activations, best_factors, choose_factors, relative_error
from capa_export.config.recipe import load_recipe
from capa_export.data.samples import samples_from
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.eager_plan import EagerInputs
from capa_export.model.families import load_family
from capa_export.model.prompt import Prompter
from capa_export.model.quantized.choice import PLACES, layer_name
from capa_export.model.source import Source
from tests.conftest import noise
from tests.models import FAMILIES

GROUP = 32
FORM = PackedLayers(kind="int4", group=GROUP)


def rounded(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A weight [out, in] rounded group by group, in FP64 but for the scales."""
    found = np.empty_like(weight)
    for row in range(weight.shape[0]):
        for at in range(0, weight.shape[1], GROUP):
            own = weight[row, at : at + GROUP]
            scale = torch.tensor(np.float32(np.abs(own).max()) / np.float32(7)).bfloat16().half()
            step = max(float(scale), 2.0**-14)
            found[row, at : at + GROUP] = step * np.clip(np.rint(own / step), -7, 7)
    return found


def with_outliers(seed: int) -> tuple[list[torch.Tensor], Activations, np.ndarray[Any, Any]]:
    """Two weights, and prompts of which four inputs are large."""
    random = torch.Generator().manual_seed(seed)
    weights = [torch.randn(outputs, 64, generator=random) for outputs in (24, 40)]
    activations, given = Activations(), []
    size = torch.ones(64)
    size[[3, 17, 40, 41]] = 20.0
    for length in (30, 50):
        inputs = torch.randn(length, 64, generator=random) * size
        activations.add(inputs, 10)
        given.append(inputs)
    return weights, activations, torch.cat(given).double().numpy()


def test_the_factors_are_those_of_the_least_error_among_powers_of_mean_magnitudes() -> None:
    weights, activations, every = with_outliers(0)
    rows = np.concatenate([every[29::-3], every[:29:-5]])
    mean = np.abs(every).mean(0)
    losses = list[tuple[float, np.ndarray[Any, Any]]]()
    for step in range(20):
        factors = np.maximum(mean ** (step / 20), 1e-4)
        factors /= np.sqrt(factors.max() * factors.min())
        changes = [rounded(weight.double().numpy() * factors) / factors - weight.double().numpy() for weight in weights]
        losses.append((sum(float(((rows @ change.T) ** 2).sum()) for change in changes), factors))
    best = int(np.argmin([loss for loss, _ in losses]))
    assert 0 < best < 19 and losses[best][0] < 0.5 * losses[0][0]
    found = best_factors(weights, activations, FORM)
    assert np.allclose(found.numpy(), losses[best][1], rtol=1e-4)
    errors = [relative_error(weight, found, torch.from_numpy(rows).float(), FORM) for weight in weights]
    whole = [float(((rows @ weight.double().numpy().T) ** 2).sum()) for weight in weights]
    lost = sum(error * size for error, size in zip(errors, whole, strict=True))
    assert lost == pytest.approx(losses[best][0], rel=1e-3)


def test_inputs_that_are_always_zero_have_finite_factors() -> None:
    weights, activations, _ = with_outliers(1)
    activations.kept = [rows.index_fill(1, torch.arange(8), 0) for rows in activations.kept]
    assert activations.sums is not None
    activations.sums[:8] = 0
    found = best_factors(weights, activations, FORM)
    assert found.isfinite().all() and (found > 0).all() and found.max() * found.min() == pytest.approx(1, rel=1e-4)


def note(seen: list[torch.Tensor], _module: object, inputs: tuple[torch.Tensor, ...]) -> None:
    seen.append(inputs[0][0].abs())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_place_of_every_family_has_factors_of_what_its_readers_are_given(name: str, tmp_path: Path) -> None:
    made = FAMILIES[name]
    model = made.random_model()
    folder = made.save_model(tmp_path / "checkpoint", model)
    source = Source.of(open_checkpoint(str(folder)), load_family(name))
    prompter = Prompter(folder, folder, source.family, source.dims)
    for index in range(3):
        noise(56 + 56 * index, 84, index).save(tmp_path / f"{index}.png")
    samples = samples_from(tmp_path, load_recipe("qwen25vl"), 3, split="train")
    prompts = [prompter.chat(sample.turns) for sample in samples]
    choice = choose_factors(source, prompts, FORM)
    names = {layer_name(index, module) for index in range(source.dims.decoder.num_layers) for module in PLACES}
    assert set(choice.factors) == names and len(choice.errors) == source.dims.decoder.num_layers
    again = choose_factors(source, prompts, FORM)
    assert again.digest() == choice.digest() and again.errors == choice.errors
    nearest = choose_factors(source, prompts, FORM, scales=False)
    assert not nearest.factors
    assert sum(choice.errors) < sum(nearest.errors)

    # The means are those that a hook on the Hugging Face model's own forward pass sees.
    sums: dict[str, list[torch.Tensor]] = {}
    layer = model.model.language_model.layers[2].eval()
    for reader in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"):
        layer.get_submodule(reader).register_forward_pre_hook(partial(note, sums.setdefault(reader, [])))
    with torch.no_grad():
        for prompt in prompts:
            inputs = EagerInputs.of(source.family.eager_inputs(model, prompt))
            model.model.language_model(**inputs.arguments(torch.from_numpy(prompt.is_visual)), use_cache=False)
    for module, readers in PLACES.items():
        mean = torch.cat(sums[readers[0]]).mean(0)
        own = torch.from_numpy(choice.factors[layer_name(2, module)]).log()
        line = mean.log() - mean.log().mean()
        exponent = (own * line).sum() / line.square().sum()
        assert torch.allclose(own - own.mean(), exponent * line, atol=1e-3), module
