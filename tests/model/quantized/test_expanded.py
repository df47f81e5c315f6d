"""Every format's weights are those that its specification means, to the bit, and the eager model has them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from capa_export.base.errors import CapaError
from capa_export.bundle.store import Bundle
from capa_export.config.recipe import load_recipe
from capa_export.export.in_place import Shards
from capa_export.model.checkpoint import canonical_name, open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.files import check_files
from capa_export.model.model import Model
from capa_export.model.quantized.expanded import ExpandedTensor
from capa_export.model.quantized.tensor import quantization
from capa_export.model.source import Source
from capa_export.model.streamed import StoredWeights, hollow_model
from tests.building import Building
from tests.models import FAMILIES
from tests.models.internvl3 import random_model as random_internvl
from tests.models.internvl3 import save_original
from tests.quantizing import FORMATS, quantize

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    saved = {name: module.save_model(folder / name, module.random_model()) for name, module in FAMILIES.items()}
    return {**saved, "internvl3 original": save_original(folder / "original", random_internvl())}


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(originals[family], mkdtemp(dir=tmp_path), dirs_exist_ok=True))


def opened(folder: Path, family: str) -> Model:
    return Building.of(load_recipe(family), Bundle(folder.with_name("bundle")), folder).model


def change_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(settings)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("form", FORMATS)
def test_a_layer_is_what_the_specification_means(
    form: str, copy: Callable[[str], Path], originals: dict[str, Path]
) -> None:
    folder = copy("qwen25vl")
    expected = quantize(folder, FORMATS[form])
    source = opened(folder, "qwen25vl").source
    assert len(expected) == 7 * source.dims.decoder.num_layers
    for name, weight in expected.items():
        tensor = source.tensors[canonical_name(name, source.family.RENAMES)]
        assert isinstance(tensor, ExpandedTensor)
        np.testing.assert_array_equal(tensor.mapped(), weight.numpy(), err_msg=name)
        assert tensor.mapped().dtype == np.float32
    assert source.checkpoint.num_parameters == open_checkpoint(str(originals["qwen25vl"])).num_parameters


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *((family, "AutoAWQ") for family in [*FAMILIES, "internvl3 original"]),
        ("qwen25vl", "GPTQ desc_act"),
        ("qwen25vl", "INT4 AWQ"),
        ("qwen25vl", "NVFP4 AWQ"),
        ("internvl3", "packed zeros"),
        ("llava15", "FP8"),
        ("qwen3vl", "FP8 blocks"),
    ],
)
def test_the_eager_model_has_these_weights(family: str, form: str, copy: Callable[[str], Path]) -> None:
    folder = copy(family)
    reference = StoredModel.of(folder, family.split(maxsplit=1)[0])
    for name, weight in quantize(folder, FORMATS[form]).items():
        reference.put(name, weight)
    model = opened(folder, family.split(maxsplit=1)[0])
    check_files(model)
    given = dict(model.eager.named_parameters())
    assert given.keys() == reference.parameters.keys()
    for name, parameter in reference.parameters.items():
        assert torch.equal(given[name], parameter), name
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(model.eager(input_ids=ids).logits, reference.model(input_ids=ids).logits)
    assert not hasattr(model.eager.config, "quantization_config")


class StoredModel:
    """A plain checkpoint's model, whose weights are then put in by hand."""

    def __init__(self, model: Any, renames: Any) -> None:
        self.model, self.renames = model, renames
        self.parameters: dict[str, torch.nn.Parameter] = dict(model.named_parameters())

    @classmethod
    def of(cls, folder: Path, family: str) -> "StoredModel":
        return cls(opened(folder, family).eager, load_family(family).RENAMES)

    def put(self, stored: str, weight: torch.Tensor) -> None:
        canonical = canonical_name(stored, self.renames)
        (name,) = [name for name in self.parameters if canonical_name(name, self.renames) == canonical]
        with torch.no_grad():
            self.parameters[name].copy_(weight)


