"""The dimensions of InternVL3 and InternVL3.5, read from `config.json`, and what their vision tower costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from capa_export.base.dims import (
    ModelDims,
    Section,
    TextDefaults,
    decoder_dims,
)
from capa_export.base.errors import CapaError
from capa_export.model.families.internvl3.original import ORIGINAL, translated_config

__all__ = ["VisionDims", "model_dims"]

_QWEN2 = TextDefaults(
    vocab_size=151936,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    num_kv_heads=32,
    attention_bias=True,
    max_positions=32768,
    ties_embeddings=True,
    text_ties_embeddings=False,
)
_DECODERS = {"qwen2": _QWEN2, "qwen3": replace(_QWEN2, attention_bias=False, qk_norm=True, head_dim=128)}
"""Defaults of transformers' config for absent keys, by the `model_type` of the decoder."""
_SHUFFLE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionDims:
    """InternViT over tiles of one size, 2 x 2 patches shuffled into one token, and the projector."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    image_size: int
    """Side of a tile in pixels."""
    patch_size: int
    rms_norm: bool
    """Whether the blocks' norms are RMS norms, as in the 6B tower, instead of layer norms."""
    norm_eps: float
    attention_bias: bool
    """Whether the query, key and value projections have biases."""
    qk_norm: bool
    """Whether queries and keys are normed, across all heads."""
    final_norm: bool
    """Whether a layer norm follows the last block."""
    out_hidden_size: int

    @property
    def patch_values(self) -> int:
        """Numbers per patch."""
        return self.in_channels * self.patch_size**2

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Number of a tile's patches, without [CLS]."""
        return self.side**2

    @property
    def token_side(self) -> int:
        """Visual tokens along one side of a tile."""
        return self.side // _SHUFFLE

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens that a tile becomes."""
        return self.token_side**2

    @property
    def shuffled_size(self) -> int:
        """Channels of the patches that become one visual token."""
        return self.hidden_size * _SHUFFLE**2

    @property
    def num_blocks(self) -> int:
        """Transformer blocks that the graph runs."""
        return self.depth

    @property
    def block_products(self) -> Sequence[tuple[int, int]]:
        """Outputs and inputs of the products with weights in a block."""
        d, f = self.hidden_size, self.intermediate_size
        return (*[(d, d)] * 4, (f, d), (d, f))

    @property
    def num_parameters(self) -> int:
        """Weights, biases, norms and scales, projector included."""
        d, f, out = self.hidden_size, self.intermediate_size, self.out_hidden_size
        embeddings = d * self.patch_values + d + d + (self.num_patches + 1) * d
        attention = 4 * d * d + d + 3 * d * self.attention_bias + 2 * d * self.qk_norm
        norms = 2 * d if self.rms_norm else 4 * d
        block = attention + 2 * d * f + f + d + norms + 2 * d
        projector = 2 * self.shuffled_size + self.shuffled_size * out + out + out * out + out
        return embeddings + self.depth * block + 2 * d * self.final_norm + projector

    def activations(self, limit: Callable[[str], int], *, embedded: bool) -> int:  # noqa: ARG002 - measured of weights that are inputs.
        """Numbers that an engine holds at once, as TensorRT-RTX 1.7 reports.

        One width of the FFN and five of the block a position.
        """
        return limit("tiles") * (self.num_patches + 1) * (self.intermediate_size + 5 * self.hidden_size)

    def flops(self, num_visual: int) -> int:
        """FLOPs of a picture whose tiles become `num_visual` tokens."""
        d, length, out = self.hidden_size, self.num_patches + 1, self.out_hidden_size
        embeddings = 2 * self.num_patches * d * self.patch_values
        block = 2 * length * (4 * d * d + 2 * d * self.intermediate_size) + 4 * length**2 * d
        projector = 2 * self.tokens_per_tile * (self.shuffled_size * out + out * out)
        return ceil(num_visual / self.tokens_per_tile) * (embeddings + self.depth * block + projector)


def model_dims(config: Mapping[str, Any], *, where: str = "config.json") -> ModelDims[VisionDims]:
    """The dimensions of an InternVL3 or InternVL3.5, from the `config.json` of transformers 4 or 5, or of the authors.

    A key that is absent has the value of transformers' config class, except where that would be a guess at
    another model's size.

    Args:
        config: `config.json`, as it is.
        where: its name in error messages.

    Raises:
        CapaError: a key is missing or malformed, or the model does something that the graphs do not.
    """
    key = "text_config"
    if config.get("model_type") == ORIGINAL:
        config, key = translated_config(config, where), "llm_config"
    root = Section(config, where, "")
    if config.get("model_type") != "internvl":
        raise CapaError(
            f"{where}: model_type is {config.get('model_type')!r:.80}, this recipe is for 'internvl' and {ORIGINAL!r}"
        )
    text = replace(root.section("text_config"), name=key)
    decoder = text.data.get("model_type", "qwen2")
    if not isinstance(decoder, str) or decoder not in _DECODERS:
        raise text.refused(
            "model_type",
            f"is {decoder!r:.80}, and the graphs hold dense Qwen2 and Qwen3 decoders alone; use an InternVL3 of 1B, "
            "2B, 8B, 14B or 38B, or a dense InternVL3.5",
        )
    if decoder == "qwen3":
        text.expect("attention_bias", supported=False)
    root.expect("downsample_ratio", 1 / _SHUFFLE)
    root.expect("projector_hidden_act", "gelu")
    root.expect("vision_feature_layer", -1)
    root.expect("vision_feature_select_strategy", "default")
    return ModelDims(
        decoder=decoder_dims(root, text, _DECODERS[decoder]),
        vision=_vision(root.section("vision_config"), text.count("hidden_size")),
        image_token_id=root.count("image_token_id", 151667, least=0),
    )


def _vision(vision: Section, decoder_size: int) -> VisionDims:
    vision.expect("hidden_act", "gelu")
    vision.expect("use_mask_token", supported=False)
    vision.expect("use_absolute_position_embeddings", supported=True)
    norm_type = vision.data.get("norm_type", "layer_norm")
    if norm_type not in ("layer_norm", "rms_norm"):
        raise vision.refused("norm_type", f"is {norm_type!r:.80}, only 'layer_norm' and 'rms_norm' are supported")
    dims = VisionDims(
        depth=vision.layers("num_hidden_layers", 24),
        hidden_size=vision.count("hidden_size"),
        intermediate_size=vision.count("intermediate_size", 4096),
        num_heads=vision.count("num_attention_heads", 16),
        in_channels=vision.count("num_channels", 3),
        image_size=vision.equal_counts("image_size", 448),
        patch_size=vision.equal_counts("patch_size", 14),
        rms_norm=norm_type == "rms_norm",
        norm_eps=vision.number("layer_norm_eps", 1e-6),
        attention_bias=bool(vision.data.get("attention_bias", False)),
        qk_norm=bool(vision.data.get("use_qk_norm", False)),
        final_norm=not vision.data.get("use_mean_pooling", True),
        out_hidden_size=decoder_size,
    )
    if dims.hidden_size % dims.num_heads:
        raise vision.refused("hidden_size", f"{dims.hidden_size} must be a multiple of {dims.num_heads} heads")
    if dims.image_size % (_SHUFFLE * dims.patch_size):
        raise vision.refused(
            "image_size", f"{dims.image_size} must be a multiple of {_SHUFFLE} x {dims.patch_size} pixels"
        )
    return dims
