"""The operators as the ONNX function bodies compute them, node by node, in PyTorch.

T = prompt tokens, K = tokens kept, X = text tokens, D = hidden size, H = query heads, G = KV heads, d = head size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["BODIES"]


def _contribution_score(
    query: Tensor, key: Tensor, value: Tensor, output_weight: Tensor, text_positions: Tensor, scale: float
) -> Tensor:
    _, kv_heads, num_tokens, head_size = key.shape
    query_1Grd = query.float().reshape(1, kv_heads, -1, head_size)
    attention_1GrT = (query_1Grd @ key.float().transpose(2, 3) * scale).softmax(-1)
    weighted_TGrd = attention_1GrT.permute(3, 1, 2, 0) * value.float().permute(2, 1, 0, 3)
    written_TD = weighted_TGrd.reshape(num_tokens, -1) @ output_weight.float().T
    norm_T = written_TD.square().sum(1).sqrt().clamp(max=torch.finfo(torch.float32).max)
    return norm_T.index_fill(0, text_positions, torch.inf)


def _topk_keep(scores: Tensor, num_keep: int, min_keep_per_image: int) -> Tensor:
    scores_T = scores.masked_fill(scores.isnan(), -torch.inf)
    index_T = torch.arange(len(scores), device=scores.device)
    tied_TT = (scores_T[None] == scores_T[:, None]) & (index_T[None] < index_T[:, None])
    ahead_TT = (scores_T[None] > scores_T[:, None]) | tied_TT
    is_text_T = scores.isposinf()
    image_T = is_text_T.cumsum(0)
    same_image_TT = (image_T[None] == image_T[:, None]) & ~is_text_T[None]
    first_T = is_text_T | ((ahead_TT & same_image_TT).float().sum(1) < min_keep_per_image)
    later_T1 = ~first_T[:, None]
    ahead_first_TT = (first_T[None] & later_T1) | (ahead_TT & (first_T[None] | later_T1))
    keep_T = ahead_first_TT.float().sum(1) < num_keep
    kept_so_far_T = keep_T.cumsum(0)
    slot_T = torch.where(keep_T, kept_so_far_T - 1, index_T - kept_so_far_T + num_keep)
    return index_T.scatter(0, slot_T, index_T)[:num_keep]


def _token_gather(
    hidden: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, kept: Tensor
) -> tuple[Tensor, ...]:
    of_heads = (tensor.index_select(2, kept) for tensor in (key, value))
    return hidden.index_select(0, kept), *of_heads, *(table.index_select(1, kept) for table in (cos, sin))


def _visual_scale(x: Tensor, scale: Tensor, text: Tensor, text_rows: Tensor) -> Tensor:
    return (x * scale).index_copy(0, text_rows, text)


BODIES: Mapping[str, Callable[..., Any]] = {
    "ContributionScore": _contribution_score,
    "TopKKeep": _topk_keep,
    "TokenGather": _token_gather,
    "VisualScale": _visual_scale,
}
"""Bodies by operator. Tensors are the graph's: without batch axis where the graph has none."""
