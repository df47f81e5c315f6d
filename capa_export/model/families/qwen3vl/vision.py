"""Qwen3-VL's vision tower: attention over whole frames, and mergers behind several blocks (DeepStack).

F = frames, R x C = grid of merged units (m x m patches each), M = m*m, N = F*R*C*M patches, V = F*R*C visual tokens,
D = hidden size, S = positions along a side of the learned table, L = DeepStack layers. The grid is in the *shape* of
the input, so that positions follow from shapes alone and no operator depends on data.
"""

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder, nn

from capa_export.graph.build import Input, Output, build_model
from capa_export.graph.contract import DEEPSTACK_FEATURES, IMAGE_FEATURES, PIXEL_VALUES
from capa_export.graph.layers import LayerNorm, Linear
from capa_export.model.families.qwen3vl.dims import VisionDims
from capa_export.model.families.qwen25vl.vision import Layout, PatchEmbed, VisionAttention, rotary_angles

__all__ = ["vision_model"]

_EPSILON = 1e-6


class PositionTable(nn.Module):
    """A square of learned vectors, stretched over the grid corner to corner and read between its entries."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__()
        self.side, self.size, self.merge = dims.num_positions, dims.hidden_size, dims.spatial_merge_size
        self.dtype = dtype
        self.weight = nn.Parameter([self.side**2, self.size], dtype)

    def forward(self, op: OpBuilder, rows: ir.Value, cols: ir.Value) -> ir.Value:
        """A position vector per patch of a frame [1, R*C*M, D], from the numbers of units [1] down and across."""
        side, size, merge = self.side, self.size, self.merge
        table = op.Reshape(op.Cast(self.weight, to=ir.DataType.FLOAT), [side, side * size])
        strips = op.Reshape(op.MatMul(self._weights(op, rows), table), [-1, side, size])
        grid = op.MatMul(self._weights(op, cols), strips)
        by_unit = op.Reshape(grid, op.Concat(rows, [merge], cols, [merge * size], axis=0))
        ordered = op.Reshape(op.Transpose(by_unit, perm=[0, 2, 1, 3]), [1, -1, size])
        return op.Cast(ordered, to=self.dtype)

    def _weights(self, op: OpBuilder, units: ir.Value) -> ir.Value:
        """Share of each of S entries in each patch along one side [patches, S]: 1 at its place, 0 from the next on."""
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        count = op.Squeeze(op.Mul(units, [self.merge]), [0])
        last = op.Cast(op.Max(op.Sub(count, one), one), to=ir.DataType.FLOAT)
        index = op.Cast(op.Range(zero, count, one), to=ir.DataType.FLOAT)
        place = op.Unsqueeze(op.Div(op.Mul(index, float(self.side - 1)), last), [1])
        entries = op.Constant(value=ir.tensor(np.arange(self.side, dtype=np.float32)))
        return op.Relu(op.Sub(1.0, op.Abs(op.Sub(place, entries))))


class MLP(nn.Module):
    """Two projections with a GELU between them."""

    def __init__(self, size: int, inner: int, out: int, dtype: ir.DataType, *, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.linear_fc1 = Linear(size, inner, dtype, bias=True)
        self.linear_fc2 = Linear(inner, out, dtype, bias=True)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return self.linear_fc2(op, op.Gelu(self.linear_fc1(op, x), approximate=self.approximate))


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__()
        size = dims.hidden_size
        self.norm1 = LayerNorm(size, _EPSILON, dtype)
        self.attn = VisionAttention(size, dims.num_heads, dtype)
        self.norm2 = LayerNorm(size, _EPSILON, dtype)
        self.mlp = MLP(size, dims.intermediate_size, size, dtype, approximate="tanh")

    def forward(self, op: OpBuilder, x_ND: ir.Value, layout: Layout) -> ir.Value:
        x_ND = op.Add(x_ND, self.attn(op, self.norm1(op, x_ND), layout))
        return op.Add(x_ND, self.mlp(op, self.norm2(op, x_ND)))


class Merger(MLP):
    """Merges each unit of patches to one visual token; the norm sees single patches, or the whole unit."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType, *, norms_unit: bool) -> None:
        super().__init__(dims.merged_size, dims.merged_size, dims.out_hidden_size, dtype, approximate="none")
        self.unit, self.norms_unit = dims.merged_size, norms_unit
        self.norm = LayerNorm(dims.merged_size if norms_unit else dims.hidden_size, _EPSILON, dtype)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """[N, D] -> [V, out]."""
        if self.norms_unit:
            return super().forward(op, self.norm(op, op.Reshape(x, [-1, self.unit])))
        return super().forward(op, op.Reshape(self.norm(op, x), [-1, self.unit]))