def test_a_layer_is_read_when_it_runs(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen25vl")
    expected = quantize(folder, FORMATS["AutoAWQ"])
    source = opened(folder, "qwen25vl").source
    weights = StoredWeights(source)
    model = hollow_model(source, weights)
    with weights.holding(model, 1):
        name = next(name for name in expected if "layers.1.mlp.up_proj" in name)
        assert torch.equal(model.model.language_model.layers[1].mlp.up_proj.weight, expected[name])
    assert model.model.language_model.layers[1].mlp.up_proj.weight.is_meta


def test_what_the_weights_were_is_said_and_their_files_count(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen25vl")
    plain = open_checkpoint(str(folder))
    assert quantization(Source.of(plain, load_family("qwen25vl")).tensors) is None
    quantize(folder, FORMATS["NVFP4"])
    model = opened(folder, "qwen25vl")
    assert quantization(model.source.tensors) == "35 layers of ModelOpt NVFP4, groups of 16"
    assert set(model.fingerprints) == {"config.json", "hf_quant_config.json", "model.safetensors"}
    with pytest.raises(CapaError, match=r"35 layers of ModelOpt NVFP4.* are expanded to fp16.*--weights in-place"):
        Shards(model.source.checkpoint, "fp16")


def test_scales_in_a_shard_of_their_own_count_among_the_files(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen25vl")
    quantize(folder, FORMATS["AutoAWQ"])
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(".scales")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in scales}
    places: dict[str, str] = {}
    for shard, part in (("model-1.safetensors", rest), ("model-2.safetensors", scales)):
        save_file(part, folder / shard, {"format": "pt"})
        places |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert set(opened(folder, "qwen25vl").fingerprints) == {"config.json", "model-1.safetensors", "model-2.safetensors"}


def test_a_vision_tower_may_be_quantized_where_its_layers_are_the_graphs(copy: Callable[[str], Path]) -> None:
    folder = copy("llava15")
    chosen = re.compile(r"vision_tower.*self_attn\.q_proj\.weight$|projector\.linear_1\.weight$")
    tensors = load_file(folder / "model.safetensors")
    reference = StoredModel.of(folder, "llava15")
    packer = FORMATS["FP8"]
    for name in [name for name in tensors if chosen.search(name)]:
        parts, weight = packer.pack(tensors.pop(name))
        reference.put(name, weight)
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "hf_quant_config.json").write_text(json.dumps(packer.beside))
    given = dict(opened(folder, "llava15").eager.named_parameters())
    assert all(torch.equal(given[name], parameter) for name, parameter in reference.parameters.items())


def test_scales_of_the_cache_are_passed_over(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen25vl")
    quantize(folder, FORMATS["FP8"])
    change_weights(
        folder,
        lambda tensors: tensors.update({"model.language_model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}),
    )
    check_files(opened(folder, "qwen25vl"))


def _first(tensors: Tensors, part: str) -> str:
    return next(name for name in tensors if name.endswith(f".{part}"))


def _spoil(part: str, number: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[_first(tensors, part)].view(-1)[:1] = number

    return change


def _drop(part: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(_first(tensors, part))


def _cut(part: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({(name := _first(tensors, part)): tensors[name][:-1].clone()})


def _other(part: str, tensor: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"{_first(tensors, 'qweight').removesuffix('qweight')}{part}": tensor})


def _same_group(tensors: Tensors) -> None:
    tensors[_first(tensors, "g_idx")][:] = 0


DAMAGED: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "NaN": ("AutoAWQ", _spoil("scales", float("nan")), r"\.scales holds scales that are NaN, infinite or zero"),
    "zero": ("GPTQ", _spoil("scales", 0.0), r"\.scales holds scales that are NaN, infinite or zero"),
    "infinite": ("FP8", lambda t: t[_first(t, "weight_scale")].fill_(float("inf")), r"\.weight_scale holds scales"),
    "pre-scale": ("INT4 AWQ", _spoil("pre_quant_scale", 0.0), r"\.pre_quant_scale holds scales"),
    "no zeros": ("AutoAWQ", _drop("qzeros"), r"qzeros is missing; download the checkpoint again"),
    "no scale": ("FP8", _drop("weight_scale"), r"weight_scale is missing; download the checkpoint again"),
    "no numbers": ("packed", _drop("weight_packed"), r"weight_packed is missing"),
    "no order": ("GPTQ desc_act", _drop("g_idx"), "has no g_idx beside it, though desc_act is set"),
    "no zero point": ("packed zeros", _drop("weight_zero_point"), "weight_zero_point is missing"),
    "fewer zeros": ("AutoAWQ", _cut("qzeros"), r"qzeros has shape \[2, 8\], the others imply \[3, 8\]"),
    "fewer scales": ("NVFP4", _cut("weight_scale"), r"weight_scale has shape \[63, 6\], the others imply"),
    "fewer rows": ("FP8 blocks", _cut("weight_scale_inv"), "weight_scale_inv has shape .* the others imply"),
    "order": ("GPTQ desc_act", _same_group, "g_idx does not put 32 inputs into every group"),
    "mixed": ("AutoAWQ", _other("weight_scale", torch.ones(1)), "is of another format than AutoAWQ.*only one format"),
    "doubled": ("AutoAWQ", _other("weight", torch.ones(64, 64)), "is stored beside its quantized form"),
    "dtype": ("AutoAWQ", _other("qzeros", torch.ones(2, 8)), "qzeros is float32, where int32 is expected"),
}


@pytest.mark.parametrize(("form", "change", "why"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_weights_are_refused_in_a_line(
    form: str, change: Callable[[Tensors], Any], why: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("qwen25vl")
    quantize(folder, FORMATS[form])
    change_weights(folder, change)
    with pytest.raises(CapaError, match=why) as refused:
        check_files(opened(folder, "qwen25vl"))
    assert "\n" not in str(refused.value)
    assert "model." in str(refused.value)


def test_groups_that_do_not_divide_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen25vl")
    quantize(folder, FORMATS["AutoAWQ"])
    change_config(folder, group_size=40)
    with pytest.raises(CapaError, match="has 96 inputs, which groups of 40 do not divide"):
        _ = opened(folder, "qwen25vl").source


LEFT_OUT = {
    "AutoAWQ": {"modules_to_not_convert": ["q_proj"]},
    "FP8 blocks": {"modules_to_not_convert": ["model.layers.0.self_attn.q_proj"]},
    "GPTQ": {"dynamic": {r"-:.*q_proj": {}}},
    "packed": {"ignore": [r"re:.*q_proj"]},
    "FP8 in config.json": {"ignore": ["*q_proj"]},
}


@pytest.mark.parametrize(("form", "settings"), LEFT_OUT.items(), ids=LEFT_OUT)
def test_a_layer_that_the_config_leaves_out_is_not_quantized(
    form: str, settings: dict[str, Any], copy: Callable[[str], Path]
) -> None:
    folder = copy("qwen25vl")
    quantize(folder, FORMATS[form], re.compile(r"layers\.\d+\.mlp\.(?:up|down)_proj\.weight$"))
    change_config(folder, **settings)
    assert quantization(opened(folder, "qwen25vl").source.checkpoint.tensors) is not None
    folder = copy("qwen25vl")
    quantize(folder, FORMATS[form])
    change_config(folder, **settings)
    with pytest.raises(CapaError, match="q_proj is quantized, though the config leaves it out"):
        _ = opened(folder, "qwen25vl").source


def test_a_fused_projection_of_the_vision_tower_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("internvl3 original")
    quantize(folder, FORMATS["AutoAWQ"])
    change_config(folder, modules_to_not_convert=None)

    def change(tensors: Tensors) -> None:
        name = next(name for name in tensors if name.endswith("attn.qkv.weight"))
        parts, _ = FORMATS["AutoAWQ"].pack(tensors.pop(name))
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}

    change_weights(folder, change)
    with pytest.raises(
        CapaError, match=r"qkv.weight is quantized; of InternVL in its authors' layout only the decoder"
    ):
        _ = opened(folder, "internvl3").source


def test_a_config_and_weights_that_disagree_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen25vl")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        json.dumps({**json.loads(config), "quantization_config": FORMATS["GPTQ"].config})
    )
    with pytest.raises(CapaError, match="the config says GPTQ, 4 bits, groups of 32, and no tensor is quantized"):
        _ = opened(folder, "qwen25vl").source
    quantize(folder, FORMATS["GPTQ"])
    (folder / "config.json").write_text(config)
    with pytest.raises(CapaError, match=r"is of a quantized layer, and config.json has no quantization_config"):
        _ = opened(folder, "qwen25vl").source
