"""Checks that a checkpoint has the tensors that the graphs of its model read."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError
from capa_export.graph.decoder import decode_model
from capa_export.graph.rotary import rotary_tables
from capa_export.model.checkpoint import StoredTensor, canonical_name
from capa_export.model.quantized.expanded import check_scales
from capa_export.model.source import EMBEDDING, HEAD, Source

__all__ = ["check_tensors", "checked_shape", "unbound", "unused_tensors"]

_BUFFERS = re.compile(
    r"(?:^|\.)(?:(?:original_)?inv_freq|position_ids|(?:cos|sin)_cached|(?:causal|attn)_mask|masked_bias)$"
)
"""Buffers that models save beside their weights and compute anew, so that no graph reads them."""


class _ShapedWeights(Protocol):
    """Weights with a name, a place and a shape."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def check_tensors(source: Source) -> None:
    """Hold the checkpoint's tensor names against the graphs', before any weight is read.

    Raises:
        CapaError: a tensor is missing or superfluous, has another shape than `config.json` implies, or scales are
            damaged.
    """
    dims, folder = source.dims, source.checkpoint.folder
    models = _graphs(dims, source.family.vision_model)
    wanted = {name for model in models for name, value in model.graph.initializers.items() if value.const_value is None}
    if missing := sorted((wanted | {EMBEDDING}) - set(source.tensors)):
        raise CapaError(f"{folder}: tensor {_first(missing)} {_why_missing(missing, source)}")
    _check_shapes(models, source.tensors)
    check_scales(source.tensors.values())
    table, shape = source.tensors[EMBEDDING], (dims.decoder.vocab_size, dims.decoder.hidden_size)
    if table.shape != shape:
        raise CapaError(
            f"{table.path}: the embedding table {table.name} has shape {list(table.shape)}, vocab_size and hidden_size "
            f"in config.json make {list(shape)}; use the config.json that was saved with these weights"
        )
    # A family may know tensors that its checkpoints hold and no graph reads.
    unread = [_BUFFERS, *map(re.compile, source.family.UNUSED)]
    extra = [
        name
        for name in unused_tensors(models, source.tensors)
        if name != EMBEDDING and not any(pattern.search(name) for pattern in unread)
    ]
    if extra:
        raise CapaError(
            f"{source.checkpoint.folder}: tensor {_first(extra)} has no place in {source.family.ARCHITECTURE}; "
            "merge adapters into the weights and re-save with save_pretrained"
        )


@lru_cache(maxsize=8)
def _graphs(dims: ModelDims[Any], vision_model: Callable[[Any, ir.DataType], ir.Model]) -> tuple[ir.Model, ...]:
    """The graphs that between them read every weight; they depend on nothing else, and nobody may change them."""
    dtype = ir.DataType.FLOAT
    return decode_model(dims.decoder, dtype, rotary_tables(dims), prune_layers=()), vision_model(dims.vision, dtype)


def _why_missing(missing: Sequence[str], source: Source) -> str:
    """The problem with the first of the tensors that a graph reads and a checkpoint does not have."""
    checkpoint, rules = source.checkpoint, source.family.RENAMES
    for stored, dtype in checkpoint.passed_over.items():
        if canonical_name(stored, rules) == missing[0]:
            return f"is {dtype}; only BF16, F16 and F32 weights are supported: use the checkpoint that is not quantized"
    if missing == [HEAD]:
        return (
            "is missing, and tie_word_embeddings in config.json, as transformers reads it, does not put the embedding "
            "table in its place; set it to true beside model_type if the model was trained so"
        )
    return "is missing; download the checkpoint again"


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _check_shapes(models: Sequence[ir.Model], tensors: Mapping[str, StoredTensor]) -> None:
    """Hold the shapes of stored tensors against those of the initializers that they are for.

    Raises:
        CapaError: one is another, and no mere regrouping of its dimensions.
    """
    for model in models:
        for value in unbound(model):
            assert value.name is not None
            checked_shape(value, tensors[value.name])


def checked_shape(value: ir.Value, source: _ShapedWeights) -> tuple[int, ...]:
    """The shape of an initializer, which these weights have too."""
    assert value.shape is not None
    shape = tuple(value.shape.numpy())
    if not _regroups(source.shape, shape):
        raise CapaError(
            f"{source.path}: tensor {source.name} has shape {list(source.shape)}, config.json implies {list(shape)}; "
            "check that weights and config belong together"
        )
    return shape


def _regroups(stored: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether one shape only merges neighbouring dimensions of the other; a transposed matrix does not."""
    a, b = ({1, *accumulate(shape, mul)} for shape in (stored, wanted))
    return math.prod(stored) == math.prod(wanted) and (a <= b or b <= a)


def unbound(model: ir.Model) -> Iterator[ir.Value]:
    """The initializers that have no weights yet."""
    for graph in model.graphs():
        yield from (value for value in graph.initializers.values() if value.const_value is None)


def unused_tensors(models: Sequence[ir.Model], tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Names in the checkpoint whose weights no graph reads, sorted."""
    names = {name for model in models for graph in model.graphs() for name in graph.initializers}
    used = {(tensor.path, tensor.offset) for name, tensor in tensors.items() if name in names}
    return sorted(name for name, tensor in tensors.items() if (tensor.path, tensor.offset) not in used)
