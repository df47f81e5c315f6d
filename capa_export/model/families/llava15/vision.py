"""LLaVA-1.5's vision tower: CLIP up to the selected layer, and the projector to the decoder's size.

B = pictures, S = positions (class token and patches), N = B*S, D = hidden size, H = heads, d = head size.
"""

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from capa_export.graph.build import END, Input, Output, build_model
from capa_export.graph.contract import IMAGE_FEATURES, PIXEL_VALUES
from capa_export.graph.layers import LayerNorm, Linear, attention, class_attention, tokens_from_heads
from capa_export.model.families.llava15.dims import VisionDims

__all__ = ["vision_model"]


class PositionEmbedding(nn.Module):
    """Adds a learned vector to each position."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([dims.num_positions, dims.hidden_size], dtype)

    def forward(self, op: OpBuilder, x_BSD: ir.Value) -> ir.Value:
        return op.Add(x_BSD, self.weight)


class Embeddings(nn.Module):
    """The class token, then the patches row by row: a convolution whose stride is its kernel is one product each."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__()
        self.dims = dims
        self.class_embedding = nn.Parameter([dims.hidden_size], dtype)
        self.patch_embedding = Linear(dims.patch_values, dims.hidden_size, dtype)
        self.position_embedding = PositionEmbedding(dims, dtype)

    def forward(self, op: OpBuilder, pixel_values: ir.Value) -> ir.Value:
        dims = self.dims
        cut = op.Reshape(pixel_values, [-1, dims.num_channels, dims.grid, dims.patch_size, dims.grid, dims.patch_size])
        patches = op.Reshape(op.Transpose(cut, perm=[0, 2, 4, 1, 3, 5]), [-1, dims.patch_values])
        patches_BPD = op.Reshape(self.patch_embedding(op, patches), [-1, dims.grid**2, dims.hidden_size])
        one_each = op.Concat(op.Shape(pixel_values, start=0, end=1), [1, 1], axis=0)
        class_B1D = op.Expand(self.class_embedding, one_each)
        return self.position_embedding(op, op.Concat(class_B1D, patches_BPD, axis=1))


class VisionAttention(nn.Module):
    """Attention within each picture."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__()
        self.dims = dims
        size = dims.hidden_size
        self.q_proj = Linear(size, size, dtype, bias=True)
        self.k_proj = Linear(size, size, dtype, bias=True)
        self.v_proj = Linear(size, size, dtype, bias=True)
        self.out_proj = Linear(size, size, dtype, bias=True)

    def forward(self, op: OpBuilder, x_ND: ir.Value, seen: list[ir.Value] | None = None) -> ir.Value:
        """[N, D]; `seen` gets what the class token pays to each position, [B, S] FP32."""
        dims = self.dims
        head_size = dims.hidden_size // dims.num_heads
        by_picture = [-1, dims.num_positions, dims.num_heads, head_size]
        query, key, value = (
            op.Transpose(op.Reshape(project(op, x_ND), by_picture), perm=[0, 2, 1, 3])
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if seen is not None:
            seen.append(class_attention(op, query, key, head_size))
        mixed = attention(op, query, key, value, head_size)
        return self.out_proj(op, tokens_from_heads(op, mixed, dims.hidden_size))


class MLP(nn.Module):
    """Two projections with CLIP's x * sigmoid(1.702 x) between them."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__()
        self.fc1 = Linear(dims.hidden_size, dims.intermediate_size, dtype, bias=True)
        self.fc2 = Linear(dims.intermediate_size, dims.hidden_size, dtype, bias=True)

    def forward(self, op: OpBuilder, x_ND: ir.Value) -> ir.Value:
        inner = self.fc1(op, x_ND)
        return self.fc2(op, op.Mul(inner, op.Sigmoid(op.Mul(inner, 1.702))))


