"""Calibration of a model that exceeds memory: activations on disk, one layer's weights at a time.

T = prompt tokens, D = hidden size.
"""

import io
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from capa_export.bind import check_disk
from capa_export.calibrate import Measurement, measuring
from capa_export.calibration import Calibration
from capa_export.checkpoint import StoredTensor, canonical_name
from capa_export.eager import EagerInputs
from capa_export.errors import CapaError
from capa_export.export import Source
from capa_export.progress import Report, silent, tracked
from capa_export.prompt import Prompter
from capa_export.samples import Samples

__all__ = ["calibrate_layerwise"]

_DTYPES = {ir.DataType.BFLOAT16: torch.bfloat16, ir.DataType.FLOAT16: torch.float16, ir.DataType.FLOAT: torch.float32}
_DECODER, _HEAD = "model.language_model.", "lm_head."
_FILE_OVERHEAD = 16 << 10
"""Bytes of a sample's files beside its states and positions: headers, and blocks that are not full."""


def calibrate_layerwise(
    source: Source,
    prompter: Prompter,
    samples: Samples,
    *,
    checkpoint_digest: str,
    folder: Path,
    report: Report = silent,
) -> Calibration:
    """What `calibrate` measures, on the model's own modules; they hold weights only while they run.

    Args:
        source: the checkpoint.
        prompter: of that checkpoint.
        samples: pictures and questions.
        checkpoint_digest: for the calibration.
        folder: takes the hidden states of all samples, [T, D] FP32 each, until the run ends, however it ends.
        report: progress.

    Raises:
        CapaError: the disk is too small, a tensor is missing, or the model yields NaN or infinity.
    """
    dims = source.dims.decoder
    lengths = [
        len(prompter.chat(sample.turns).input_ids)
        for sample in tracked(samples, "measure prompts", samples.count, report)
    ]
    per_token = 4 * dims.hidden_size * (1 + dims.deepstack_layers) + 32
    check_disk(folder, sum(length * per_token + _FILE_OVERHEAD for length in lengths))
    weights = _Weights(source)
    model = _hollow(source)
    with (
        TemporaryDirectory(dir=folder, prefix="activations-") as shelf,
        torch.no_grad(),
        measuring(model) as measurement,
    ):
        _look(model, weights, prompter, samples, Path(shelf), measurement, report)
        _decode(model, weights, samples.count, Path(shelf), measurement, report)
        return measurement.calibration(checkpoint_digest, samples.count)


def _look(
    model: Any,
    weights: "_Weights",
    prompter: Prompter,
    samples: Samples,
    shelf: Path,
    measurement: Measurement,
    report: Report,
) -> None:
    """Put what every sample feeds the decoder on the shelf."""
    text = model.model.language_model
    text.embed_tokens = _Rows(weights.of(f"{_DECODER}embed_tokens.weight", text.embed_tokens.weight.shape))
    with weights.loaded_beside(model, [_DECODER, _HEAD]):
        for index, sample in enumerate(tracked(samples, "look at pictures", samples.count, report)):
            prompt = prompter.chat(sample.turns)
            is_visual = torch.from_numpy(prompt.is_visual)
            embeds, *others = EagerInputs.of(weights.source.family.eager_inputs(model, prompt))[:3]
            measurement.add(is_visual, weights.damaged)
            _write(shelf / f"{index}.hidden", embeds)
            _write(shelf / f"{index}.others", [is_visual, *others])


def _decode(model: Any, weights: "_Weights", count: int, shelf: Path, measurement: Measurement, report: Report) -> None:
    """Take every sample through the decoder, all of them through one layer before the next."""
    text = model.model.language_model
    layers, norm = list(text.layers), text.norm
    text.norm = nn.Identity()
    for number, layer in enumerate(layers):
        # The model's own forward, for its masks, its rotary tables and what it does between layers.
        text.layers = nn.ModuleList(layer if other is layer else _Skipped() for other in layers)
        with weights.loaded(layer, f"{_DECODER}layers.{number}."):
            for index in range(count):
                report("calibrate layer by layer", number * count + index, len(layers) * count)
                hidden = torch.load(shelf / f"{index}.hidden")
                is_visual, position_ids, deepstack = torch.load(shelf / f"{index}.others")
                inputs = EagerInputs(hidden, position_ids, _of_layer(deepstack, number))
                hidden = text(**inputs.arguments(is_visual), use_cache=False).last_hidden_state
                measurement.add(is_visual, weights.damaged)
                _write(shelf / f"{index}.hidden", hidden)
    with weights.loaded(norm, f"{_DECODER}norm."):
        for index in range(count):
            norm(torch.load(shelf / f"{index}.hidden"))
            measurement.add(torch.empty(0, dtype=torch.bool), weights.damaged)
    report("calibrate layer by layer", len(layers) * count, len(layers) * count)


