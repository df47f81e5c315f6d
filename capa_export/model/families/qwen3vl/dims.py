"""Qwen3-VL's dimensions, read from `config.json`, and what its vision tower costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

from capa_export.base.dims import (
    DecoderDims,
    ModelDims,
    Section,
    TextDefaults,
    decoder_dims,
)
from capa_export.base.errors import CapaError
from capa_export.model.families.qwen25vl.dims import expect_plain_vision_rope

__all__ = ["VisionDims", "model_dims"]

_TEXT = TextDefaults(
    vocab_size=151936,
    rms_norm_eps=1e-6,
    rope_theta=500_000.0,
    num_kv_heads=32,
    attention_bias=False,
    context=128000,
    mrope_section=(24, 20, 20),
    mrope_interleaved=True,
    qk_norm=True,
    head_dim=128,
    text_ties_embeddings=False,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionDims:
    """A vision transformer whose blocks all see the whole picture, with 2 x 2 merging behind several of them."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_positions: int
    """Positions of the learned table, along a side."""
    deepstack_visual_indexes: tuple[int, ...]
    """Blocks whose outputs go to the first decoder layers, ascending."""
    out_hidden_size: int

    @property
    def patch_values(self) -> int:
        """Numbers per patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_size(self) -> int:
        """Channels of the patches that become one visual token."""
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def num_blocks(self) -> int:
        """Transformer blocks that the graph runs."""
        return self.depth

    @property
    def block_products(self) -> Sequence[tuple[int, int]]:
        """Outputs and inputs of the products with weights in a block."""
        d, f = self.hidden_size, self.intermediate_size
        return ((3 * d, d), (d, d), (f, d), (d, f))

    @property
    def num_parameters(self) -> int:
        """Weights, biases and norms, mergers included."""
        d, f, merged, out = self.hidden_size, self.intermediate_size, self.merged_size, self.out_hidden_size
        embeddings = d * self.patch_values + d + self.num_positions**2 * d
        block = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
        merger = merged * merged + merged + merged * out + out
        norms = 2 * d + len(self.deepstack_visual_indexes) * 2 * merged
        return embeddings + self.depth * block + (1 + len(self.deepstack_visual_indexes)) * merger + norms

    def activations(self, limit: Callable[[str], int], *, embedded: bool) -> int:
        """Numbers that an engine holds at once, as TensorRT-RTX 1.7 reports.

        Two widths of the FFN and seven of the block a patch, 4% too many; nine where weights are embedded.
        """
        patches = self.spatial_merge_size**2 * limit("frames") * limit("rows") * limit("cols")
        return patches * (2 * self.intermediate_size + (9 if embedded else 7) * self.hidden_size)

    def flops(self, num_visual: int) -> int:
        """FLOPs of a picture, as square as it can be, that becomes `num_visual` tokens."""
        side = self.spatial_merge_size * max(1, isqrt(num_visual))
        patches, d = side * side, self.hidden_size
        positions = 2 * side * self.num_positions**2 * d + 2 * patches * self.num_positions * d
        blocks = self.depth * (2 * patches * (4 * d * d + 2 * d * self.intermediate_size) + 4 * patches**2 * d)
        tokens = patches // self.spatial_merge_size**2
        merger = 2 * tokens * (self.merged_size**2 + self.merged_size * self.out_hidden_size)
        mergers = (1 + len(self.deepstack_visual_indexes)) * merger
        return 2 * patches * d * self.patch_values + positions + blocks + mergers


def model_dims(config: Mapping[str, Any], *, where: str = "config.json") -> ModelDims[VisionDims]:
    """The dimensions of a dense Qwen3-VL, from the `config.json` of transformers 4 or 5.

    A key that is absent has the value of transformers' config class, except where that would be a guess at
    another model's size.

    Args:
        config: `config.json`, as it is.
        where: its name in error messages.

    Raises:
        CapaError: a key is missing or malformed, or the model does something that the graphs do not.
    """
    root = Section(config, where, "")
    if config.get("model_type") == "qwen3_vl_moe":
        raise CapaError(
            f"{where}: model_type is 'qwen3_vl_moe', a mixture of experts, which the graphs do not hold; "
            "use a dense Qwen3-VL: 2B, 4B, 8B or 32B"
        )
    if config.get("model_type") != "qwen3_vl":
        raise CapaError(f"{where}: model_type is {config.get('model_type')!r:.80}, this recipe is for 'qwen3_vl'")
    text, vision = root.section("text_config"), root.section("vision_config")
    text.expect("attention_bias", supported=False)
    decoder = decoder_dims(root, text, _TEXT)
    tower = _vision(vision, decoder)
    return ModelDims(
        decoder=replace(decoder, deepstack_layers=len(tower.deepstack_visual_indexes)),
        vision=tower,
        image_token_id=root.count("image_token_id", 151655, least=0),
    )


def _vision(vision: Section, decoder: DecoderDims) -> VisionDims:
    vision.expect("hidden_act", "gelu_pytorch_tanh")
    expect_plain_vision_rope(vision)
    positions = vision.count("num_position_embeddings", 2304)
    dims = VisionDims(
        depth=vision.layers("depth", 27),
        hidden_size=vision.count("hidden_size", 1152),
        intermediate_size=vision.count("intermediate_size", 4304),
        num_heads=vision.count("num_heads", 16),
        in_channels=vision.count("in_channels", 3),
        patch_size=vision.equal_counts("patch_size", 16),
        temporal_patch_size=vision.equal_counts("temporal_patch_size", 2),
        spatial_merge_size=vision.count("spatial_merge_size", 2),
        num_positions=isqrt(positions),
        deepstack_visual_indexes=vision.counts("deepstack_visual_indexes", (8, 16, 24), least=0),
        out_hidden_size=vision.count("out_hidden_size", 3584),
    )
    if dims.hidden_size % (4 * dims.num_heads):
        raise vision.refused("hidden_size", f"{dims.hidden_size} must be a multiple of 4 x {dims.num_heads} heads")
    if dims.num_positions**2 != positions:
        raise vision.refused("num_position_embeddings", f"{positions} must be a square")
    if dims.out_hidden_size != decoder.hidden_size:
        raise vision.refused(
            "out_hidden_size", f"{dims.out_hidden_size} must equal the decoder's {decoder.hidden_size}"
        )
    blocks = list(dims.deepstack_visual_indexes)
    if blocks != sorted(set(blocks)) or any(block >= dims.depth for block in blocks):
        raise vision.refused(
            "deepstack_visual_indexes", f"{blocks} must rise and be of the blocks 0 to {dims.depth - 1}"
        )
    if len(blocks) > decoder.num_layers:
        raise vision.refused(
            "deepstack_visual_indexes", f"{len(blocks)} outputs are more than {decoder.num_layers} decoder layers"
        )
    return dims
