"""Weights of one attention module, against those that transformers itself gives back."""

from typing import Any

import pytest
import torch

from capa_export.model.eager_attention import attention_weights
from tests.models.llava15 import SIDE, random_model


@pytest.fixture(scope="module")
def tower() -> Any:
    return random_model().model.vision_tower


@pytest.mark.parametrize("layer", [0, 3])
def test_weights_are_those_of_output_attentions(tower: Any, layer: int) -> None:
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = tower(pixels).last_hidden_state
        with attention_weights(tower, tower.encoder.layers[layer].self_attn) as weights:
            outputs = [tower(pixels).last_hidden_state, tower(pixels[:1]).last_hidden_state]
        tower.set_attn_implementation("eager")
        expected = tower(pixels, output_attentions=True).attentions[layer].mean(1)
        tower.set_attn_implementation("sdpa")
    assert [tuple(each.shape) for each in weights] == [(3, 17, 17), (1, 17, 17)]
    torch.testing.assert_close(weights[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(outputs[0], plain)


def test_the_tower_is_as_before_whatever_happens(tower: Any) -> None:
    with pytest.raises(ZeroDivisionError), attention_weights(tower, tower.encoder.layers[0].self_attn):
        raise ZeroDivisionError
    assert {module.config._attn_implementation for module in tower.modules() if hasattr(module, "config")} == {"sdpa"}
