"""Writes beside a bundle's ONNX files what makes their folder one of onnxruntime-genai's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from capa_export.base.dims import DecoderDims
from capa_export.base.errors import CapaError, ExitCode
from capa_export.config.parts import parse_unit
from capa_export.export.graphs import PRECISIONS
from capa_export.export.in_place import embedding_of
from capa_export.graph.contract import INPUTS_EMBEDS, LOGITS, PIXEL_VALUES, past_names, present_names
from capa_export.graph.genai import (
    TABLE,
    decoder_model,
    embedding_model,
    prompt_model,
    row_size,
)
from capa_export.graph.rotary import rotary_tables
from capa_export.model.source import Source
from capa_export.passes.fp32_parts import FP32PartsPass
from capa_export.passes.pack_weights import PackWeightsPass, packed_forms
from capa_export.selectors.selector import SelectorChoice, load_selector

__all__ = ["CONFIG", "reason_against", "write_genai"]

CONFIG = "genai_config.json"
_PROMPT, _EMBEDDING, _DECODER = "prompt.onnx", "embedding.onnx", "llm/model.onnx"
_LONG = 32768


def reason_against(source: Source, selectors: Mapping[int, SelectorChoice]) -> str | None:
    """Why onnxruntime-genai cannot run a bundle, for people; None if it can.

    Args:
        source: the checkpoint.
        selectors: layer -> what chooses there, -1 before the decoder.
    """
    if layers := [layer for layer in selectors if layer >= 0]:
        return f"layer {layers[0]} prunes, and its KV caches have one length"
    if source.dims.decoder.deepstack_layers:
        return "its vision features reach the decoder by one way, and this model adds some at later layers"
    if any("visual_grid" in load_selector(chosen.name).reads for chosen in selectors.values()):
        return f"selector {selectors[-1].name} reads the grid of the pictures"
    return None


def write_genai(
    source: Source,
    precision: str,
    folder: Path,
    *,
    selectors: Mapping[int, SelectorChoice],
    linear_layers: Sequence[int],
    eos_token_ids: Sequence[int],
    min_keep_per_image: int = 1,
    fp32_layers: Sequence[str] = (),
) -> dict[str, Any]:
    """Write prompt.onnx, embedding.onnx, llm/model.onnx and genai_config.json; no weight is read or copied.

    Args:
        source: the checkpoint.
        precision: of the bundle.
        folder: its `onnx`, with the files that `write_onnx` put there from the same arguments.
        selectors: as in `reason_against`.
        linear_layers: whose FFN is a scale for visual tokens.
        eos_token_ids: that end an answer.
        min_keep_per_image: visual tokens that each image keeps.
        fp32_layers: parts that are computed in FP32.

    Returns:
        Counts of nodes per file, as `write_onnx` has them.

    Raises:
        CapaError: onnxruntime-genai cannot run this bundle.
    """
    if reason := reason_against(source, selectors):
        raise CapaError(f"onnxruntime-genai cannot run this bundle: {reason}", ExitCode.EXPORT)
    dtype, dims = PRECISIONS[precision], source.dims
    decoder = decoder_model(dims.decoder, dtype, rotary_tables(dims), linear_layers=linear_layers)
    if dtype != ir.DataType.FLOAT:
        FP32PartsPass([parse_unit(word) for word in fp32_layers])(decoder)
    weights = ir.load(folder / "llm" / "prefill.onnx").graph
    PackWeightsPass(packed_forms(weights))(decoder)
    chosen = selectors.get(-1)
    tower = ir.load(folder / "visual" / "model.onnx")
    _move(tower, folder)
    prompt = prompt_model(tower, dims, dtype, chosen, min_keep_per_image=min_keep_per_image)
    embedding = embedding_model(dims.decoder, dtype)
    table = embedding_of(folder / "llm")
    shared = {
        TABLE: ir.ExternalTensor(
            table.path.relative_to(folder),
            table.offset,
            table.nbytes,
            table.dtype,
            shape=ir.Shape(table.shape),
            name=TABLE,
            base_dir=folder,
        )
    }
    sizes: dict[str, Any] = {}
    for name, model, stored in (
        (_PROMPT, prompt, shared),
        (_EMBEDDING, embedding, shared),
        (_DECODER, decoder, {key: value.const_value for key, value in weights.initializers.items()}),
    ):
        _bind(model, stored)
        ir.save(model, folder / name)
        sizes[name] = {"nodes": model.graph.num_nodes()}
    config = _config(dims.decoder, eos_token_ids, _context_length(source.checkpoint.config))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return sizes


def _move(model: ir.Model, folder: Path) -> None:
    """Name a graph's weights as a graph in `folder` does."""
    for value in model.graph.initializers.values():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                Path(tensor.path).relative_to(folder),
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                base_dir=folder,
            )


def _bind(model: ir.Model, stored: Mapping[str, ir.TensorProtocol | None]) -> None:
    """Give the initializers that have no value yet those that lie on the disk."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            tensor = stored[name]
            assert tensor is not None and value.dtype in (None, tensor.dtype), name
            value.type, value.const_value = ir.TensorType(tensor.dtype), tensor


def _context_length(config: Mapping[str, Any]) -> int:
    """Most rows of a prompt and its answer; where `config.json` does not say, as many as any prompt takes."""
    text = config.get("text_config") or config
    return text.get("max_position_embeddings", _LONG)


def _config(dims: DecoderDims, eos_token_ids: Sequence[int], context_length: int) -> dict[str, Any]:
    """`genai_config.json`, which onnxruntime-genai reads first."""
    (past_key, past_value), (present_key, present_value) = past_names("%d"), present_names("%d")
    model = {
        # The plainest of its vision-language types: it runs the graphs one after the other, and adds nothing.
        "type": "phi3v",
        "vocab_size": dims.vocab_size,
        "context_length": context_length,
        "bos_token_id": eos_token_ids[0],
        "eos_token_id": list(eos_token_ids),
        "pad_token_id": eos_token_ids[0],
        "tokenizer_dir": "llm",
        "vision": {
            "filename": _PROMPT,
            "inputs": {"pixel_values": PIXEL_VALUES},
            "outputs": {"image_features": "prompt_embeds"},
        },
        "embedding": {
            "filename": _EMBEDDING,
            "inputs": {"input_ids": "input_ids", "image_features": "prompt_embeds"},
            "outputs": {"inputs_embeds": INPUTS_EMBEDS},
        },
        "decoder": {
            "filename": _DECODER,
            "hidden_size": row_size(dims),
            "num_attention_heads": dims.num_heads,
            "num_key_value_heads": dims.num_kv_heads,
            # One more: its cache holds the positions.
            "num_hidden_layers": dims.num_layers + 1,
            "head_size": dims.head_dim,
            "inputs": {
                "inputs_embeds": INPUTS_EMBEDS,
                "past_key_names": past_key,
                "past_value_names": past_value,
            },
            "outputs": {
                "logits": LOGITS,
                "present_key_names": present_key,
                "present_value_names": present_value,
            },
        },
    }
    search = {"max_length": context_length, "do_sample": False, "num_beams": 1, "past_present_share_buffer": False}
    return {"model": model, "search": search}