class EncoderLayer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(dims.hidden_size, dims.layer_norm_eps, dtype)
        self.self_attn = VisionAttention(dims, dtype)
        self.layer_norm2 = LayerNorm(dims.hidden_size, dims.layer_norm_eps, dtype)
        self.mlp = MLP(dims, dtype)

    def forward(self, op: OpBuilder, x_ND: ir.Value, seen: list[ir.Value] | None = None) -> ir.Value:
        x_ND = op.Add(x_ND, self.self_attn(op, self.layer_norm1(op, x_ND), seen))
        return op.Add(x_ND, self.mlp(op, self.layer_norm2(op, x_ND)))


class Encoder(nn.Module):
    """The layers up to the selected one."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(dims, dtype) for _ in range(dims.num_run_layers)])

    def forward(self, op: OpBuilder, x_ND: ir.Value, seen: list[ir.Value] | None = None) -> ir.Value:
        *earlier, last = self.layers
        for layer in earlier:
            x_ND = layer(op, x_ND)
        return last(op, x_ND, seen)


class VisionTower(nn.Module):
    """Pixel values to the selected layer's output [tokens, D], the class token dropped unless it is wanted."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__("vision_tower")
        self.dims = dims
        self.embeddings = Embeddings(dims, dtype)
        # The checkpoints spell it so.
        self.pre_layrnorm = LayerNorm(dims.hidden_size, dims.layer_norm_eps, dtype)
        self.encoder = Encoder(dims, dtype)

    def forward(self, op: OpBuilder, pixel_values: ir.Value, seen: list[ir.Value] | None = None) -> ir.Value:
        dims = self.dims
        x_BSD = self.pre_layrnorm(op, self.embeddings(op, pixel_values))
        x_ND = self.encoder(op, op.Reshape(x_BSD, [-1, dims.hidden_size]), seen)
        if dims.keeps_class_token:
            return x_ND
        x_BSD = op.Reshape(x_ND, [-1, dims.num_positions, dims.hidden_size])
        return op.Reshape(op.Slice(x_BSD, [1], [END], [1]), [-1, dims.hidden_size])


class Projector(nn.Module):
    """Two projections with a GELU between them."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__("multi_modal_projector")
        self.linear_1 = Linear(dims.hidden_size, dims.out_hidden_size, dtype, bias=dims.projector_bias)
        self.linear_2 = Linear(dims.out_hidden_size, dims.out_hidden_size, dtype, bias=dims.projector_bias)

    def forward(self, op: OpBuilder, x_ND: ir.Value) -> ir.Value:
        return self.linear_2(op, op.Gelu(self.linear_1(op, x_ND)))


def vision_model(dims: VisionDims, dtype: ir.DataType, *, selection: bool = False) -> ir.Model:
    """Pictures to visual tokens.

    Input: pixel_values [tiles, 3, side, side], the image processor's. Output: image_features [tokens, D], picture
    after picture, each row by row.

    With `selection` also saliency [tokens] FP32, what the class token pays to each in the layer whose output is taken
    (VisPruner, arXiv 2412.01818), mean over heads; and tower_features, that output. Where the class token goes to the
    decoder, it is a visual token like the others: its saliency is what it pays to itself.
    """
    shape = ("tiles", dims.num_channels, dims.image_size, dims.image_size)

    def trace(op: OpBuilder, values: dict[str, ir.Value]) -> list[Output]:
        seen: list[ir.Value] = []
        x_ND = VisionTower(dims, dtype)(op, values[PIXEL_VALUES], seen if selection else None)
        outputs: list[Output] = [
            (IMAGE_FEATURES, Projector(dims, dtype)(op, x_ND), ("tokens", dims.out_hidden_size)),
        ]
        for weights_BS in seen:
            kept = weights_BS if dims.keeps_class_token else op.Slice(weights_BS, [1], [END], [1])
            outputs.append(("saliency", op.Reshape(kept, [-1]), ("tokens",)))
            outputs.append(("tower_features", x_ND, ("tokens", dims.hidden_size)))
        return outputs

    return build_model("visual", [Input(PIXEL_VALUES, dtype, shape)], trace)
