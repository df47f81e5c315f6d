"""Qwen2.5-VL's dimensions, read from `config.json`, and what its vision tower costs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from capa_export.base.dims import (
    ModelDims,
    Section,
    TextDefaults,
    decoder_dims,
)
from capa_export.base.errors import CapaError, ExitCode

__all__ = ["VisionDims", "VisionFlops", "expect_plain_vision_rope", "last_full_block", "model_dims", "vision_flops"]

_VISION_THETA = 10_000.0
"""Rotary base of the vision tower, which the graph does not vary."""
_TEXT = TextDefaults(
    vocab_size=152064,
    rms_norm_eps=1e-5,
    rope_theta=1_000_000.0,
    num_kv_heads=8,
    attention_bias=True,
    mrope_section=(16, 24, 24),
)


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
    video_token_id: int
    """Stands in the prompt for every visual token of a video."""
    tokens_per_second: float
    """Temporal positions that a second of video takes."""

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
        return ((3 * d, d), (d, d), (f, d), (f, d), (d, f))

    @property
    def num_parameters(self) -> int:
        """Weights, biases and norms, merger included."""
        d, f, merged = self.hidden_size, self.intermediate_size, self.merged_size
        block = 4 * d * d + 4 * d + 3 * d * f + 2 * f + d + 2 * d
        merger = d + merged * merged + merged + merged * self.out_hidden_size + self.out_hidden_size
        return d * self.patch_values + self.depth * block + merger

    def activations(self, limit: Callable[[str], int], *, embedded: bool) -> int:
        """Numbers that an engine holds at once, as TensorRT-RTX 1.7 reports.

        Two widths of the FFN and seven of the block a patch, 4% too many; nine where weights are embedded.
        """
        patches = self.spatial_merge_size**2 * limit("frames") * limit("rows") * limit("cols")
        return patches * (2 * self.intermediate_size + (9 if embedded else 7) * self.hidden_size)

    def flops(self, num_visual: int) -> int:
        """FLOPs of a picture, as square as it can be, that becomes `num_visual` tokens."""
        side = self.spatial_merge_size * max(1, isqrt(num_visual))
        return vision_flops(self, rows=side, cols=side).total


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionFlops:
    """FLOPs of one picture's pass through the vision tower."""

    num_patches: int
    num_visual: int
    """Tokens that the decoder gets."""
    patch_embed: int
    linear: int
    """Attention projections and FFNs of all blocks."""
    window_attention: int
    """Windows as they lie on the picture, without padding."""
    full_attention: int
    merger: int
    total: int


def model_dims(config: Mapping[str, Any], *, where: str = "config.json") -> ModelDims[VisionDims]:
    """The dimensions of a Qwen2.5-VL, from the `config.json` of transformers 4 (flat) or 5 (`text_config`).

    A key that is absent has the value of transformers' config class, except where that would be a guess at
    another model's size.

    Args:
        config: `config.json`, as it is.
        where: its name in error messages.

    Raises:
        CapaError: a key is missing or malformed, or the model does something that the graphs do not.
    """
    root = Section(config, where, "")
    if config.get("model_type") != "qwen2_5_vl":
        raise CapaError(f"{where}: model_type is {config.get('model_type')!r:.80}, this recipe is for 'qwen2_5_vl'")
    text = root.section("text_config") if config.get("text_config") is not None else root
    return ModelDims(
        decoder=decoder_dims(root, text, _TEXT),
        vision=_vision(root, text.count("hidden_size")),
        image_token_id=root.count("image_token_id", 151655, least=0),
    )


def _vision(root: "Section", decoder_size: int) -> VisionDims:
    vision = root.section("vision_config")
    vision.expect("hidden_act", "silu")
    expect_plain_vision_rope(vision)
    dims = VisionDims(
        depth=vision.layers("depth", 32),
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
        video_token_id=root.count("video_token_id", 151656, least=0),
        tokens_per_second=vision.number("tokens_per_second", 4),
    )
    if dims.hidden_size % (4 * dims.num_heads):
        raise vision.refused("hidden_size", f"{dims.hidden_size} must be a multiple of 4 x {dims.num_heads} heads")
    if dims.window_size < dims.patch_size * dims.spatial_merge_size:
        raise vision.refused("window_size", f"{dims.window_size} pixels hold no merged patch")
    if dims.out_hidden_size != decoder_size:
        raise vision.refused("out_hidden_size", f"{dims.out_hidden_size} must equal the decoder's {decoder_size}")
    return dims


def expect_plain_vision_rope(vision: Section) -> None:
    """Refuse any rotary positions but those of `rotary_angles`."""
    rope = vision.section("rope_parameters") if vision.data.get("rope_parameters") is not None else vision
    rope.expect("rope_type", "axial")
    rope.expect("rope_theta", _VISION_THETA)


def last_full_block(fullatt_block_indexes: Iterable[int], depth: int) -> int:
    """The last block in which all patches of a frame attend to each other: the tower's last, as published.

    Raises:
        CapaError: there is none.
    """
    block = max((index for index in fullatt_block_indexes if index < depth), default=None)
    if block is None:
        raise CapaError(
            "vision_config.fullatt_block_indexes: names no block, so the vision tower's attention compares no whole "
            "pictures; choose a selector that does not read it, or prune inside the decoder"
        )
    return block


def vision_flops(dims: VisionDims, *, rows: int, cols: int, frames: int = 1) -> VisionFlops:
    """Count one picture.

    Args:
        dims: of the vision tower.
        rows: patches from top to bottom.
        cols: patches from left to right.
        frames: temporal patches; full attention stays within one.

    Raises:
        CapaError: the grid cannot be merged.
    """
    merge, d = dims.spatial_merge_size, dims.hidden_size
    if rows % merge or cols % merge or min(rows, cols, frames) < 1:
        raise CapaError(f"a grid of {frames} x {rows} x {cols} patches must be a multiple of {merge}", ExitCode.USAGE)
    patches = frames * rows * cols
    side = dims.window_size // merge // dims.patch_size * merge
    heights, widths = ([min(side, length - start) for start in range(0, length, side)] for length in (rows, cols))
    window_pairs = frames * sum((h * w) ** 2 for h in heights for w in widths)
    num_full = len(set(dims.fullatt_block_indexes) & set(range(dims.depth)))
    merged, tokens = dims.merged_size, patches // merge**2
    parts = {
        "patch_embed": 2 * patches * d * dims.patch_values,
        "linear": dims.depth * 2 * patches * (4 * d * d + 3 * d * dims.intermediate_size),
        "window_attention": (dims.depth - num_full) * 4 * window_pairs * d,
        "full_attention": num_full * 4 * frames * (rows * cols) ** 2 * d,
        "merger": 2 * tokens * (merged * merged + merged * dims.out_hidden_size),
    }
    return VisionFlops(num_patches=patches, num_visual=tokens, total=sum(parts.values()), **parts)
