"""A quantized checkpoint as one of plain FP32 weights, which are decoded a layer at a time, when they are read."""

import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from capa_export.base.dims import Section
from capa_export.base.errors import CapaError
from capa_export.model.checkpoint import Checkpoint, StoredTensor, read_json
from capa_export.model.quantized.formats import FOREIGN, HF_QUANT_CONFIG, KEY, TEXT_SECTIONS, find_format
from capa_export.model.quantized.parts import Format, Parts
from capa_export.model.quantized.tensor import QuantizedTensor
from capa_export.model.quantized.weight import Array, QuantizedWeight
from capa_export.model.sidecars import scratch_folder, sidecars, write_json

__all__ = ["ExpandedTensor", "check_scales", "expanded"]

_CACHE_SCALES = re.compile(r"\.(?:k_proj\.k_scale|v_proj\.v_scale|self_attn\.[kv]_scale)$")
"""Scales of a quantized KV cache, which no weight depends on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpandedTensor(QuantizedTensor):
    """The weight of a layer that was published quantized."""

    form: Format
    parts: Parts
    settings: tuple[Path, ...] = ()
    """The file of the format's settings, where it is not `config.json`."""

    @property
    def paths(self) -> tuple[Path, ...]:
        return (*self.settings, *(part.path for part in self.parts.tensors.values()))

    @property
    def format_name(self) -> str:
        return self.form.name

    def quantized(self) -> QuantizedWeight:
        return self.form.decode(self.parts)

    def write(self, out: Array) -> None:
        self.quantized().dequantized(out)


def check_scales(tensors: Iterable[StoredTensor]) -> None:
    """Read the scales of all quantized layers, which are few bytes.

    Raises:
        CapaError: one is NaN, infinite or zero.
    """
    for tensor in tensors:
        if isinstance(tensor, ExpandedTensor):
            for part in tensor.form.SCALES:
                if part in tensor.parts:
                    tensor.parts.scales(part)


def expanded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a weight in place of the tensors that stand for one, and a config that says nothing of them.

    Raises:
        CapaError: the format is not supported, or tensors are missing, of another format or do not fit each other.
    """
    folder = checkpoint.folder
    beside = None
    if (path := folder / HF_QUANT_CONFIG).is_file():
        beside = Section(read_json(path), str(path), "")
    form = find_format(checkpoint.config, str(folder / "config.json"), beside)
    stored = {**checkpoint.tensors, **checkpoint.packed}
    if form is None:
        if unexplained := next((name for name in stored if name.rpartition(".")[2] in FOREIGN), None):
            raise CapaError(
                f"{folder}: tensor {unexplained} is of a quantized layer, and config.json has no {KEY}; "
                "use the config.json that was published with the weights"
            )
        return checkpoint
    weights = {
        name: weight if beside is None else replace(weight, settings=(path,))
        for name, weight in _weights(folder, stored, form)
    }
    consumed = {part.name for weight in weights.values() for part in weight.parts.tensors.values()}
    plain = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if name not in consumed and not _CACHE_SCALES.search(name)
    }
    if doubled := next((name for name in weights if name in plain), None):
        raise CapaError(
            f"{folder}: tensor {doubled} is stored beside its quantized form; download the checkpoint again"
        )
    config = _without_key(checkpoint.config)
    return replace(
        checkpoint,
        config=config,
        tensors=MappingProxyType({**plain, **weights}),
        packed=MappingProxyType({}),
        passed_over={name: dtype for name, dtype in checkpoint.passed_over.items() if name not in consumed},
        translation=_translation(folder, config),
    )


def _weights(folder: Path, stored: Mapping[str, StoredTensor], form: Format) -> Iterator[tuple[str, ExpandedTensor]]:
    """The weights of a format's layers, by name."""
    for module, tensors in _layers(stored, form).items():
        if form.excludes(module):
            raise CapaError(f"{folder}: {module} is quantized, though the config leaves it out; download them again")
        if absent := [part for part in form.REQUIRED if part not in tensors]:
            raise CapaError(f"{folder}: tensor {module}.{absent[0]} is missing; download the checkpoint again")
        parts, main = Parts(module, MappingProxyType(tensors)), tensors[form.REQUIRED[0]]
        shape = form.shape(parts)
        name = f"{module}.weight"
        yield (
            name,
            ExpandedTensor(
                name=name,
                path=main.path,
                numpy_dtype=np.dtype(np.float32),
                shape=shape,
                offset=main.offset,
                nbytes=4 * shape[0] * shape[1],
                form=form,
                parts=parts,
            ),
        )


def _layers(stored: Mapping[str, StoredTensor], form: Format) -> Mapping[str, dict[str, StoredTensor]]:
    """The tensors of quantized layers, by layer and by the last word of their names.

    Raises:
        CapaError: there are none, or one is of another format.
    """
    own = {*form.REQUIRED, *form.OPTIONAL}
    layers = defaultdict[str, dict[str, StoredTensor]](dict)
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        whole = part == "weight" and part in own and tensor.numpy_dtype.name in ("uint8", "float8_e4m3fn")
        if part in FOREIGN and part not in own:
            raise CapaError(
                f"{tensor.path}: tensor {name} is of another format than {form.name}, which the config names; "
                "only one format in a checkpoint is supported"
            )
        if part in FOREIGN or whole:
            layers[module][part] = tensor
    for module, parts in layers.items():
        if "weight" in own and f"{module}.weight" in stored:
            parts["weight"] = stored[f"{module}.weight"]
    if not layers:
        raise CapaError(
            f"the config says {form.name}, and no tensor is quantized; "
            f"take {KEY} out of it if the weights were expanded"
        )
    return layers


def _without_key(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says nothing of quantization, for whoever would look for the format's own library."""
    plain = {key: value for key, value in config.items() if key != KEY}
    for name in TEXT_SECTIONS:
        if isinstance(plain.get(name), dict):
            plain[name] = {key: value for key, value in plain[name].items() if key != KEY}
    return plain


def _translation(folder: Path, config: Mapping[str, Any]) -> Path:
    """A folder of the checkpoint's files but the weights, with another config.

    Raises:
        CapaError: one of them is a link that leaves the checkpoint, or no file.
    """
    scratch = scratch_folder()
    for path in set[Path]().union(*sidecars(folder, code=True).values()):
        if path.name != "config.json":
            place = scratch / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    write_json(scratch / "config.json", config)
    return scratch
