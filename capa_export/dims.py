"""The dimensions of a model, as every stage needs them, and their reading from `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from capa_export.errors import CapaError

__all__ = ["DecoderDims", "ModelDims", "VisionDims", "qwen25vl_dims"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderDims:
    """A decoder of the Llama and Qwen2 kind."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    """Rotary frequencies that turn with time, height and width; empty for one-dimensional positions."""
    attention_bias: bool
    """Whether the query, key and value projections have biases."""
    tie_word_embeddings: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionDims:
    """A vision transformer with window attention and 2 x 2 merging."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    """Side of an attention window in pixels."""
    fullatt_block_indexes: tuple[int, ...]
    out_hidden_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDims:
    """A whole model."""

    decoder: DecoderDims
    vision: VisionDims
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int


_VISION_THETA = 10_000.0
"""Rotary base of the vision tower, which the graph does not vary."""


def qwen25vl_dims(config: Mapping[str, Any], *, where: str = "config.json") -> ModelDims:
    """The dimensions of a Qwen2.5-VL, from the `config.json` of transformers 4 (flat) or 5 (`text_config`).

    A key that is absent has the value of transformers' config class, except where that would be a guess at
    another model's size.

    Args:
        config: `config.json`, as it is.
        where: its name in error messages.

    Raises:
        CapaError: a key is missing or malformed, or the model does something that the graphs do not.
    """
    root = _Section(config, where, "")
    if config.get("model_type") != "qwen2_5_vl":
        raise CapaError(f"{where}: model_type is {config.get('model_type')!r}, this recipe is for 'qwen2_5_vl'")
    text = root.section("text_config") if config.get("text_config") is not None else root
    for section in (root, text):
        if section.data.get("quantization_config") is not None:
            raise section.refused(
                "quantization_config", "use the checkpoint in bf16, fp16 or fp32 that it was made from"
            )
    return ModelDims(
        decoder=_decoder(root, text),
        vision=_vision(root.section("vision_config"), text.count("hidden_size")),
        image_token_id=root.count("image_token_id", 151655, least=0),
        video_token_id=root.count("video_token_id", 151656, least=0),
        vision_start_token_id=root.count("vision_start_token_id", 151652, least=0),
        vision_end_token_id=root.count("vision_end_token_id", 151653, least=0),
    )


def _decoder(root: "_Section", text: "_Section") -> DecoderDims:
    if text.data.get("use_sliding_window") or "sliding_attention" in (text.data.get("layer_types") or ()):
        raise text.refused("use_sliding_window", "only full attention is supported")
    text.expect("hidden_act", "silu")
    hidden_size, num_heads = text.count("hidden_size"), text.count("num_attention_heads")
    # transformers reads `null` as "no grouping", an absent key as 8.
    grouped = "num_key_value_heads" not in text.data or text.data["num_key_value_heads"] is not None
    num_kv_heads = text.count("num_key_value_heads", 8) if grouped else num_heads
    head_dim = text.count("head_dim", hidden_size // num_heads)
    if head_dim * num_heads != hidden_size:
        raise text.refused("hidden_size", f"{num_heads} heads of {head_dim} must make {hidden_size}")
    if num_heads % num_kv_heads:
        raise text.refused("num_key_value_heads", f"{num_heads} heads must be a multiple of {num_kv_heads}")
    theta, sections = _rope(text, head_dim)
    return DecoderDims(
        hidden_size=hidden_size,
        intermediate_size=text.count("intermediate_size"),
        num_layers=text.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=text.count("vocab_size", 152064),
        rms_norm_eps=text.number("rms_norm_eps", 1e-5),
        rope_theta=theta,
        mrope_section=sections,
        attention_bias=True,
        tie_word_embeddings=bool(root.data.get("tie_word_embeddings") or text.data.get("tie_word_embeddings")),
    )


def _rope(text: "_Section", head_dim: int) -> tuple[float, tuple[int, ...]]:
    """Base and sections: `rope_parameters` in transformers 5, `rope_scaling` beside `rope_theta` in 4."""
    key = "rope_scaling" if text.data.get("rope_scaling") is not None else "rope_parameters"
    rope = text.section(key) if text.data.get(key) is not None else _Section({}, text.where, key)
    rope_type = rope.data.get("rope_type", rope.data.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise rope.refused("rope_type", f"is {rope_type!r}, only 'default' and 'mrope' are supported")
    sections = rope.counts("mrope_section", (16, 24, 24))
    if len(sections) != 3 or 2 * sum(sections) != head_dim:
        raise rope.refused("mrope_section", f"{list(sections)} must be three numbers that make {head_dim // 2}")
    return rope.number("rope_theta", text.number("rope_theta", 1_000_000.0)), sections


def _vision(vision: "_Section", decoder_size: int) -> VisionDims:
    vision.expect("hidden_act", "silu")
    rope = vision.section("rope_parameters") if vision.data.get("rope_parameters") is not None else vision
    rope.expect("rope_type", "axial")
    rope.expect("rope_theta", _VISION_THETA)
    dims = VisionDims(
        depth=vision.count("depth", 32),
        hidden_size=vision.count("hidden_size"),
        intermediate_size=vision.count("intermediate_size", 3420),
        num_heads=vision.count("num_heads", 16),
        in_channels=vision.count("in_channels", 3),
        patch_size=vision.equal_counts("patch_size", 14),
        temporal_patch_size=vision.equal_counts("temporal_patch_size", 2),
        spatial_merge_size=vision.count("spatial_merge_size", 2),
        window_size=vision.count("window_size", 112),
        fullatt_block_indexes=vision.counts("fullatt_block_indexes", (7, 15, 23, 31), least=0),
        out_hidden_size=vision.count("out_hidden_size", 3584),
    )
    if dims.hidden_size % (4 * dims.num_heads):
        raise vision.refused("hidden_size", f"{dims.hidden_size} must be a multiple of 4 x {dims.num_heads} heads")
    if dims.window_size < dims.patch_size * dims.spatial_merge_size:
        raise vision.refused("window_size", f"{dims.window_size} pixels hold no merged patch")
    if dims.out_hidden_size != decoder_size:
        raise vision.refused("out_hidden_size", f"{dims.out_hidden_size} must equal the decoder's {decoder_size}")
    return dims


@dataclass(frozen=True, slots=True)
class _Section:
    """One JSON object of a config, with its place in the file for error messages."""

    data: Mapping[str, Any]
    where: str
    name: str

    def refused(self, key: str, why: str) -> CapaError:
        return CapaError(f"{self._path(key)}: {why}")

    def _path(self, key: str) -> str:
        return f"{self.where}: {self.name}.{key}" if self.name else f"{self.where}: {key}"

    def _value(self, key: str, default: object) -> object:
        value = self.data.get(key, default)
        if value is None:
            raise self.refused(key, "is missing; use the config.json that was published with the weights")
        return value

    def section(self, key: str) -> "_Section":
        value = self._value(key, None)
        if not isinstance(value, dict):
            raise self.refused(key, "must be an object")
        return _Section(cast("dict[str, Any]", value), self.where, f"{self.name}.{key}" if self.name else key)

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.refused(key, f"must be a whole number of at least {least}, not {value!r}")
        return value

    def counts(self, key: str, default: tuple[int, ...], *, least: int = 1) -> tuple[int, ...]:
        value = self._value(key, default)
        if not isinstance(value, list | tuple):
            raise self.refused(key, f"must be a list of whole numbers, not {value!r}")
        items = cast("list[object]", value)
        entries = _Section({f"{key}[{i}]": item for i, item in enumerate(items)}, self.where, self.name)
        return tuple(entries.count(entry, least=least) for entry in entries.data)

    def equal_counts(self, key: str, default: int) -> int:
        """A number that transformers also takes as a list of one per axis."""
        if not isinstance(self.data.get(key), list):
            return self.count(key, default)
        values = set(self.counts(key, ()))
        if len(values) != 1:
            raise self.refused(key, f"must be the same on every axis, not {sorted(values)}")
        return values.pop()

    def number(self, key: str, default: float) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self.refused(key, f"must be a number above 0, not {value!r}")
        return float(value)

    def expect(self, key: str, supported: object) -> None:
        """Refuse any value but this one, which is also the default."""
        value = self._value(key, supported)
        if value != supported:
            raise self.refused(key, f"is {value!r}, only {supported!r} is supported")
