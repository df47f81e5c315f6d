"""Writes the ONNX files of a bundle: graphs from the recipe, weights streamed from the checkpoint."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from capa_export.base.disk import check_disk
from capa_export.base.precision import FORMATS
from capa_export.base.progress import Report, silent
from capa_export.config.parts import check_units, parse_unit
from capa_export.config.schedule import Prune
from capa_export.export.bind import bind, bind_lazily, write_embedding
from capa_export.export.in_place import EMBEDDING_FILE, Shards
from capa_export.graph.decoder import decode_model, prefill_model
from capa_export.graph.rotary import rotary_tables
from capa_export.model.checkpoint import StoredTensor
from capa_export.model.families import require_selection
from capa_export.model.quantized.packed import BlockForm
from capa_export.model.quantized.tensor import QuantizedTensor
from capa_export.model.source import EMBEDDING, Source
from capa_export.model.tensors import unbound
from capa_export.passes.fp32_parts import FP32PartsPass
from capa_export.passes.pack_weights import PackedForm, PackWeightsPass, input_scale_name, only_gemm_reads
from capa_export.selectors.selector import TOWER_OUTPUTS, SelectorChoice

__all__ = [
    "DENSE",
    "PRECISIONS",
    "Graphs",
    "graphs_in_fp32",
    "pruning",
    "write_onnx",
]

PRECISIONS = {name: ir.DataType[form.onnx] for name, form in FORMATS.items()}

DENSE = "dense.onnx"
"""Prefill without FFN scales, written for validation only."""


@dataclass(frozen=True)
class Graphs:
    """Graphs that were not written: their weights are lazy."""

    models: Mapping[str, ir.Model]
    """The graphs by the names that their files would have in an `onnx/` folder."""
    embedding: StoredTensor


def pruning(prune: Prune) -> dict[str, Any]:
    """The pruning as arguments of `write_onnx`."""
    return {
        "prune_layers": tuple(stage.layer for stage in prune.schedule),
        "selectors": prune.selectors,
        "min_keep_per_image": prune.min_keep_per_image,
    }


def write_onnx(
    source: Source,
    precision: str,
    folder: Path,
    *,
    prune_layers: Sequence[int],
    scales: Mapping[int, np.ndarray],
    selectors: Mapping[int, SelectorChoice] = MappingProxyType({}),
    min_keep_per_image: int = 1,
    fp32_layers: Sequence[str] = (),
    dense: bool = False,
    in_place: bool = False,
    report: Report = silent,
) -> dict[str, Any]:
    """Write llm/{prefill,decode}.onnx over one data file, llm/embedding.safetensors and visual/model.onnx.

    Args:
        source: the checkpoint.
        precision: a key of `PRECISIONS`, of weights and activations.
        folder: receives `llm/` and `visual/`.
        prune_layers: first layers whose caches are without what a stage drops, ascending; -1 before the decoder.
        selectors: of some of them, what chooses the tokens in place of CAPA.
        scales: layer -> alpha [D] that stands for the FFN of visual tokens.
        min_keep_per_image: visual tokens that each image keeps at every stage.
        fp32_layers: parts that are computed in FP32 whatever the precision, as `--fp32-layers` names them.
        dense: also write `DENSE`.
        in_place: link to the checkpoint's shards instead of copying them; weights are then not read, and so not
            searched for NaN.
        report: progress.

    Returns:
        Counts of nodes and bytes per file; what is linked is a `shard` by its name in the checkpoint.

    Raises:
        CapaError: a tensor is missing, not finite or out of range, the disk is too small, or the weights cannot stay
            in place.
    """
    dtype = PRECISIONS[precision]
    parts = _graphs(
        source, dtype, prune_layers, selectors, min_keep_per_image, sorted(scales), fp32_layers, dense=dense
    )
    shards = Shards(source.checkpoint, precision) if in_place else None
    packed = _pack(parts, source)
    if shards is None:
        check_disk(folder, _bytes_to_write(parts, source, dtype))
    extra, sizes = _alphas(scales), dict[str, Any]()
    for part, models in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)

        def progress(_tensor: str, done: int, total: int, part: str = part) -> None:
            report(f"write {part} weights (MB)", done >> 20, total >> 20)

        data = folder / part / "model.onnx.data"
        bound = bind(
            list(models.values()),
            source.tensors,
            dtype=dtype,
            data_path=data,
            extra=extra,
            packed=packed,
            shards=shards,
            progress=progress,
        )
        written, kept = {data: bound.sha256}, bound.kept
        if part == "llm":
            path = folder / part / EMBEDDING_FILE
            embedding = write_embedding(source.tensors, dtype, path, shards)
            written[path] = embedding.sha256
            kept += embedding.kept
        with shards.linked(kept, folder / part) if shards else nullcontext({}) as links:
            for name, model in models.items():
                ir.save(model, folder / part / name)
                onnx.checker.check_model(str(folder / part / name))
                sizes[f"{part}/{name}"] = {"nodes": model.graph.num_nodes()}
        sizes |= {f"{part}/{location}": {"shard": name} for location, name in links.items()}
        for path, sha256 in written.items():
            if sha256 is not None:
                sizes[f"{part}/{path.name}"] = {"bytes": path.stat().st_size, "sha256": sha256}
    return sizes


def graphs_in_fp32(
    source: Source,
    *,
    prune_layers: Sequence[int],
    scales: Mapping[int, np.ndarray],
    selectors: Mapping[int, SelectorChoice],
    min_keep_per_image: int,
) -> Graphs:
    """Make the FP32 graphs of `write_onnx`, `DENSE` included; weights stay in the checkpoint until they are read.

    Raises:
        CapaError: a tensor is missing.
    """
    dtype = PRECISIONS["fp32"]
    parts = _graphs(source, dtype, prune_layers, selectors, min_keep_per_image, sorted(scales), (), dense=True)
    packed = _pack(parts, source)
    models = {f"{part}/{name}": model for part, named in parts.items() for name, model in named.items()}
    bind_lazily([*models.values()], source.tensors, dtype=dtype, extra=_alphas(scales), packed=packed)
    return Graphs(models, source.tensors[EMBEDDING])


def _graphs(
    source: Source,
    dtype: ir.DataType,
    prune_layers: Sequence[int],
    selectors: Mapping[int, SelectorChoice],
    min_keep_per_image: int,
    linear_layers: Sequence[int],
    fp32_layers: Sequence[str],
    *,
    dense: bool,
) -> dict[str, dict[str, ir.Model]]:
    """The graphs without weights, by the folder and the name of the file they go into."""
    check_units(fp32_layers, source.dims)
    decoder, rotary = source.dims.decoder, rotary_tables(source.dims)
    tower = _tower(source, dtype, selectors)
    features = next((value for value in tower.graph.outputs if value.name == TOWER_OUTPUTS["visual_features"]), None)
    pruning: Any = {
        "prune_layers": prune_layers,
        "selectors": selectors,
        "min_keep_per_image": min_keep_per_image,
        "feature_size": 0 if features is None or features.shape is None else features.shape[1],
    }
    llm = {
        "prefill.onnx": prefill_model(decoder, dtype, rotary, linear_layers=linear_layers, **pruning),
        "decode.onnx": decode_model(decoder, dtype, rotary, prune_layers=prune_layers),
    }
    if dense:
        llm[DENSE] = prefill_model(decoder, dtype, rotary, linear_layers=(), **pruning)
    parts = {"llm": llm, "visual": {"model.onnx": tower}}
    if dtype != ir.DataType.FLOAT:
        widen = FP32PartsPass([parse_unit(word) for word in fp32_layers])
        for model in (model for models in parts.values() for model in models.values()):
            widen(model)
    return parts


def _bytes_to_write(parts: Mapping[str, Mapping[str, ir.Model]], source: Source, dtype: ir.DataType) -> int:
    """Bytes of all weights that graphs wait for, each part's once, and of the embedding."""
    total = prod(source.tensors[EMBEDDING].shape) * dtype.itemsize if EMBEDDING in source.tensors else 0
    for models in parts.values():
        waiting = {value.name: value for model in models.values() for value in unbound(model)}
        total += sum(_bytes_of(value, dtype) for value in waiting.values())
    return ceil(total)


