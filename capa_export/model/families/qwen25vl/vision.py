"""Qwen2.5-VL's vision tower: window attention, with a few blocks that see the whole picture.

F = frames, R x C = grid of merged units (2 x 2 patches each), M = patches per unit, N = F*R*C*M patches, D = hidden
size, H = heads, d = head size, W = windows of w x w units, L = patches per window. The grid is in the *shape* of the
input, so that windows, positions and masks follow from shapes alone and no operator depends on data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder, nn

from capa_export.base.precision import FP16_MAX
from capa_export.graph.build import Input, Output, build_model
from capa_export.graph.contract import IMAGE_FEATURES, PIXEL_VALUES
from capa_export.graph.layers import GatedMLP, Linear, RMSNorm, attention, mean_attention, tokens_from_heads
from capa_export.graph.rotary import rotary_frequencies
from capa_export.model.families.qwen25vl.dims import VisionDims, last_full_block

__all__ = ["Layout", "PatchEmbed", "VisionAttention", "rotary_angles", "vision_model"]

_EPSILON = 1e-6


@dataclass(frozen=True)
class Layout:
    """The layout of one attention call's patches: `groups` that attend within themselves."""

    cos: ir.Value
    """[groups, L, d/2]"""
    sin: ir.Value
    mask: ir.Value | None
    """Additive key mask [groups, 1, L, L], where windows hold padding."""


class Windows:
    """Cuts the grid into windows of w x w units, padded at the right and bottom, and puts it together again."""

    def __init__(self, op: OpBuilder, pixel_values: ir.Value, side: int, merge: int) -> None:
        self.side, self.merge = side, merge
        sides = [op.Shape(pixel_values, start=axis, end=axis + 1) for axis in (0, 1, 2)]
        self.frames, self.rows, self.cols = sides
        self.num_rows, self.num_cols = (op.Div(op.Add(size, [side - 1]), [side]) for size in (self.rows, self.cols))
        self.padded_rows, self.padded_cols = (op.Mul(count, [side]) for count in (self.num_rows, self.num_cols))

    def grid(self, op: OpBuilder, x_ND: ir.Value, size: int) -> ir.Value:
        """[N, D] -> [F, R, C, M*D]."""
        return op.Reshape(x_ND, op.Concat(self.frames, self.rows, self.cols, [self.merge * size], axis=0))

    def split(self, op: OpBuilder, x_ND: ir.Value, size: int) -> ir.Value:
        """[N, D] -> [W*L, D], zeros where there is no patch."""
        side, merge = self.side, self.merge
        row_padding, col_padding = op.Sub(self.padded_rows, self.rows), op.Sub(self.padded_cols, self.cols)
        padded = op.Pad(self.grid(op, x_ND, size), op.Concat([0, 0, 0, 0, 0], row_padding, col_padding, [0], axis=0))
        strips = op.Reshape(padded, op.Concat([-1, side], self.num_cols, [side * merge * size], axis=0))
        return op.Reshape(op.Transpose(strips, perm=[0, 2, 1, 3]), [-1, size])

    def join(self, op: OpBuilder, x_WLD: ir.Value, size: int) -> ir.Value:
        """[W*L, D] -> [N, D], the padding dropped."""
        side, merge = self.side, self.merge
        strips = op.Reshape(x_WLD, op.Concat([-1], self.num_cols, [side, side * merge * size], axis=0))
        padded = op.Concat(self.frames, self.padded_rows, self.padded_cols, [merge * size], axis=0)
        grid = op.Reshape(op.Transpose(strips, perm=[0, 2, 1, 3]), padded)
        cropped = op.Slice(grid, [0, 0], op.Concat(self.rows, self.cols, axis=0), [1, 2])
        return op.Reshape(cropped, [-1, size])