def _of_layer(deepstack: Sequence[Tensor], number: int) -> list[Tensor]:
    """What the model adds behind its layers, without what is not added behind this one."""
    if number >= len(deepstack):
        return []
    return [*(torch.zeros_like(features) for features in deepstack[:number]), deepstack[number]]


class _Skipped(nn.Module):
    """In the place of a decoder layer that is not the one at work."""

    def forward(self, hidden: Tensor, **_: object) -> Tensor:
        return hidden


class _Rows(nn.Module):
    """A token embedding that reads the rows it is asked for."""

    def __init__(self, table: StoredTensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: Tensor) -> Tensor:
        table = self.table
        mapped = np.memmap(table.path, table.dtype.numpy(), "r", table.offset, table.shape)
        return torch.from_numpy(mapped[input_ids.numpy()].astype(np.float32))


class _Weights:
    """The checkpoint's tensors by the names of the Hugging Face model's parameters."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def of(self, name: str, shape: Sequence[int]) -> StoredTensor:
        """Where a parameter lies.

        Raises:
            CapaError: nowhere, or it has another shape.
        """
        tensors = self.source.tensors
        canonical = canonical_name(name, self.source.family.RENAMES)
        if canonical not in tensors:
            raise CapaError(
                f"{self.source.checkpoint.folder}: tensor {canonical} is missing; download the checkpoint again"
            )
        stored = tensors[canonical]
        if stored.shape != tuple(shape):
            raise CapaError(
                f"{stored.path}: tensor {stored.name} has shape {list(stored.shape)}, config.json implies "
                f"{list(shape)}; check that weights and config belong together"
            )
        return stored

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """A parameter's weights in FP32."""
        stored = self.of(name, shape)
        weights, done = torch.empty(stored.shape), 0
        flat = weights.view(-1)
        for chunk in stored.chunks():
            flat[done : done + chunk.size] = torch.from_numpy(chunk.view(np.uint8)).view(_DTYPES[stored.dtype])
            done += chunk.size
        return weights

    def load(self, module: nn.Module, parameters: Mapping[str, Tensor], prefix: str) -> None:
        """Give these parameters of the module their weights."""
        state = {name: self.read(prefix + name, parameter.shape) for name, parameter in parameters.items()}
        module.load_state_dict(state, strict=False, assign=True)

    @contextmanager
    def loaded(self, module: nn.Module, prefix: str) -> Generator[None]:
        """The module with its weights, until the block ends."""
        hollow = dict(module.named_parameters())
        self.load(module, hollow, prefix)
        try:
            yield
        finally:
            module.load_state_dict(hollow, strict=False, assign=True)

    @contextmanager
    def loaded_beside(self, model: Any, outside: Sequence[str]) -> Generator[None]:
        """The model with its weights except those `outside`; what stands in a list of blocks has them while it runs."""
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        lists = [name for name in lists if not name.startswith(tuple(outside))]
        handles = [
            handle
            for name in lists
            for index, block in enumerate(model.get_submodule(name))
            for handle in self._loaded_while_it_runs(block, f"{name}.{index}.")
        ]
        elsewhere = (*outside, *(f"{name}." for name in lists))
        rest = {name: value for name, value in model.named_parameters() if not name.startswith(elsewhere)}
        self.load(model, rest, "")
        try:
            yield
        finally:
            model.load_state_dict(rest, strict=False, assign=True)
            for handle in handles:
                handle.remove()

    def _loaded_while_it_runs(self, block: nn.Module, prefix: str) -> Iterator[Any]:
        hollow = dict(block.named_parameters())

        def before(*_: object) -> None:
            self.load(block, hollow, prefix)

        def after(*_: object) -> None:
            block.load_state_dict(hollow, strict=False, assign=True)

        yield block.register_forward_pre_hook(before)
        yield block.register_forward_hook(after)

    def damaged(self) -> str | None:
        """The first tensor that holds NaN or infinity."""
        for tensor in self.source.tensors.values():
            if not all(np.isfinite(chunk).all() for chunk in tensor.chunks()):
                return tensor.name
        return None


class _WithoutWeights(TorchFunctionMode):
    """Modules built under it take no memory: torch's layers get their weights from `torch.empty`, buffers do not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def _hollow(source: Source) -> Any:
    """The Hugging Face model without weights."""
    import transformers

    folder = source.checkpoint.folder
    try:
        config = getattr(transformers, source.family.ARCHITECTURE).config_class.from_pretrained(
            folder, local_files_only=True
        )
        with _WithoutWeights():
            model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise CapaError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from error
    assert not any(buffer.is_meta for buffer in model.buffers())
    return cast("Any", model).eval()


def _write(path: Path, value: object) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    # torch's own writer turns a full disk into an error without a number.
    path.write_bytes(buffer.getbuffer())
