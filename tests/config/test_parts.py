"""Parts of a model: as options write them, and as modules and nodes are named."""

import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.config.parts import address_of, block_of, layer_of, measured_unit, parse_unit

WORDS = ("residual", "visual.residual", "2", "3", "visual.1", "2.self_attn", "3.mlp", "visual.0.attn", "visual.1.mlp")


@pytest.mark.parametrize("word", WORDS)
def test_units_are_written_as_they_are_read(word: str) -> None:
    assert str(parse_unit(word)) == word


@pytest.mark.parametrize(
    "word", ["", "mlp", "3.", "3.attn", "-1", "visual", "visual.1.self_attn", "3.mlp.up_proj", "03 "]
)
def test_what_is_no_unit_is_refused(word: str) -> None:
    with pytest.raises(CapaError, match=rf"^--fp32-layers {word}: no such part of a model; its parts are N, ") as error:
        parse_unit(word)
    assert error.value.code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("node", "layer", "block"),
    [
        ("model/layers.3/self_attn/q_proj/Gemm", "layers.3", "self_attn"),
        ("model/layers.3/Add_2", "layers.3", "residual"),
        ("model/layers.3/VisualScale", "layers.3", "visual_scale"),
        ("model/layers.12/prune/TopKKeep", "layers.12", "prune"),
        ("visual/blocks.2/attn/Attention", "visual.blocks.2", "attn"),
        ("vision_tower/encoder/layer.1/Mul", "vision_tower.encoder.layer.1", "residual"),
        ("visual/merger/mlp/Gemm", "", "merger"),
        ("model/norm/RMSNormalization", "", "norm"),
        ("lm_head/Gemm", "", "lm_head"),
        ("Cast", "", ""),
    ],
)
def test_nodes_say_where_they_stand(node: str, layer: str, block: str) -> None:
    assert (layer_of(node), block_of(node)) == (layer, block)


@pytest.mark.parametrize("name", ["model.language_model.layers.3.mlp.up_proj", "model/layers.3/mlp/up_proj"])
def test_modules_and_nodes_have_addresses(name: str) -> None:
    address = address_of(name)
    assert address is not None
    assert (address.index, address.path.replace("/", ".")) == (3, "mlp.up_proj")


@pytest.mark.parametrize("name", ["model.visual.merger.mlp.2", "model.language_model.norm", "layers", "blocks.x.mlp"])
def test_what_is_in_no_layer_has_none(name: str) -> None:
    assert address_of(name) is None and measured_unit(name) is None


@pytest.mark.parametrize(
    ("name", "unit", "covering"),
    [
        ("model.language_model.layers.3", "residual", {"residual"}),
        ("model.language_model.layers.3.post_attention_layernorm.input", "residual", {"residual"}),
        ("model.language_model.layers.3.post_attention_layernorm", "3.mlp", {"3", "3.mlp"}),
        ("model.language_model.layers.3.mlp.down_proj.input", "3.mlp", {"3", "3.mlp"}),
        ("model.language_model.layers.2.self_attn.scores", "2.self_attn", {"2", "2.self_attn"}),
        ("model.visual.blocks.0.norm1", "visual.0.attn", {"visual.0.attn"}),
        ("model.vision_tower.encoder.layer.1.layernorm_after", "visual.1.mlp", {"visual.1", "visual.1.mlp"}),
    ],
)
def test_measured_values_are_computed_by_units(name: str, unit: str, covering: set[str]) -> None:
    measured = measured_unit(name)
    assert measured is not None and str(measured) == unit
    assert {word for word in WORDS if parse_unit(word).covers(measured)} == covering