class VisionAttention(nn.Module):
    """Attention within each group of patches."""

    def __init__(self, size: int, num_heads: int, dtype: ir.DataType, *, query_parts: int = 1) -> None:
        """`query_parts` divides the length of every group: how many parts of it are scored one after the other."""
        super().__init__()
        self.size, self.num_heads, self.query_parts = size, num_heads, query_parts
        self.qkv = Linear(self.size, 3 * self.size, dtype, bias=True)
        self.proj = Linear(self.size, self.size, dtype, bias=True)

    def forward(self, op: OpBuilder, x_ND: ir.Value, layout: Layout, seen: list[ir.Value] | None = None) -> ir.Value:
        """[N, D]; `seen` gets what each patch of a group is paid by the group, [groups, L] FP32, mean over queries."""
        head_size = self.size // self.num_heads
        by_group = op.Concat(op.Shape(layout.cos, start=0, end=2), [self.num_heads, head_size], axis=0)
        query, key, value = (
            op.Transpose(op.Reshape(part, by_group), perm=[0, 2, 1, 3])
            for part in op.Split(self.qkv(op, x_ND), axis=1, num_outputs=3, _outputs=3)
        )
        query, key = (op.RotaryEmbedding(part, layout.cos, layout.sin) for part in (query, key))
        if seen is not None:
            seen.append(self._received(op, query, key))
        mixed = attention(op, query, key, value, head_size, mask=layout.mask)
        return self.proj(op, tokens_from_heads(op, mixed, self.size))

    def _received(self, op: OpBuilder, query: ir.Value, key: ir.Value) -> ir.Value:
        """Head by head and a part of the queries at a time, as all L*L weights at once are too many."""
        heads, parts = self.num_heads, self.query_parts
        queries, keys = (op.Split(x, axis=1, num_outputs=heads, _outputs=heads) for x in (query, key))
        means = [
            mean_attention(op, part, head_key, self.size // heads)
            for head_query, head_key in zip(queries, keys, strict=True)
            for part in op.Split(head_query, axis=2, num_outputs=parts, _outputs=parts)
        ]
        total_GL = op.Sum(*means)
        total_GL.dtype = ir.DataType.FLOAT
        return op.Mul(total_GL, 1 / len(means))


class VisionBlock(nn.Module):
    """Pre-norm transformer block over windows, or over the whole picture."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType, *, windowed: bool) -> None:
        super().__init__()
        self.size, self.windowed = dims.hidden_size, windowed
        self.norm1 = RMSNorm(dims.hidden_size, _EPSILON, dtype)
        parts = dims.spatial_merge_size**2
        self.attn = VisionAttention(dims.hidden_size, dims.num_heads, dtype, query_parts=parts)
        self.norm2 = RMSNorm(dims.hidden_size, _EPSILON, dtype)
        self.mlp = GatedMLP(dims.hidden_size, dims.intermediate_size, dtype, bias=True)

    def forward(
        self,
        op: OpBuilder,
        x_ND: ir.Value,
        whole: Layout,
        windows: Windows,
        windowed: Layout,
        seen: list[ir.Value] | None = None,
    ) -> ir.Value:
        normed = self.norm1(op, x_ND)
        if self.windowed:
            mixed = self.attn(op, windows.split(op, normed, self.size), windowed)
            x_ND = op.Add(x_ND, windows.join(op, mixed, self.size))
        else:
            x_ND = op.Add(x_ND, self.attn(op, normed, whole, seen))
        return op.Add(x_ND, self.mlp(op, self.norm2(op, x_ND)))


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel: one product per patch."""

    def __init__(self, num_values: int, size: int, dtype: ir.DataType, *, bias: bool = False) -> None:
        super().__init__()
        self.proj = Linear(num_values, size, dtype, bias=bias)

    def forward(self, op: OpBuilder, patches: ir.Value) -> ir.Value:
        return self.proj(op, patches)


class MergerMLP(nn.Module):
    """The checkpoint's `mlp.0` and `mlp.2` with a GELU between them."""

    def __init__(self, size: int, out: int, dtype: ir.DataType) -> None:
        super().__init__()
        setattr(self, "0", Linear(size, size, dtype, bias=True))
        setattr(self, "2", Linear(size, out, dtype, bias=True))

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        first, second = self.children()
        return second(op, op.Gelu(first(op, x)))


class Merger(nn.Module):
    """Merges each unit of 2 x 2 patches to one visual token."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__()
        self.size = dims.hidden_size * dims.spatial_merge_size**2
        self.ln_q = RMSNorm(dims.hidden_size, _EPSILON, dtype)
        self.mlp = MergerMLP(self.size, dims.out_hidden_size, dtype)

    def forward(self, op: OpBuilder, x_ND: ir.Value) -> ir.Value:
        return self.mlp(op, op.Reshape(self.ln_q(op, x_ND), [-1, self.size]))


class VisionTower(nn.Module):
    """The whole tower: pixel values to visual tokens, in the order of the picture."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__("visual")
        self.dims, self.dtype = dims, dtype
        self.patch_embed = PatchEmbed(dims.patch_values, dims.hidden_size, dtype)
        self.blocks = nn.ModuleList(
            [VisionBlock(dims, dtype, windowed=index not in dims.fullatt_block_indexes) for index in range(dims.depth)]
        )
        self.merger = Merger(dims, dtype)

    def forward(self, op: OpBuilder, pixel_values: ir.Value, seen: list[ir.Value] | None = None) -> ir.Value:
        dims = self.dims
        side = dims.window_size // dims.spatial_merge_size // dims.patch_size
        windows = Windows(op, pixel_values, side, dims.spatial_merge_size**2)
        whole, windowed = self._layouts(op, windows)
        x_ND = self.patch_embed(op, op.Reshape(pixel_values, [-1, dims.patch_values]))
        scoring = None if seen is None else last_full_block(dims.fullatt_block_indexes, dims.depth)
        for index, block in enumerate(self.blocks):
            x_ND = block(op, x_ND, whole, windows, windowed, seen if index == scoring else None)
        return self.merger(op, x_ND)

    def _layouts(self, op: OpBuilder, windows: Windows) -> tuple[Layout, Layout]:
        """Rotary tables of the picture as a whole and cut into windows, with the mask of the windows' padding."""
        dims, merge = self.dims, self.dims.spatial_merge_size
        half = dims.hidden_size // dims.num_heads // 2
        length = windows.side**2 * merge**2
        sides = (windows.frames, windows.rows, windows.cols)
        angles = rotary_angles(op, sides, dims.hidden_size // dims.num_heads, merge)
        per_frame = op.Concat(windows.frames, [-1, half], axis=0)

        def table(function: str, *, by_window: bool) -> ir.Value:
            values = windows.split(op, angles, half) if by_window else angles
            shape = [-1, length, half] if by_window else per_frame
            return op.Cast(getattr(op, function)(op.Reshape(values, shape)), to=self.dtype)

        ones = op.Expand(op.Constant(value_floats=[1.0]), op.Concat(op.Shape(angles, start=0, end=1), [1], axis=0))
        is_patch = op.Reshape(windows.split(op, ones, 1), [-1, 1, 1, length])
        # One row per query: ONNX Runtime does not broadcast the mask over them.
        mask = op.Expand(op.Cast(op.Mul(op.Sub(is_patch, 1.0), FP16_MAX), to=self.dtype), [1, 1, length, 1])
        return (
            Layout(table("Cos", by_window=False), table("Sin", by_window=False), None),
            Layout(table("Cos", by_window=True), table("Sin", by_window=True), mask),
        )


def rotary_angles(op: OpBuilder, sides: Sequence[ir.Value], head_size: int, merge: int) -> ir.Value:
    """Rotary angles [N, d/2] in FP32: the first half turns with the patch's row, the second with its column.

    Args:
        op: builder.
        sides: frames, rows and columns of merged units, [1] each.
        head_size: d.
        merge: patches along a unit's side.
    """
    frames, rows, cols = sides
    quarter = head_size // 4
    frequency = rotary_frequencies(10000.0, quarter)
    within = np.arange(merge * merge)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)

    def angles(count: ir.Value, offset: np.ndarray, shape: list[int]) -> ir.Value:
        unit = op.Mul(op.Range(zero, op.Squeeze(count, [0]), one), op.Constant(value_int=merge))
        position = op.Add(op.Reshape(unit, shape), op.Constant(value=ir.tensor(offset.reshape(1, 1, 1, -1, 1))))
        return op.Mul(op.Cast(position, to=ir.DataType.FLOAT), op.Constant(value=ir.tensor(frequency)))

    full = op.Concat(frames, rows, cols, [merge * merge, quarter], axis=0)
    row = op.Expand(angles(rows, within // merge, [1, -1, 1, 1, 1]), full)
    col = op.Expand(angles(cols, within % merge, [1, 1, -1, 1, 1]), full)
    return op.Reshape(op.Concat(row, col, axis=-1), [-1, 2 * quarter])


def vision_model(dims: VisionDims, dtype: ir.DataType, *, selection: bool = False) -> ir.Model:
    """Pictures of one size, or the frame pairs of a video, to visual tokens.

    Input: pixel_values [F, R, C, M, values], the image processor's patches with their grid as the shape. Output:
    image_features [F*R*C, D], in the order of the picture.

    With `selection` also saliency [F*R*C] FP32, the attention that each unit receives in the last block that sees
    whole frames, mean over heads, queries of its frame, and patches (VisPruner, arXiv 2412.01818, as LightCompress has
    it for this tower); and tower_features, the visual tokens again.

    Raises:
        CapaError: `selection`, and no block sees whole frames.
    """
    shape = ("frames", "rows", "cols", dims.spatial_merge_size**2, dims.patch_values)

    def trace(op: OpBuilder, values: dict[str, ir.Value]) -> list[Output]:
        seen: list[ir.Value] = []
        features = VisionTower(dims, dtype)(op, values[PIXEL_VALUES], seen if selection else None)
        outputs: list[Output] = [(IMAGE_FEATURES, features, ("tokens", dims.out_hidden_size))]
        for paid in seen:
            by_unit = op.Reshape(paid, [-1, dims.spatial_merge_size**2])
            outputs.append(("saliency", op.ReduceMean(by_unit, [1], keepdims=0), ("tokens",)))
            outputs.append(("tower_features", op.Identity(features), ("tokens", dims.out_hidden_size)))
        return outputs

    return build_model("visual", [Input(PIXEL_VALUES, dtype, shape)], trace)
