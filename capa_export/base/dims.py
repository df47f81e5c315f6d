"""The dimensions of a model that every stage needs, and the reading of `config.json`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

from capa_export.base.errors import CapaError
from capa_export.base.weight_types import PackedLayers

__all__ = ["DecoderDims", "ModelDims", "Section", "TextDefaults", "VisionDims", "decoder_dims"]

MOST = 1 << 24
"""Largest dimension that a config may name: the longest published context is 10 million, and a vocabulary is a
sixtieth of it; no array of one dimension that is made before the weights are looked at takes more than 128 MB."""
MOST_LAYERS = 1000
"""Layers of a decoder or a vision tower: five times the deepest that is published. The graph is written layer by layer
before it is held against the weights."""
_HUGE = 1e12
"""Bound of a factor or a base, far above any published one, and within FP32."""
_LONGEST = 4096
"""Entries of a list: one a layer, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderDims:
    """The dimensions of a decoder of the Llama, Qwen2 and Qwen3 kind."""

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
    """Whether the config says that the embedding table is the LM head too."""
    ties_missing_head: bool = False
    """Whether transformers uses the embedding table where no LM head is stored, for which it may read another flag."""
    rope_limit: int | None = None
    """Positions from which on the rotary frequencies would depend on the length; None for never."""
    context: int = 32768
    """Positions that the config says the decoder is for."""
    mrope_interleaved: bool = False
    """Whether time, height and width take turns among the frequencies, rather than one section each."""
    qk_norm: bool = False
    """Whether each head's queries and keys are normed before they are rotated."""
    deepstack_layers: int = 0
    """First layers behind which visual tokens gain features of their own from the vision tower."""
    packed: PackedLayers | None = None
    """What graphs hold the weights of the layers in; None where they are plain."""
    num_plain: int = 0
    """Layers that are plain all the same."""
    packed_head: PackedLayers | None = None
    """What they hold the weight of the LM head in."""

    @property
    def longest(self) -> int:
        """Positions of prompt and answer together."""
        return self.context if self.rope_limit is None else min(self.context, self.rope_limit)

    @property
    def position_axes(self) -> int:
        """Rows of the position ids: time, height and width, or one."""
        return len(self.mrope_section) or 1


