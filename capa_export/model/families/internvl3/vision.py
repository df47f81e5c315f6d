"""InternViT and InternVL3's projector: every tile of a picture is attended to as a whole, and on its own.

B = tiles, S = patches along a tile's side, L = S*S + 1 tokens with [CLS], D = hidden size, H = heads, d = head size.
"""

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from capa_export.graph.build import END, Input, Output, build_model
from capa_export.graph.contract import IMAGE_FEATURES, PIXEL_VALUES
from capa_export.graph.layers import LayerNorm, Linear, RMSNorm, attention, class_attention, tokens_from_heads
from capa_export.model.families.internvl3.dims import VisionDims

__all__ = ["vision_model"]

_PROJECTOR_EPSILON = 1e-5
_QK_EPSILON = 1e-6


def _norm(dims: VisionDims, dtype: ir.DataType) -> LayerNorm | RMSNorm:
    return (RMSNorm if dims.rms_norm else LayerNorm)(dims.hidden_size, dims.norm_eps, dtype)


class PatchEmbeddings(nn.Module):
    """A convolution whose stride is its kernel: one product per patch."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__()
        self.dims = dims
        self.projection = Linear(dims.patch_values, dims.hidden_size, dtype, bias=True)

    def forward(self, op: OpBuilder, pixel_values: ir.Value) -> ir.Value:
        dims = self.dims
        grid = op.Reshape(pixel_values, [-1, dims.in_channels, dims.side, dims.patch_size, dims.side, dims.patch_size])
        patches = op.Reshape(op.Transpose(grid, perm=[0, 2, 4, 1, 3, 5]), [-1, dims.patch_values])
        return op.Reshape(self.projection(op, patches), [-1, dims.num_patches, dims.hidden_size])


class Embeddings(nn.Module):
    """[CLS] and the patches, with their learned positions."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__()
        self.size = dims.hidden_size
        self.cls_token = nn.Parameter([1, 1, self.size], dtype)
        self.position_embeddings = nn.Parameter([1, dims.num_patches + 1, self.size], dtype)
        self.patch_embeddings = PatchEmbeddings(dims, dtype)

    def forward(self, op: OpBuilder, pixel_values: ir.Value) -> ir.Value:
        """[B*L, D]."""
        patches = self.patch_embeddings(op, pixel_values)
        first = op.Expand(self.cls_token, op.Concat(op.Shape(patches, start=0, end=1), [1, self.size], axis=0))
        tokens = op.Add(op.Concat(first, patches, axis=1), self.position_embeddings)
        return op.Reshape(tokens, [-1, self.size])


class VisionAttention(nn.Module):
    """Attention within each tile."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__()
        self.dims, size = dims, dims.hidden_size
        self.q_proj = Linear(size, size, dtype, bias=dims.attention_bias)
        self.k_proj = Linear(size, size, dtype, bias=dims.attention_bias)
        self.v_proj = Linear(size, size, dtype, bias=dims.attention_bias)
        self.projection_layer = Linear(size, size, dtype, bias=True)
        self.q_norm = RMSNorm(size, _QK_EPSILON, dtype) if dims.qk_norm else None
        self.k_norm = RMSNorm(size, _QK_EPSILON, dtype) if dims.qk_norm else None

    def forward(self, op: OpBuilder, x_TD: ir.Value, seen: list[ir.Value] | None = None) -> ir.Value:
        """[B*L, D]; `seen` gets what [CLS] pays to each token, [B, L] FP32."""
        dims = self.dims
        head_size = dims.hidden_size // dims.num_heads
        query, key, value = (project(op, x_TD) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(op, query), self.k_norm(op, key)
        by_tile = [-1, dims.num_patches + 1, dims.num_heads, head_size]
        query, key, value = (op.Transpose(op.Reshape(part, by_tile), perm=[0, 2, 1, 3]) for part in (query, key, value))
        if seen is not None:
            seen.append(class_attention(op, query, key, head_size))
        mixed = attention(op, query, key, value, head_size)
        return self.projection_layer(op, tokens_from_heads(op, mixed, dims.hidden_size))


class VisionMLP(nn.Module):
    """Plain FFN with an exact GELU."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__()
        self.fc1 = Linear(dims.hidden_size, dims.intermediate_size, dtype, bias=True)
        self.fc2 = Linear(dims.intermediate_size, dims.hidden_size, dtype, bias=True)

    def forward(self, op: OpBuilder, x_TD: ir.Value) -> ir.Value:
        return self.fc2(op, op.Gelu(self.fc1(op, x_TD)))


