"""What travels down the decoder's layers, and what an attention leaves for a stage to score tokens by.

B = batch, T = tokens, D = hidden size, H = query heads, G = KV heads, d = head size, X = text tokens, K = tokens kept.
"""

from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["Heads", "KeyValue", "Scorer", "Tokens"]

KeyValue = tuple[ir.Value, ir.Value]
"""Keys and values of one layer, each [B, G, T, d]."""


@dataclass(frozen=True)
class Tokens:
    """What travels down the layers: the hidden states, the rows of a batch one after another, and their positions."""

    hidden_TD: ir.Value
    cos_BTd: ir.Value
    sin_BTd: ir.Value
    text_rows_X: ir.Value | None = None
    """Rows of the hidden states that hold text; None where all of them do."""
    batch: ir.Value | None = None
    """[1], the number of rows; None where it is 1."""
    deepstack: tuple[ir.Value, ...] = ()
    """What the outputs of the layers to come gain, [T, D] each and zero where text stands; the next layer's first."""
    kept: tuple[ir.Value, ...] = ()
    """Prompt positions [K] that survived each stage so far, ascending."""


@dataclass(frozen=True)
class Heads:
    """What an attention was computed from."""

    query: ir.Value
    """[B, H, T, d], rotated."""
    key: ir.Value
    """[B, G, T, d], rotated, the cache's included."""
    value: ir.Value
    """[B, G, T, d], the cache's included."""
    plain_query: ir.Value
    """Before its rotation."""
    plain_key: ir.Value
    """Before its rotation; the new tokens' alone."""


Scorer = tuple[Heads, ir.Value]
"""An attention that scores tokens: what it was computed from, and its output projection."""
