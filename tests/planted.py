"""Massive activations, planted in small random models as large ones have them: few channels of few tokens reach 2e5."""

from typing import Any

import torch

from benchmarks.tiny.tiny_qwen25vl import build_tokenizer

__all__ = ["plant_in_decoder", "plant_in_tower"]

_OUT = 10.0
"""What the FFN's output projection makes of inner products of 2e4; FP16 ends at 6.6e4."""


@torch.no_grad()
def plant_in_decoder(model: Any, *, layer: int = 1, channel: int = 5) -> None:
    """As Qwen2's residual stream has them: the token that begins a turn.

    A channel of the embedding that nothing else writes to marks the token, and one neuron of the layer's FFN reads it.
    """
    text, mark = model.model.language_model, 0
    token = build_tokenizer().convert_tokens_to_ids("<|im_start|>")
    text.embed_tokens.weight[:, mark] = 0
    text.embed_tokens.weight[token, mark] = 1.0
    last = _projections(model)[-1]
    last.weight[mark] = 0
    last.bias[mark] = 0
    for block in text.layers:
        block.self_attn.o_proj.weight[mark] = 0
        block.mlp.down_proj.weight[mark] = 0
    ffn = text.layers[layer].mlp
    for projection in (ffn.gate_proj, ffn.up_proj):
        projection.weight[0] = 0
    ffn.down_proj.weight[:, 0] = 0
    # Of a marked token, whatever else it is.
    ffn.gate_proj.weight[0, mark] = ffn.up_proj.weight[0, mark] = 50.0
    ffn.down_proj.weight[channel, 0] = _OUT


@torch.no_grad()
def plant_in_tower(model: Any, *, blocks: int = 1, channel: int = 5) -> None:
    """As the last vision blocks of Qwen2.5-VL-3B have them: patches that lie far out along one direction."""
    for block in list(model.model.visual.blocks)[-blocks:]:
        ffn = block.mlp
        direction = torch.nn.functional.normalize(ffn.gate_proj.weight[0], dim=0)
        ffn.gate_proj.weight[0] = 100 * direction
        ffn.gate_proj.bias[0] = -50
        ffn.up_proj.weight[0] = 0
        ffn.up_proj.bias[0] = 200
        ffn.down_proj.weight[:, 0] = 0
        ffn.down_proj.weight[channel, 0] = _OUT


def _projections(model: Any) -> list[Any]:
    return [module for module in model.model.visual.merger.modules() if isinstance(module, torch.nn.Linear)]