class VisionBlock(nn.Module):
    """Pre-norm transformer block whose two branches are scaled by channel."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__()
        self.layernorm_before = _norm(dims, dtype)
        self.attention = VisionAttention(dims, dtype)
        self.lambda_1 = nn.Parameter([dims.hidden_size], dtype)
        self.layernorm_after = _norm(dims, dtype)
        self.mlp = VisionMLP(dims, dtype)
        self.lambda_2 = nn.Parameter([dims.hidden_size], dtype)

    def forward(self, op: OpBuilder, x_TD: ir.Value, seen: list[ir.Value] | None = None) -> ir.Value:
        mixed = self.attention(op, self.layernorm_before(op, x_TD), seen)
        x_TD = op.Add(x_TD, op.Mul(mixed, self.lambda_1))
        return op.Add(x_TD, op.Mul(self.mlp(op, self.layernorm_after(op, x_TD)), self.lambda_2))


class Encoder(nn.Module):
    """The blocks, under the checkpoint's name for them."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__()
        self.layer = nn.ModuleList([VisionBlock(dims, dtype) for _ in range(dims.depth)])

    def forward(self, op: OpBuilder, x_TD: ir.Value, seen: list[ir.Value] | None = None) -> ir.Value:
        *earlier, last = self.layer
        for block in earlier:
            x_TD = block(op, x_TD)
        return last(op, x_TD, seen)


class VisionTower(nn.Module):
    """Pixel values to patch features, [CLS] dropped."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__("vision_tower")
        self.dims = dims
        self.embeddings = Embeddings(dims, dtype)
        self.encoder = Encoder(dims, dtype)
        self.layernorm = LayerNorm(dims.hidden_size, dims.norm_eps, dtype) if dims.final_norm else None

    def forward(self, op: OpBuilder, pixel_values: ir.Value, seen: list[ir.Value] | None = None) -> ir.Value:
        """[B, S*S, D]."""
        x_TD = self.encoder(op, self.embeddings(op, pixel_values), seen)
        by_tile = op.Reshape(x_TD, [-1, self.dims.num_patches + 1, self.dims.hidden_size])
        patches = op.Slice(by_tile, [1], [END], [1])
        return patches if self.layernorm is None else self.layernorm(op, patches)


class Projector(nn.Module):
    """Projects each square of 2 x 2 patches to one visual token."""

    def __init__(self, dims: VisionDims, dtype: ir.DataType) -> None:
        super().__init__("multi_modal_projector")
        self.dims = dims
        self.layer_norm = LayerNorm(dims.shuffled_size, _PROJECTOR_EPSILON, dtype)
        self.linear_1 = Linear(dims.shuffled_size, dims.out_hidden_size, dtype, bias=True)
        self.linear_2 = Linear(dims.out_hidden_size, dims.out_hidden_size, dtype, bias=True)

    def forward(self, op: OpBuilder, patches: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The visual tokens, and the patches of each side by side."""
        side = self.dims.token_side
        shuffle = self.dims.side // side
        squares = op.Reshape(patches, [-1, side, shuffle, side, shuffle, self.dims.hidden_size])
        tokens = op.Reshape(op.Transpose(squares, perm=[0, 1, 3, 2, 4, 5]), [-1, self.dims.shuffled_size])
        return self.linear_2(op, op.Gelu(self.linear_1(op, self.layer_norm(op, tokens)))), tokens


def vision_model(dims: VisionDims, dtype: ir.DataType, *, selection: bool = False) -> ir.Model:
    """The tiles of a picture to visual tokens.

    Input: pixel_values [tiles, channels, height, width], as the image processor makes them. Output:
    image_features [tokens, D], tile by tile, each from top left to bottom right.

    With `selection` also saliency [tokens] FP32, what [CLS] pays to each square of patches in the last block, mean over
    heads and patches; and tower_features [tokens, 4*D], the squares before the projector. VisPruner (arXiv 2412.01818)
    leaves open what it does on such a tower.
    """
    shape = ("tiles", dims.in_channels, dims.image_size, dims.image_size)

    def trace(op: OpBuilder, values: dict[str, ir.Value]) -> list[Output]:
        seen: list[ir.Value] = []
        patches = VisionTower(dims, dtype)(op, values[PIXEL_VALUES], seen if selection else None)
        features, squares = Projector(dims, dtype)(op, patches)
        outputs: list[Output] = [(IMAGE_FEATURES, features, ("tokens", dims.out_hidden_size))]
        for weights_BL in seen:
            shuffle = dims.side // dims.token_side
            by_square = [-1, dims.token_side, shuffle, dims.token_side, shuffle]
            paid = op.Reshape(op.Slice(weights_BL, [1], [END], [1]), by_square)
            saliency = op.Reshape(op.ReduceMean(paid, [2, 4], keepdims=0), [-1])
            outputs.append(("saliency", saliency, ("tokens",)))
            outputs.append(("tower_features", squares, ("tokens", dims.shuffled_size)))
        return outputs

    return build_model("visual", [Input(PIXEL_VALUES, dtype, shape)], trace)