class VisionDims(Protocol):
    """The facts about a vision tower that every stage may ask for; its family knows the rest."""

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks that the graph runs."""
        ...

    @property
    def num_parameters(self) -> int:
        """Number of weights, biases and norm scales, projector included."""
        ...

    @property
    def block_products(self) -> Sequence[tuple[int, int]]:
        """Outputs and inputs of every matrix product with a weight in a block."""
        ...

    def flops(self, num_visual: int) -> int:
        """FLOPs of one picture that becomes `num_visual` visual tokens."""
        ...

    def activations(self, limit: Callable[[str], int], *, embedded: bool) -> int:
        """Most numbers that the tower's engine holds at once.

        Args:
            limit: gives the largest size of a named dimension.
            embedded: whether the weights are in the engine.
        """
        ...


V = TypeVar("V", bound=VisionDims)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDims(Generic[V]):
    """The dimensions of a whole model."""

    decoder: DecoderDims
    vision: V
    image_token_id: int
    """Token that stands in the prompt for every visual token."""

    packed_vision: PackedLayers | None = None
    """What graphs hold the weights of the vision tower's blocks in; None where they are plain."""

    @property
    def packings(self) -> Mapping[str, PackedLayers]:
        """What graphs hold weights of few bits in, by the option that decides it."""
        named = {
            "--quantize": self.decoder.packed,
            "--quantize-head": self.decoder.packed_head,
            "--quantize-vision": self.packed_vision,
        }
        return {option: packed for option, packed in named.items() if packed is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextDefaults:
    """The values of transformers' text config for keys that `config.json` leaves out."""

    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    num_kv_heads: int | None
    """None for as many as there are query heads."""
    attention_bias: bool
    mrope_section: tuple[int, ...] = ()
    """Empty for one-dimensional positions."""
    context: int = 32768
    max_positions: int | None = None
    """Set where published configs ask for dynamic RoPE, which is plain up to this many positions."""
    mrope_interleaved: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    """Set where heads have a size of their own; None where they must make up the hidden size."""
    ties_embeddings: bool = False
    """Whether the embedding table stands for a missing LM head where `config.json` leaves that out."""
    text_ties_embeddings: bool = True
    """Whether the flag also counts in `text_config`, where transformers 4 saved it."""
    hidden_size: int | None = None
    """None, as for the sizes below, where a default would be a guess at another model's."""
    intermediate_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None


def decoder_dims(root: "Section", text: "Section", defaults: TextDefaults) -> DecoderDims:
    """Read a decoder's dimensions from a `text_config`, or from a flat config that is its own.

    Raises:
        CapaError: a key is missing or malformed, or the decoder does something that the graphs do not.
    """
    layer_types = text.data.get("layer_types")
    if text.data.get("use_sliding_window") or (isinstance(layer_types, list) and "sliding_attention" in layer_types):
        raise text.refused("use_sliding_window", "only full attention is supported")
    text.expect("hidden_act", "silu")
    hidden_size = text.count("hidden_size", defaults.hidden_size)
    num_heads = text.count("num_attention_heads", defaults.num_heads)
    # transformers reads `null` as "no grouping".
    given = text.data.get("num_key_value_heads", defaults.num_kv_heads)
    num_kv_heads = num_heads if given is None else text.count("num_key_value_heads", defaults.num_kv_heads)
    head_dim = text.count("head_dim", defaults.head_dim or hidden_size // num_heads)
    if defaults.head_dim is None and head_dim * num_heads != hidden_size:
        raise text.refused("hidden_size", f"{num_heads} heads of {head_dim} must make {hidden_size}")
    if num_heads % num_kv_heads:
        raise text.refused("num_key_value_heads", f"{num_heads} heads must be a multiple of {num_kv_heads}")
    theta, sections, limit = _rope(text, head_dim, defaults)
    return DecoderDims(
        hidden_size=hidden_size,
        intermediate_size=text.count("intermediate_size", defaults.intermediate_size),
        num_layers=text.layers("num_hidden_layers", defaults.num_layers),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=text.count("vocab_size", defaults.vocab_size),
        rms_norm_eps=text.number("rms_norm_eps", defaults.rms_norm_eps),
        rope_theta=theta,
        mrope_section=sections,
        attention_bias=defaults.attention_bias,
        tie_word_embeddings=bool(root.data.get("tie_word_embeddings") or text.data.get("tie_word_embeddings")),
        ties_missing_head=bool(
            root.data.get("tie_word_embeddings", defaults.ties_embeddings)
            or (defaults.text_ties_embeddings and text.data.get("tie_word_embeddings"))
        ),
        rope_limit=limit,
        context=text.count("max_position_embeddings", defaults.context),
        mrope_interleaved=defaults.mrope_interleaved,
        qk_norm=defaults.qk_norm,
    )


def _rope(text: "Section", head_dim: int, defaults: TextDefaults) -> tuple[float, tuple[int, ...], int | None]:
    """RoPE's base, sections and limit, from `rope_parameters`, or as transformers 4 wrote them beside `rope_theta`."""
    key = "rope_scaling" if text.data.get("rope_scaling") is not None else "rope_parameters"
    rope = text.section(key) if text.data.get(key) is not None else Section({}, text.where, key)
    supported = ["default"]
    supported += ["mrope"] if defaults.mrope_section else []
    supported += ["dynamic"] if defaults.max_positions else []
    rope_type = rope.data.get("rope_type", rope.data.get("type", "default"))
    if rope_type not in supported:
        known = " and ".join(map(repr, supported))
        raise rope.refused("rope_type", f"is {rope_type!r:.80}, only {known} are supported")
    theta = rope.number("rope_theta", text.number("rope_theta", defaults.rope_theta))
    limit = text.count("max_position_embeddings", defaults.max_positions) if rope_type == "dynamic" else None
    if not defaults.mrope_section:
        return theta, (), limit
    sections = rope.counts("mrope_section", defaults.mrope_section)
    if len(sections) != 3 or 2 * sum(sections) != head_dim:
        raise rope.refused("mrope_section", f"{list(sections)} must be three numbers that make {head_dim // 2}")
    rope.expect("mrope_interleaved", defaults.mrope_interleaved)
    return theta, sections, limit


@dataclass(frozen=True, slots=True)
class Section:
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

    def section(self, key: str) -> "Section":
        value = self._value(key, None)
        if not isinstance(value, dict):
            raise self.refused(key, "must be an object")
        return Section(cast("dict[str, Any]", value), self.where, f"{self.name}.{key}" if self.name else key)

    def count(self, key: str, default: int | None = None, *, least: int = 1, most: int = MOST) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.refused(key, f"must be a whole number of at least {least}, not {value!r:.80}")
        if value > most:
            raise self.refused(key, f"must be at most {most}, not {value!r:.80}")
        return value

    def layers(self, key: str, default: int | None = None) -> int:
        """A number of layers."""
        return self.count(key, default, most=MOST_LAYERS)

    def counts(self, key: str, default: tuple[int, ...], *, least: int = 1) -> tuple[int, ...]:
        value = self._value(key, default)
        if not isinstance(value, list | tuple):
            raise self.refused(key, f"must be a list of whole numbers, not {value!r:.80}")
        items = cast("list[object]", value)
        if len(items) > _LONGEST:
            raise self.refused(key, f"has {len(items)} entries, {_LONGEST} at most are read")
        entries = Section({f"{key}[{i}]": item for i, item in enumerate(items)}, self.where, self.name)
        return tuple(entries.count(entry, least=least) for entry in entries.data)

    def equal_counts(self, key: str, default: int) -> int:
        """A count that transformers also reads as a list of one per axis, all equal."""
        if not isinstance(self.data.get(key), list):
            return self.count(key, default)
        values = set(self.counts(key, ()))
        if len(values) != 1:
            raise self.refused(key, f"must be the same on every axis, not {sorted(values)}")
        return values.pop()

    def number(self, key: str, default: float) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _HUGE:
            raise self.refused(key, f"must be a number above 0 and below {_HUGE:g}, not {value!r:.80}")
        return float(value)

    def expect(self, key: str, supported: object) -> None:
        """Refuse any value but this one, which is also the default."""
        value = self._value(key, supported)
        if value != supported:
            raise self.refused(key, f"is {value!r:.80}, only {supported!r} is supported")
