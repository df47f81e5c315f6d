"""The weights that transformers' `from_pretrained` takes from a folder are those that the graphs get."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from capa_export.base.errors import CapaError
from capa_export.bundle.store import Bundle
from capa_export.config.recipe import load_recipe
from capa_export.model.checkpoint import canonical_name, open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.files import check_files
from capa_export.model.source import Source
from capa_export.model.streamed import StoredWeights, hollow_model
from capa_export.model.tensors import check_tensors
from tests.building import Building
from tests.models import FAMILIES

Edit = Callable[[Path], object]
ALL = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {name: module.save_model(folder / name, module.random_model()) for name, module in FAMILIES.items()}


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(originals[family], tmp_path / family))


def _config(folder: Path, **settings: object) -> None:
    """Change `config.json`; a name with a dot is of a section, and None takes the key away."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in settings.items():
        *sections, key = name.split(".")
        data = config[sections[0]] if sections else config
        data.pop(key, None)
        if value is not None:
            data[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _building(folder: Path, family: str) -> Building:
    return Building.of(load_recipe(family), Bundle(folder.with_name("bundle")), folder)


def _compare(folder: Path, family: str) -> None:
    """Hold every parameter of the eager model against the tensor that its graph reads."""
    building = _building(folder, family)
    check_files(building.model)
    model = building.model.eager
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stored = building.model.source.tensors[canonical_name(name, building.model.family.RENAMES)]
        flat = np.concatenate([chunk.copy() for chunk in stored.chunks()])
        np.testing.assert_array_equal(flat.reshape(parameter.shape), parameter.detach().numpy(), err_msg=name)
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"sdpa"}
    assert (
        hollow_model(building.model.source, StoredWeights(building.model.source)).config._attn_implementation == "sdpa"
    )


def _other(folder: Path, family: str, **options: Any) -> Path:
    model = FAMILIES[family].random_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    return FAMILIES[family].save_model(folder, model, **options)


def _stale_shards(folder: Path, family: str) -> None:
    """An older model's shards and their index beside a whole file."""
    for path in _other(folder.with_name("older"), family, max_shard_size="100KB").glob("model*"):
        shutil.copy(path, folder)


def _index_left_behind(folder: Path, family: str) -> None:
    _stale_shards(folder, family)
    for path in folder.glob("model-*.safetensors"):
        path.unlink()


def _named_file(folder: Path, family: str) -> None:
    shutil.copy(_other(folder.with_name("other"), family) / "model.safetensors", folder / "best.safetensors")
    _config(folder, transformers_weights="best.safetensors")


def _named_index(folder: Path, family: str) -> None:
    other = _other(folder.with_name("other"), family, max_shard_size="100KB")
    for path in other.glob("model-*.safetensors"):
        shutil.copy(path, folder)
    shutil.copy(other / "model.safetensors.index.json", folder / "best.safetensors.index.json")
    _config(folder, transformers_weights="best.safetensors.index.json")


def _buffers(folder: Path, _: str) -> None:
    _weights(
        folder,
        lambda weights: weights.update(
            {
                "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
                "vision_tower.embeddings.position_ids": torch.arange(17, dtype=torch.int32)[None],
                "model.language_model.rotary_emb.inv_freq": torch.ones(8),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64),
                "model.language_model.causal_mask": torch.ones(4, 4, dtype=torch.bool),
                "num_updates": torch.tensor(3, dtype=torch.uint8),
            }
        ),
    )


