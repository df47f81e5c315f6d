"""The decoder that the test beds share: its sizes, its start values, and its training forward pass."""

# Shapes: B pictures, T tokens of a packed row, H hidden width.

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerFast

__all__ = ["HIDDEN", "damp", "generation_config", "packed_hidden", "rms_norm", "rotate", "text_config"]

HIDDEN = 192


def text_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The entries that the text configs of all test beds share: twelve layers, about 5 million parameters."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.06,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Greedy, up to the end token."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )


@torch.no_grad()
def damp(projections: Iterable[Any]) -> None:
    """Scales the projections that write to the residual stream; without it twelve layers stay at chance."""
    each = list(projections)
    for projection in each:
        projection.weight.mul_(len(each) ** -0.5)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """A Hugging Face RMS norm, fused."""
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def packed_hidden(decoder: Any, embeds_BTH: Tensor, mask_TT: Tensor, position_ids: Tensor) -> Tensor:
    """The decoder's last hidden states, with batched matmuls: the CPU's fused attention trains slower.

    Args:
        decoder: a text model of the Llama or Qwen2 kind.
        embeds_BTH: input embeddings.
        mask_TT: added to the attention scores.
        position_ids: [axes, T]; three axes for mRoPE, one for plain positions.
    """
    x = embeds_BTH
    batch, length, _ = x.shape
    by_row = position_ids if len(position_ids) == 1 else position_ids[:, None]
    cos, sin = (a.to(x)[0] for a in decoder.rotary_emb(x, by_row))
    for layer in decoder.layers:
        attention = layer.self_attn
        groups, size = attention.num_key_value_groups, attention.head_dim
        normed = rms_norm(layer.input_layernorm, x)
        q, k, v = (
            p(normed).unflatten(-1, (-1, size)).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = (rotate(a, cos.to(a), sin.to(a)) for a in (q * attention.scaling, k))
        q = q.reshape(-1, groups * length, size)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        weights = torch.baddbmm(mask_TT.repeat(groups, 1).to(q), q, k.mT).softmax(dim=-1)
        mixed = (weights @ v).reshape(batch, -1, length, size).transpose(1, 2).flatten(-2)
        x = x + attention.o_proj(mixed)
        x = x + layer.mlp(rms_norm(layer.post_attention_layernorm, x))
    return rms_norm(decoder.norm, x)
