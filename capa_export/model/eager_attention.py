"""The weights that an attention module of transformers gives its values, by transformers' own eager attention."""

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

__all__ = ["ATTENTION", "attention_weights"]

ATTENTION = "sdpa"
"""The name in transformers of how the eager model attends whatever its config asks for: plain PyTorch."""

_NAME = "capa_export"


@contextmanager
def attention_weights(tower: Any, module: Any) -> "Generator[list[Tensor]]":
    """Run `tower` inside with eager attention; the list gets the weights of each call of `module`, one of its parts.

    They are [B, Q, L] in FP32, mean over heads. `output_attentions` would keep those of every layer and head, and has
    none to give where a module drops its own, as Qwen2.5-VL's does.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    weights: list[Tensor] = []
    eager = sys.modules[type(module).__module__].eager_attention_forward

    def attend(called: Any, *inputs: Any, **options: Any) -> "tuple[Tensor, Tensor]":
        mixed, weights_BHQL = eager(called, *inputs, **options)
        if called is module:
            weights.append(weights_BHQL.float().mean(1))
        return mixed, weights_BHQL

    before = tower.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[_NAME] = attend
    tower.set_attn_implementation(_NAME)
    try:
        yield weights
    finally:
        tower.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[_NAME]
