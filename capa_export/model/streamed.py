"""A Hugging Face model whose modules hold weights only while they run: they stream from the checkpoint's shards."""

from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from capa_export.base.errors import CapaError, refusing
from capa_export.base.precision import FORMATS
from capa_export.base.progress import Report, silent
from capa_export.model.checkpoint import StoredTensor, canonical_name
from capa_export.model.eager_attention import ATTENTION
from capa_export.model.lockstep import Part
from capa_export.model.quantized.tensor import QuantizedTensor
from capa_export.model.source import Source

__all__ = ["DECODER", "HEAD", "EmbeddingRows", "StoredWeights", "hollow_model", "read_model"]

DECODER, HEAD = "model.language_model.", "lm_head."
"""Prefixes of the parameters of the decoder and of the head."""
_DRAWS = {"kaiming_uniform_", "normal_", "trunc_normal_", "uniform_"}
"""Functions of torch.nn.init, which call themselves with `tensor=` where something else may stand for them."""
_DTYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType[form.onnx]: getattr(torch, form.array) for form in FORMATS.values()
}


class EmbeddingRows(nn.Module):
    """A token embedding that reads the rows it is asked for.

    Args:
        table: where they lie, [V, D].
        weight: the parameter that it stands for, which says the dtype of what comes out.
    """

    def __init__(self, table: StoredTensor, weight: nn.Parameter) -> None:
        super().__init__()
        self.table, self.weight = table, weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.from_numpy(self.table.mapped()[input_ids.numpy()].astype(np.float32)).to(self.weight.dtype)


class StoredWeights:
    """The checkpoint's tensors by the names of the Hugging Face model's parameters.

    Args:
        source: the checkpoint.
        report: told which layer is held.
    """

    def __init__(self, source: Source, report: Report = silent) -> None:
        self.source, self.report = source, report
        self._spare = defaultdict[tuple[tuple[int, ...], torch.dtype], list[Tensor]](list)

    def of(self, name: str, shape: Sequence[int]) -> StoredTensor:
        """Find a parameter in the checkpoint.

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

    def read(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A parameter's weights."""
        stored = self.of(name, shape)
        spare = self._spare[stored.shape, dtype]
        weights = spare.pop() if spare else torch.empty(stored.shape, dtype=dtype)
        if isinstance(stored, QuantizedTensor) and dtype == torch.float32:
            stored.write(weights.numpy())
            return weights
        mapped = torch.from_numpy(stored.mapped().reshape(-1).view(np.uint8)).view(_DTYPES[stored.dtype])
        return weights.copy_(mapped.view(stored.shape))

    def load(self, module: nn.Module, parameters: Mapping[str, Tensor], prefix: str) -> None:
        """Give these parameters of the module their weights, in the dtypes that they have."""
        state = {
            name: self.read(prefix + name, parameter.shape, parameter.dtype) for name, parameter in parameters.items()
        }
        module.load_state_dict(state, strict=False, assign=True)

    def unload(self, module: nn.Module, hollow: Mapping[str, Tensor]) -> None:
        """Take away a module's weights; the next layer of the kind gets their memory, faster than new memory."""
        for name, weights in module.named_parameters():
            if name in hollow:
                self._spare[tuple(weights.shape), weights.dtype].append(weights.data)
        module.load_state_dict(hollow, strict=False, assign=True)

    @contextmanager
    def holding(self, model: Any, part: Part) -> Generator[None]:
        """A part of the hollow model with its weights, until the block ends."""
        text = model.model.language_model
        if part in ("tower", "head"):
            self._spare.clear()
        with ExitStack() as held:
            if part == "tower":
                held.enter_context(self.loaded_beside(model, [DECODER, HEAD]))
            elif part == "head":
                self.report("through the layers", len(text.layers), len(text.layers))
                held.enter_context(self.loaded(text.norm, f"{DECODER}norm."))
                held.enter_context(self.loaded(model.lm_head, HEAD))
            else:
                self.report("through the layers", part, len(text.layers))
                held.enter_context(self.loaded(text.layers[part], f"{DECODER}layers.{part}."))
            yield
        if part in ("tower", "head"):
            self._spare.clear()

    @contextmanager
    def holding_all(self, model: Any) -> Generator[None]:
        """The hollow model's own forward pass, which holds the weights of one block at a time, until the block ends."""
        with self.holding(model, "tower"), self.holding(model, "head"):
            layers = enumerate(model.model.language_model.layers)
            handles = [
                handle
                for number, layer in layers
                for handle in self._loaded_while_it_runs(layer, f"{DECODER}layers.{number}.")
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    @contextmanager
    def loaded(self, module: nn.Module, prefix: str) -> Generator[None]:
        """The module with its weights, until the block ends."""
        hollow = dict(module.named_parameters())
        self.load(module, hollow, prefix)
        try:
            yield
        finally:
            self.unload(module, hollow)

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
            self.unload(model, rest)
            for handle in handles:
                handle.remove()

    def _loaded_while_it_runs(self, block: nn.Module, prefix: str) -> Iterator[Any]:
        hollow = dict(block.named_parameters())

        def before(*_: object) -> None:
            self.load(block, hollow, prefix)

        def after(*_: object) -> None:
            self.unload(block, hollow)

        yield block.register_forward_pre_hook(before)
        yield block.register_forward_hook(after)

    def damaged(self) -> str | None:
        """The first tensor that holds NaN or infinity."""
        for tensor in self.source.tensors.values():
            if not all(np.isfinite(chunk).all() for chunk in tensor.chunks()):
                return tensor.name
        return None


class _NoWeights(TorchFunctionMode):
    """Modules built under it take no memory: torch's layers get their weights from `torch.empty`, buffers do not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        # To draw random numbers for what holds none takes longer than all the rest.
        if getattr(named.get("tensor"), "is_meta", False) and func.__name__ in _DRAWS:
            return named["tensor"]
        return func(*args, **{**named, **({"device": "meta"} if func is torch.empty else {})})


def hollow_model(source: Source, weights: "StoredWeights") -> Any:
    """The Hugging Face model without weights, but for the rows of the embedding table that it is asked for."""
    model = _hollow(source)
    text = model.model.language_model
    table = weights.of(f"{DECODER}embed_tokens.weight", text.embed_tokens.weight.shape)
    text.embed_tokens = EmbeddingRows(table, text.embed_tokens.weight)
    return model.eval()


def read_model(source: Source) -> Any:
    """The Hugging Face model in FP32, from a checkpoint whose tensors transformers itself would not recognize.

    Raises:
        CapaError: a tensor is missing or has another shape.
    """
    model = _hollow(source)
    StoredWeights(source).load(model, dict(model.named_parameters()), "")
    model.tie_weights()
    return model.eval()


def _hollow(source: Source) -> Any:
    import transformers

    folder = source.checkpoint.sidecars
    with refusing(f"{folder}: transformers cannot load it", "use the files that were published together"):
        config = getattr(transformers, source.family.ARCHITECTURE).config_class.from_pretrained(
            folder, local_files_only=True
        )
        if source.head_alone:
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        with _NoWeights():
            model = transformers.AutoModelForImageTextToText.from_config(
                config, dtype=torch.float32, attn_implementation=ATTENTION
            )
    assert not any(buffer.is_meta for buffer in model.buffers())
    return cast("Any", model)
