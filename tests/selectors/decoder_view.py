"""What a selector in the decoder sees of one layer, at random."""

import torch

from tests.selectors.one_score import Case

__all__ = ["HEAD_SIZE", "decoder_view"]

HEAD_SIZE = 16


def decoder_view(
    is_visual: torch.Tensor, num_keep: int, *, heads: int = 4, kv_heads: int = 2, hidden_size: int = 24, seed: int = 0
) -> Case:
    """Random queries, keys, values and hidden states; attention over all keys, as the model's own would be."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    tokens = len(is_visual)
    query, key = normal(heads, HEAD_SIZE), normal(kv_heads, tokens, HEAD_SIZE)
    key_HTd = key.repeat_interleave(heads // kv_heads, dim=0)
    return Case(
        is_visual=is_visual,
        num_keep=num_keep,
        hidden=normal(tokens, hidden_size),
        attention=torch.softmax((key_HTd @ query[:, :, None])[..., 0] * HEAD_SIZE**-0.5, dim=-1),
        query=query,
        key=key,
        value=normal(kv_heads, tokens, HEAD_SIZE),
        output_weight=normal(hidden_size, heads * HEAD_SIZE),
    )