LAYOUTS: dict[str, Callable[[Path, str], object]] = {
    "as saved": lambda folder, family: None,
    "index left behind": _index_left_behind,
    "index with stale shards": _stale_shards,
    "a file that the config names": _named_file,
    "an index that the config names": _named_index,
    "buffers of any kind": _buffers,
    "no architectures": lambda folder, _: _config(folder, architectures=None),
    "the model without a head": lambda folder, _: _config(folder, architectures=["Qwen2_5_VLModel", "LlavaModel"]),
    "architectures of no class": lambda folder, _: _config(folder, architectures=["MyFineTune"]),
    "architectures in the sections": lambda folder, _: _config(
        folder,
        **{"text_config.architectures": ["Qwen2ForCausalLM"], "vision_config.architectures": ["CLIPVisionModel"]},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts(copy: Callable[[str], Path], family: str, layout: str) -> None:
    folder = copy(family)
    LAYOUTS[layout](folder, family)
    _compare(folder, family)


ATTENTIONS = ["flash_attention_2", "flash_attention_3", "eager", "kernels-community/flash-attn3", "made_up"]
PLACES = [
    section + key
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
    for section in ("", "text_config.", "vision_config.")
]


@pytest.mark.parametrize(
    ("attention", "place"),
    [
        # Each of them, and each place; the rest of the table in `make test-all`.
        pytest.param(attention, place, marks=() if ATTENTIONS[0] == attention or PLACES[0] == place else ALL)
        for attention in ATTENTIONS
        for place in PLACES
    ],
)
def test_any_attention(copy: Callable[[str], Path], attention: str, place: str) -> None:
    folder = copy("llava15")
    _config(folder, **{place: attention})
    _compare(folder, "llava15")


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_every_family(copy: Callable[[str], Path], family: str) -> None:
    folder = copy(family)
    _config(folder, _attn_implementation="flash_attention_3")
    _compare(folder, family)


FLAGS = [None, True, False]


def _is_tied(folder: Path, family: str) -> bool:
    """Whether transformers has head and embedding share their weights."""
    loaded: Any = getattr(transformers, load_family(family).ARCHITECTURE).from_pretrained(folder, dtype=torch.float32)
    return torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("family", "stored", "root", "text"),
    [
        # Every family where a flag and the head are left out, and one in every way; the rest in `make test-all`.
        pytest.param(
            *(family, stored, root, text),
            marks=() if family == "qwen25vl" or (stored == "no head" and None in (root, text)) else ALL,
        )
        for family in FAMILIES
        for stored in ("both", "no head", "no embedding")
        for root in FLAGS
        for text in FLAGS
    ],
)
def test_ties(copy: Callable[[str], Path], family: str, stored: str, *, root: bool | None, text: bool | None) -> None:
    folder = copy(family)
    lacks = {"both": "nothing", "no head": "lm_head", "no embedding": "embed_tokens"}[stored]
    _weights(folder, lambda weights: [weights.pop(name) for name in list(weights) if lacks in name])
    _config(folder, **{"tie_word_embeddings": root, "text_config.tie_word_embeddings": text})
    if stored == "both" or _is_tied(folder, family):
        _compare(folder, family)
        return
    # transformers has made up what is missing, and said so on stderr.
    missing = {"no head": r"lm_head\.weight is missing, and tie_word_embeddings", "no embedding": "embed_tokens"}[
        stored
    ]
    with pytest.raises(CapaError, match=missing):
        check_files(_building(folder, family).model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_of_another_dtype_is_refused(copy: Callable[[str], Path], family: str) -> None:
    folder = copy(family)
    name = next(
        name for name in load_file(folder / "model.safetensors") if name.endswith("layers.1.mlp.up_proj.weight")
    )
    _weights(folder, lambda weights: weights.update({name: weights[name].to(torch.float8_e4m3fn)}))
    source = Source.of(open_checkpoint(str(folder)), load_family(family))
    with pytest.raises(CapaError, match=r"up_proj\.weight is F8_E4M3; only BF16, F16 and F32 weights are supported"):
        check_tensors(source)


@pytest.mark.parametrize("rows", [-1, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_of_another_size_is_refused(copy: Callable[[str], Path], family: str, rows: int) -> None:
    folder = copy(family)

    def change(weights: dict[str, torch.Tensor]) -> None:
        name = next(name for name in weights if name.endswith("embed_tokens.weight"))
        table = weights[name]
        weights[name] = torch.cat([table, table])[: len(table) + rows].clone()

    _weights(folder, change)
    with pytest.raises(
        CapaError, match=r"the embedding table .* has shape .*vocab_size and hidden_size in config.json make"
    ):
        check_files(_building(folder, family).model)


def test_a_tensor_of_another_shape_is_refused_before_any_work(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen25vl")
    _weights(folder, lambda weights: weights.update({"model.layers.2.mlp.up_proj.weight": torch.ones(96, 65)}))
    with pytest.raises(CapaError, match=r"has shape \[96, 65\], config.json implies \[96, 64\]"):
        check_files(_building(folder, "qwen25vl").model)
