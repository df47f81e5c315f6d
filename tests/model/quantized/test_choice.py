"""Factors of weights, put into the norms and products before them: the model computes what it did."""

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from capa_export.base.errors import CapaError
from capa_export.base.weight_types import PackedLayers
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.quantized.choice import CHOICE, PLACES, WeightChoice, layer_name, scaled
from capa_export.model.quantized.rounded import rounded
from capa_export.model.source import Source
from capa_export.model.streamed import read_model
from tests.models import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    made: Any = FAMILIES[request.param]
    folder = made.save_model(tmp_path_factory.mktemp(request.param), made.random_model())
    return Source.of(open_checkpoint(str(folder)), load_family(request.param))


def drawn(source: Source) -> WeightChoice:
    random = np.random.default_rng(1)
    names = [layer_name(index, module) for index in range(source.dims.decoder.num_layers) for module in PLACES]
    sizes = {name: source.tensors[f"{name}.weight"].shape[0] for name in names}
    return WeightChoice(
        factors={name: (2.0 ** random.uniform(-3, 3, sizes[name])).astype(np.float32) for name in names}
    )


def logits(source: Source) -> torch.Tensor:
    model = read_model(source)
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 12)[None]).logits[0]


def test_the_model_computes_what_it_did(source: Source) -> None:
    choice = drawn(source)
    tensors = scaled(source.tensors, choice)
    wanted, own = logits(source), logits(replace(source, tensors=tensors))
    assert torch.allclose(own, wanted, atol=2e-5 * float(wanted.abs().max()))
    changed = {name for name in tensors if tensors[name] is not source.tensors[name]}
    last = source.dims.decoder.num_layers - 1
    assert {name for name in changed if name.startswith(f"model.layers.{last}.")} >= {
        f"model.layers.{last}.{module}.weight" for module in (*PLACES, *sum(PLACES.values(), ()))
    }
    assert not any("o_proj" in name or "visual" in name or "vision" in name for name in changed)
    largest = max(float(np.abs(tensors[name].mapped() / source.tensors[name].mapped()).max()) for name in changed)
    assert largest > 4


def test_norms_have_the_same_weights_in_every_precision(source: Source) -> None:
    tensors = scaled(source.tensors, drawn(source))
    norms = [name for name in tensors if name.startswith("model.layers.") and name.endswith("layernorm.weight")]
    assert len(norms) == 2 * source.dims.decoder.num_layers
    for name in norms:
        weight = tensors[name].mapped()
        assert weight.dtype == np.float32
        assert (weight.astype(np.float16) == weight).all() and (weight.astype(ml_dtypes.bfloat16) == weight).all()
        assert np.array_equal(np.concatenate(list(tensors[name].chunks(7))), weight)


def test_plain_layers_stay_as_they_are(source: Source) -> None:
    choice = drawn(source).with_plain([1])
    source = replace(source, tensors=MappingProxyType(dict(source.tensors)))
    quantized = Source.of(source.checkpoint, source.family, "int4:32", choice)
    kept = [name for name in source.tensors if name.startswith("model.layers.1.")]
    assert kept and all(quantized.tensors[name] == source.tensors[name] for name in kept)
    assert len(quantized.quantized) == 7 * (source.dims.decoder.num_layers - 1)
    assert choice.digest() != drawn(source).digest()


def test_numbers_too_small_for_fp16_keep_their_factor_of_one(source: Source) -> None:
    name = layer_name(0, "input_layernorm")
    weight = source.tensors[f"{name}.weight"].mapped().astype(np.float32)
    factors = np.full_like(weight, 2.0)
    factors[:2] = 1e9, 1e-9
    tensors = scaled(source.tensors, WeightChoice(factors={name: factors}))
    own = tensors[f"{name}.weight"].mapped()
    assert np.array_equal(own[:2], weight[:2]) and not np.isclose(own[2:], weight[2:]).any()
    reader = f"{layer_name(0, 'self_attn.q_proj')}.weight"
    ratio = tensors[reader].mapped() / source.tensors[reader].mapped()
    assert np.allclose(ratio[:, :2], 1) and np.allclose(ratio[:, 2:], 2, rtol=2**-8)


def test_a_file_holds_all_of_it_and_a_damaged_one_is_refused(source: Source, tmp_path: Path) -> None:
    choice = replace(drawn(source), errors=(0.1, 0.2), plain=(1,), tried=((0, 0.5), (1, 0.01)), budget=0.1)
    choice.save(tmp_path / CHOICE)
    found = WeightChoice.load(tmp_path / CHOICE)
    assert found.digest() == choice.digest()
    assert replace(found, factors={}) == replace(choice, factors={})
    with pytest.raises(CapaError, match="no such file"):
        WeightChoice.load(tmp_path / "other")
    factors = load_file(tmp_path / CHOICE)
    next(iter(factors.values()))[3] = -1
    save_file(
        factors, tmp_path / CHOICE, {"capa_quantization": '{"errors": [], "plain": [], "tried": [], "budget": null}'}
    )
    with pytest.raises(CapaError, match="are not positive FP32 numbers"):
        WeightChoice.load(tmp_path / CHOICE)
    (tmp_path / CHOICE).write_bytes(b"nothing")
    with pytest.raises(CapaError, match="says nothing of how weights are rounded"):
        WeightChoice.load(tmp_path / CHOICE)


def test_factors_of_another_model_are_refused(source: Source) -> None:
    with pytest.raises(CapaError, match="outputs, their factors are 3"):
        scaled(source.tensors, WeightChoice(factors={layer_name(0, "input_layernorm"): np.ones(3, np.float32)}))
    for name in (layer_name(9, "input_layernorm"), layer_name(0, "mlp.down_proj"), "nothing"):
        with pytest.raises(CapaError, match=f"factors of {name}, which this checkpoint lacks"):
            scaled(source.tensors, WeightChoice(factors={name: np.ones(64, np.float32)}))
    with pytest.raises(CapaError, match="leaves layer 7 plain, which this checkpoint lacks"):
        rounded(source.tensors, PackedLayers(kind="int4", group=32), WeightChoice(plain=(1, 7)))
