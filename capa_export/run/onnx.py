"""ONNX Runtime runs a bundle's graphs, whole or in slices.

B = batch, T = prompt tokens, D = hidden size, V = vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from capa_export.base.errors import CapaError, first_line
from capa_export.base.machine import freed_at_once
from capa_export.config.provider import Provider
from capa_export.config.target import version_parts
from capa_export.graph.contract import (
    DEEPSTACK_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    PAST_LENGTHS,
    PIXEL_VALUES,
    POSITION_IDS,
    TEXT_POSITIONS,
    is_past,
    is_present,
    past_name,
    past_of,
)
from capa_export.model.prompt import Picture, Prompt
from capa_export.run.providers import check_used, require_provider, run_bound, used_provider
from capa_export.run.runtime import KVCache, RuntimeModel
from capa_export.selectors.selector import TOWER_OUTPUTS

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from capa_export.export.graphs import Graphs

__all__ = ["OnnxModel", "Sessions"]

Sessions = dict[str, tuple[Any, bool]]
"""File -> session, and whether its attention runs in tiles."""

_SUMS_IN_FP32 = (1, 25)
"""ONNX Runtime that computes FP16 attention in FP32 of its own accord."""
NUMPY_TYPES: Mapping[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
"""By ONNX Runtime's names of what its CPU provider computes with."""
_ATTENTION_LIMIT = 1 << 30
"""Bytes of attention weights up to which the graphs run as they are shipped."""