def _bytes_of(value: ir.Value, dtype: ir.DataType) -> float:
    assert value.shape is not None
    return prod(value.shape.numpy()) * (value.dtype or dtype).itemsize


def _pack(parts: Mapping[str, Mapping[str, ir.Model]], source: Source) -> dict[str, QuantizedTensor]:
    """Let numbers of few bits stand for weights in all graphs, where they can; returns the weights.

    Those of a vision tower do so only where they are rounded here.
    """
    packed = source.block_forms()
    models = [*parts["llm"].values(), *(parts["visual"].values() if source.rounded_tower else ())]
    for model in models:
        weights = {name: model.graph.initializers.get(name) for name in packed}
        packed = {name: packed[name] for name, value in weights.items() if value is None or only_gemm_reads(value)}
    known: dict[bytes, str] = {}
    pack = PackWeightsPass({name: _form(name, form, known) for name, form in packed.items()})
    for model in models:
        pack(model)
    return {name: source.quantized[name] for name in packed}


def _form(name: str, form: BlockForm, known: dict[bytes, str]) -> PackedForm:
    """How the pass packs a weight; `known` are factors of inputs by their bytes, so that equal ones are stored once."""
    scale = None if form.input_scale is None else known.setdefault(form.input_scale, input_scale_name(name))
    return PackedForm(kind=form.kind, group=form.group, input_scale=scale, has_zeros=form.has_zeros)


def _alphas(scales: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Every layer's alpha by the name of its initializer."""
    return {f"model.layers.{layer}.visual_scale": alpha.astype(np.float32) for layer, alpha in scales.items()}


def _tower(source: Source, dtype: ir.DataType, selectors: Mapping[int, SelectorChoice]) -> ir.Model:
    """The vision tower, with what selectors read of it."""
    for chosen in selectors.values():
        if chosen.reads_tower:
            return require_selection(source.family, chosen.name).vision_model(source.dims.vision, dtype, selection=True)
    return source.family.vision_model(source.dims.vision, dtype)