class VisionTower(nn.Module):
    """The whole tower: pixel values to visual tokens, in the order of the picture, and what DeepStack adds to them."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__("visual")
        self.dims, self.dtype = dims, dtype
        self.patch_embed = PatchEmbed(dims.patch_values, dims.hidden_size, dtype, bias=True)
        self.pos_embed = PositionTable(dims, dtype)
        self.blocks = nn.ModuleList([VisionBlock(dims, dtype) for _ in range(dims.depth)])
        self.merger = Merger(dims, dtype, norms_unit=False)
        self.deepstack_merger_list = nn.ModuleList(
            [Merger(dims, dtype, norms_unit=True) for _ in dims.deepstack_visual_indexes]
        )

    def forward(self, op: OpBuilder, pixel_values: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """Visual tokens [V, out], and those that each DeepStack layer adds."""
        dims = self.dims
        frames, rows, cols = (op.Shape(pixel_values, start=axis, end=axis + 1) for axis in (0, 1, 2))
        patches_ND = self.patch_embed(op, op.Reshape(pixel_values, [-1, dims.patch_values]))
        by_frame = op.Reshape(patches_ND, op.Concat(frames, [-1, dims.hidden_size], axis=0))
        x_ND = op.Reshape(op.Add(by_frame, self.pos_embed(op, rows, cols)), [-1, dims.hidden_size])

        head_size = dims.hidden_size // dims.num_heads
        angles = rotary_angles(op, (frames, rows, cols), head_size, dims.spatial_merge_size)
        per_frame = op.Reshape(angles, op.Concat(frames, [-1, head_size // 2], axis=0))
        cos, sin = (op.Cast(table, to=self.dtype) for table in (op.Cos(per_frame), op.Sin(per_frame)))
        layout = Layout(cos, sin, None)
        mergers = dict(zip(dims.deepstack_visual_indexes, self.deepstack_merger_list, strict=True))
        deepstack: list[ir.Value] = []
        for index, block in enumerate(self.blocks):
            x_ND = block(op, x_ND, layout)
            if index in mergers:
                deepstack.append(mergers[index](op, x_ND))
        return self.merger(op, x_ND), deepstack


def vision_model(dims: VisionDims, dtype: ir.DataType) -> ir.Model:
    """Pictures of one size, or the frame pairs of a video, to visual tokens.

    Input: pixel_values [F, R, C, M, values], the image processor's patches with their grid as the shape. Outputs:
    image_features [V, D], in the order of the picture; deepstack_features [L, V, D], if the model has any.
    """
    shape = ("frames", "rows", "cols", dims.spatial_merge_size**2, dims.patch_values)

    def trace(op: OpBuilder, values: dict[str, ir.Value]) -> list[Output]:
        features, deepstack = VisionTower(dims, dtype)(op, values[PIXEL_VALUES])
        outputs: list[Output] = [(IMAGE_FEATURES, features, ("tokens", dims.out_hidden_size))]
        if deepstack:
            stacked = op.Concat(*(op.Unsqueeze(part, [0]) for part in deepstack), axis=0)
            outputs.append((DEEPSTACK_FEATURES, stacked, (len(deepstack), "tokens", dims.out_hidden_size)))
        return outputs

    return build_model("visual", [Input(PIXEL_VALUES, dtype, shape)], trace)