class OnnxModel(RuntimeModel[KVCache]):
    """The graphs of one `onnx/` folder; bf16 graphs compute in FP32 over their bf16 weights.

    Where `binds` says so, as on a GPU, an answer's cache stays on the device between its steps; `follow` copies it.

    Args:
        graphs: the folder, or graphs that are not written, which are always run in slices.
        prefill: the file that stands for prefill's.
        threads: of ONNX Runtime; 0 for its own choice.
        sliced: whether no more than a layer's weights are to be in memory.
        provider: of ONNX Runtime.
        exact: whether products with weights of few bits are computed in FP32, which on a CPU holds INT8 and FP8 in
            FP32, dequantized as the file is opened. Else what enters products with INT4 and INT8 is rounded to INT8,
            32 numbers with one scale, as is ONNX Runtime's default: of INT4 they then take half as long. FP8, for
            which it has no kernel, is then dequantized at every run.
        sessions: by file, those that another model has opened of the same graphs with the same options.

    Raises:
        CapaError: it is not installed here.
    """

    def __init__(
        self,
        graphs: "Path | Graphs",
        *,
        prefill: str = "prefill.onnx",
        threads: int = 0,
        sliced: bool = False,
        provider: Provider = "cpu",
        exact: bool = True,
        sessions: "Sessions | None" = None,
    ) -> None:
        require_provider(provider)
        self.provider: Provider = provider
        self.binds = provider != "cpu" and not sliced
        self.unwritten = None if isinstance(graphs, Path) else graphs
        self.folder = graphs if isinstance(graphs, Path) else Path()
        self.sliced = sliced or self.unwritten is not None
        self.threads, self.prefill_file, self.exact = threads, prefill, exact
        self._scratch = TemporaryDirectory(prefix="capa-export-")
        self._sessions: Sessions = {} if sessions is None else sessions
        self._attention: dict[tuple[str, object], int] = {}

    @property
    def device(self) -> dict[str, Any]:
        return {} if self.provider == "cpu" else {"provider": self.provider}

    def _opened(self, file: str, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Any:
        """The session of a graph; from the first inputs on that are too large for it, one with attention in tiles."""
        session, in_tiles = self._sessions.get(file, (None, False))
        if shapes is not None and not in_tiles and self._attention_bytes(file, shapes) > _ATTENTION_LIMIT:
            # Not both at once: each may hold a copy of the weights.
            self._sessions.pop(file, None)
            session, in_tiles = None, True
        if session is None:
            session = self._session(file, in_tiles=in_tiles)
            self._sessions[file] = session, in_tiles
        return session

    def _attention_bytes(self, file: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
        key = file, tuple(shapes.items())
        if key not in self._attention:
            from capa_export.passes.attention_bytes import attention_bytes

            self._attention[key] = attention_bytes(self._without_weights(file), shapes)
        return self._attention[key]

    def _without_weights(self, file: str) -> "onnx.ModelProto":
        if self.unwritten is None:
            return _proto(self.folder / file)
        import onnx_ir as ir

        from capa_export.run.sliced import without_lazy_weights

        return ir.to_proto(without_lazy_weights(self._graph(file)))

    def _graph(self, file: str) -> "ir.Model":
        """A copy of a graph that may be changed; its weights stay where they are."""
        import onnx_ir as ir

        return ir.load(self.folder / file) if self.unwritten is None else self.unwritten.models[file].clone()

    def _session(self, file: str, *, in_tiles: bool = False) -> Any:
        path = self.folder / file
        bfloat16 = self.unwritten is None and _is_bfloat16(path)
        wide = self.provider == "cpu" and version_parts(_runtime_version()) < _SUMS_IN_FP32
        if not (bfloat16 or in_tiles or wide or self.sliced or self._changes(file)):
            return self._connected(path)
        # Slow to import, and seldom needed to run a bundle.
        import onnx_ir as ir

        from capa_export.passes.tile_attention import TileAttentionPass
        from capa_export.passes.wide_attention import WideAttentionPass
        from capa_export.passes.widen_bf16 import WidenBF16Pass, widen
        from capa_export.run.sliced import SlicedSession

        passes = [*([WideAttentionPass()] if wide else []), *([TileAttentionPass()] if in_tiles else [])]
        changes = [*passes, *self._changes(file)]
        if self.sliced:
            model = self._graph(file)
            for change in [*([WidenBF16Pass()] if bfloat16 else []), *changes]:
                change(model)
            return SlicedSession(model, partial(self._connected, path))
        if bfloat16:
            widened = Path(self._scratch.name) / file
            widen(path, widened)
            path = widened
        if not changes:
            return self._connected(path)
        model = ir.load(path) if bfloat16 else self._graph(file)
        for change in changes:
            change(model)
        return self._connected(path, ir.to_proto(model))

    def _connected(self, path: Path, model: "onnx.ModelProto | None" = None) -> Any:
        """ONNX Runtime's session of a file, or of what was made of it."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        # Errors come as exceptions; the log would say them a second time.
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1" if self.exact else "4")
        held = _weight_types(model or _proto(path))
        # With a scale that another product has, too, one of INT8 is not taken for one.
        disabled = None if self.exact or "INT8" not in held else ["ConstantSharing"]
        if self.exact and self.provider == "cpu" and held & {"INT8", "FLOAT8E4M3FN"}:
            # No kernel multiplies these with FP32: they are dequantized here, and not at every run.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            # In order for its products, a slice's would be in memory twice.
            options.add_session_config_entry("session.disable_prepacking", "1" if self.sliced else "0")
        if model is not None and self.unwritten is None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        if self.sliced:
            # Each output that is kept would keep the whole arena of its slice.
            options.enable_cpu_mem_arena = False
        source = str(path) if model is None else model.SerializeToString()
        try:
            # It copies weights in its own order, one by one.
            with freed_at_once():
                session = onnxruntime.InferenceSession(
                    source, options, providers=used_provider(self.provider), disabled_optimizers=disabled
                )
        except Exception as error:  # ONNX Runtime's exceptions share no public base class.
            raise CapaError(f"{path}: ONNX Runtime cannot load it: {first_line(error)}") from error
        check_used(self.provider, session, path)
        return session

    def _changes(self, file: str) -> Sequence[Callable[["ir.Model"], object]]:  # noqa: ARG002
        """Changes to make in a graph before it is run; none, unless a subclass wants to look inside."""
        return ()

    def _visual(self, picture: Picture) -> Any:
        return self._opened("visual/model.onnx", {PIXEL_VALUES: picture.patches.shape})

    def _prefill(self, prompt: Prompt) -> Any:
        shapes = {INPUTS_EMBEDS: (1, len(prompt.input_ids)), POSITION_IDS: prompt.position_ids.shape}
        return self._opened(f"llm/{self.prefill_file}", {**shapes, TEXT_POSITIONS: prompt.text_positions.shape})

    @property
    def _decode(self) -> Any:
        return self._opened("llm/decode.onnx")

    def load(self, prompt: Prompt) -> None:
        for picture in prompt.pictures:
            self._visual(picture)
        _ = self._prefill(prompt), self._decode, self._embedding

    @cached_property
    def _embedding(self) -> np.ndarray:
        return self.unwritten.embedding.mapped() if self.unwritten else super()._embedding

    @cached_property
    def dtype(self) -> type[np.floating[Any]]:
        name = self._decode.get_inputs()[0].type
        if name not in NUMPY_TYPES:
            raise CapaError(f"{self.folder}: ONNX Runtime is not given {name} here; build with --precision fp16")
        return NUMPY_TYPES[name]

    @cached_property
    def _axes(self) -> int:
        inputs = {entry.name: entry for entry in self._decode.get_inputs()}
        return inputs[POSITION_IDS].shape[0]

    def _deepstack_layers(self, prompt: Prompt) -> int:
        entries = self._prefill(prompt).get_inputs()
        return next((entry.shape[0] for entry in entries if entry.name == DEEPSTACK_EMBEDS), 0)

    def features(self, picture: Picture) -> dict[str, np.ndarray]:
        return self._run(self._visual(picture), {PIXEL_VALUES: picture.patches.astype(self.dtype)})

    def _fill(self, prompt: Prompt, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        session = self._prefill(prompt)
        return self._run(session, self._taken(session, prompt, feed))

    def _run(self, session: Any, feed: Mapping[str, Any]) -> dict[str, Any]:
        """All outputs; keys and values stay on the device where the session binds them."""
        names = [entry.name for entry in session.get_outputs()]
        if self.binds:
            return run_bound(session, feed, self.provider, kept=[name for name in names if is_present(name)])
        return dict(zip(names, session.run(names, feed), strict=True))

    def _taken(self, session: Any, prompt: Prompt, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs that prefill's session takes."""
        # Where no picture is shown, the tower has said nothing.
        empty = {
            entry.name: np.zeros([len(prompt.input_ids), *entry.shape[1:]], NUMPY_TYPES[entry.type])
            for entry in session.get_inputs()
            if entry.name in TOWER_OUTPUTS and entry.name not in feed
        }
        return {entry.name: {**feed, **empty}[entry.name] for entry in session.get_inputs()}

    def follow(
        self,
        prompts: Sequence[Prompt],
        num_keep: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
        embeds: Sequence[Mapping[str, np.ndarray]],
        given: Sequence[Mapping[str, np.ndarray]] | None = None,
        timing: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> list[list[dict[str, np.ndarray]]]:
        """Outputs of each prompt's prefill, and of the steps behind it that are fed tokens which are known.

        All prompts go through the graphs together, so that a sliced one opens each slice once for all of them.

        Args:
            prompts: to run.
            num_keep: visual tokens that each keeps after each stage.
            tokens: what each is fed.
            embeds: what `embed` gives of each.
            given: more inputs of each one's prefill.
            timing: times `prefill` and `decode`, each run of graphs that are not sliced.
        """
        from capa_export.run.sliced import run_lanes

        # The last one is in tiles if any of them has to be.
        prefill = [self._prefill(prompt) for prompt in prompts][-1]
        feeds = map(self._prompt_feed, prompts, num_keep, embeds)
        more = given or [{}] * len(prompts)
        lanes = [
            [self._taken(prefill, prompt, {**feed, **own})]
            for prompt, feed, own in zip(prompts, feeds, more, strict=True)
        ]
        names = [entry.name for entry in prefill.get_outputs()]
        filled = [found for (found,) in run_lanes(prefill, names, lanes, timing=partial(timing, "prefill"))]
        steps = [self._steps(*one) for one in zip(prompts, filled, tokens, strict=True)]
        names = [entry.name for entry in self._decode.get_outputs()]
        carried = {past_name(name): name for name in names if is_present(name)}
        seen = [name for name in names if not is_present(name)]
        followed = run_lanes(self._decode, seen, steps, carried, partial(timing, "decode"))
        return [[first, *others] for first, others in zip(filled, followed, strict=True)]

    def _steps(
        self, prompt: Prompt, filled: Mapping[str, np.ndarray], tokens: Sequence[int]
    ) -> list[dict[str, np.ndarray]]:
        """Decode's inputs at each step; those behind the first go without the cache, which the step before leaves."""
        cache = self._prefilled(prompt, filled).cache
        feeds = [
            {**self._token_feed([[token]], [prompt.next_position + step]), PAST_LENGTHS: cache.lengths + step}
            for step, token in enumerate(tokens)
        ]
        return [{**feeds[0], **cache.tensors}, *feeds[1:]] if feeds else []

    def prompt_bytes(self, num_tokens: int) -> int:
        """Bytes that a prompt leaves of its layers: keys and values, and the hidden states where these are seen."""
        inputs = {entry.name: entry.shape for entry in self._decode.get_inputs()}
        cached = [shape[1] * shape[3] for name, shape in inputs.items() if is_past(name)]
        hidden = len(cached) // 2 * inputs[INPUTS_EMBEDS][-1]
        return num_tokens * (sum(cached) + hidden) * self.dtype().itemsize

    def _cache(self, past: dict[str, Any], lengths: np.ndarray) -> KVCache:
        return KVCache(past, lengths)

    def batch(self, caches: Sequence[KVCache], new_tokens: int) -> KVCache:  # noqa: ARG002 - it grows by itself.
        return caches[0] if len(caches) == 1 else KVCache.stacked([_on_host(cache) for cache in caches])

    def append(
        self, cache: KVCache, tokens: Sequence[Sequence[int]], positions: Sequence[int]
    ) -> tuple[np.ndarray, KVCache]:
        feed = self._token_feed(tokens, positions)
        result = self._append({**feed, PAST_LENGTHS: cache.lengths, **cache.tensors})
        return result[LOGITS], KVCache(past_of(result), cache.lengths + feed[INPUTS_EMBEDS].shape[1])

    def _append(self, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Decode's outputs."""
        return self._run(self._decode, feed)


def _proto(path: Path) -> "onnx.ModelProto":
    """The graph in a file, without its weights."""
    import onnx

    return onnx.load(path, load_external_data=False)


def _weight_types(model: "onnx.ModelProto") -> set[str]:
    """ONNX's names of the types that weights have."""
    import onnx

    return {onnx.TensorProto.DataType.Name(weight.data_type) for weight in model.graph.initializer}


def _runtime_version() -> str:
    import onnxruntime

    return onnxruntime.__version__


def _is_bfloat16(path: Path) -> bool:
    """Whether the ONNX file at `path` has bf16 inputs."""
    import onnx

    inputs = _proto(path).graph.input
    return any(value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16 for value in inputs)


def _on_host(cache: KVCache) -> KVCache:
    """The cache as arrays."""
    tensors = {name: held if isinstance(held, np.ndarray) else held.numpy() for name, held in cache.tensors.items()}
    return KVCache(tensors, cache.lengths)
