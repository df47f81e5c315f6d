"""LLaVA-1.5's dimensions, read from `config.json`, and what its vision tower costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capa_export.base.dims import (
    ModelDims,
    Section,
    TextDefaults,
    decoder_dims,
)
from capa_export.base.errors import CapaError

__all__ = ["VisionDims", "model_dims"]

_TEXT = TextDefaults(
    vocab_size=32000,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    num_kv_heads=None,
    context=2048,
    attention_bias=False,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
)
"""LlamaConfig's: the published 7B leaves its sizes out, since they equal them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionDims:
    """A CLIP vision transformer, of which one layer's output is taken, and the projector behind it."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    """Number of layers that the checkpoint holds."""
    num_run_layers: int
    """Number of layers up to the one whose output is taken."""
    num_heads: int
    num_channels: int
    image_size: int
    """Side of the square picture in pixels."""
    patch_size: int
    layer_norm_eps: float
    keeps_class_token: bool
    """Whether the class token goes to the decoder, before the patches."""
    projector_bias: bool
    out_hidden_size: int

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def patch_values(self) -> int:
        """Numbers per patch."""
        return self.num_channels * self.patch_size**2

    @property
    def num_positions(self) -> int:
        """Patches of a picture and its class token."""
        return self.grid**2 + 1

    @property
    def num_tokens(self) -> int:
        """Visual tokens of a picture."""
        return self.num_positions - (not self.keeps_class_token)

    @property
    def num_blocks(self) -> int:
        """Transformer blocks that the graph runs."""
        return self.num_run_layers

    @property
    def block_products(self) -> Sequence[tuple[int, int]]:
        """Outputs and inputs of the products with weights in a block."""
        d, f = self.hidden_size, self.intermediate_size
        return (*[(d, d)] * 4, (f, d), (d, f))

    @property
    def num_parameters(self) -> int:
        """Weights, biases and norms, projector and layers that do not run included."""
        d, f, out = self.hidden_size, self.intermediate_size, self.out_hidden_size
        embeddings = d + d * self.patch_values + self.num_positions * d
        layer = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
        projector = d * out + out * out + (2 * out if self.projector_bias else 0)
        return embeddings + 4 * d + self.num_layers * layer + projector

    def activations(self, limit: Callable[[str], int], *, embedded: bool) -> int:  # noqa: ARG002 - measured of weights that are inputs.
        """Numbers that an engine holds at once, as TensorRT-RTX 1.7 reports.

        One width of the FFN and five of the block a position.
        """
        return limit("tiles") * self.num_positions * (self.intermediate_size + 5 * self.hidden_size)

    def flops(self, num_visual: int) -> int:
        """FLOPs of as many pictures as it takes for `num_visual` tokens."""
        d, out, positions = self.hidden_size, self.out_hidden_size, self.num_positions
        layer = 2 * positions * (4 * d * d + 2 * d * self.intermediate_size) + 4 * positions**2 * d
        patch_embed = 2 * self.grid**2 * d * self.patch_values
        projector = 2 * self.num_tokens * (d * out + out * out)
        return -(-num_visual // self.num_tokens) * (patch_embed + self.num_run_layers * layer + projector)


def model_dims(config: Mapping[str, Any], *, where: str = "config.json") -> ModelDims[VisionDims]:
    """The dimensions of a LLaVA-1.5, from the `config.json` of transformers 4 or 5.

    A key that is absent has the value of transformers' config classes.

    Args:
        config: `config.json`, as it is.
        where: its name in error messages.

    Raises:
        CapaError: a key is missing or malformed, or the model does something that the graphs do not.
    """
    root = Section(config, where, "")
    if config.get("model_type") != "llava":
        raise CapaError(f"{where}: model_type is {config.get('model_type')!r:.80}, this recipe is for 'llava'")
    text, vision = root.section("text_config"), root.section("vision_config")
    text.expect("model_type", "llama")
    text.expect("attention_bias", supported=False)
    text.expect("mlp_bias", supported=False)
    decoder = decoder_dims(root, text, _TEXT)
    # transformers writes the first name and reads both.
    key = "image_token_index" if "image_token_index" in config else "image_token_id"
    return ModelDims(
        decoder=decoder, vision=_vision(root, vision, decoder.hidden_size), image_token_id=root.count(key, 32000)
    )


def _vision(root: Section, vision: Section, decoder_size: int) -> VisionDims:
    vision.expect("model_type", "clip_vision_model")
    vision.expect("hidden_act", "quick_gelu")
    root.expect("projector_hidden_act", "gelu")
    strategy = root.data.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise root.refused(
            "vision_feature_select_strategy", f"is {strategy!r:.80}, only 'default' and 'full' are known"
        )
    num_layers = vision.layers("num_hidden_layers", 12)
    dims = VisionDims(
        hidden_size=vision.count("hidden_size", 768),
        intermediate_size=vision.count("intermediate_size", 3072),
        num_layers=num_layers,
        num_run_layers=_num_run_layers(root, num_layers),
        num_heads=vision.count("num_attention_heads", 12),
        num_channels=vision.count("num_channels", 3),
        image_size=vision.equal_counts("image_size", 224),
        patch_size=vision.equal_counts("patch_size", 32),
        layer_norm_eps=vision.number("layer_norm_eps", 1e-5),
        keeps_class_token=strategy == "full",
        projector_bias=bool(root.data.get("multimodal_projector_bias", True)),
        out_hidden_size=decoder_size,
    )
    if dims.hidden_size % dims.num_heads:
        raise vision.refused("hidden_size", f"{dims.hidden_size} must be a multiple of {dims.num_heads} heads")
    if dims.image_size % dims.patch_size:
        raise vision.refused("image_size", f"{dims.image_size} must be a multiple of patches of {dims.patch_size}")
    return dims


def _num_run_layers(root: Section, num_layers: int) -> int:
    """Layers up to the one that `vision_feature_layer` selects; 0 would be the embeddings, and -1 is the last."""
    selected = root.data.get("vision_feature_layer", -2)
    if not isinstance(selected, int) or isinstance(selected, bool):
        raise root.refused(
            "vision_feature_layer", f"is {selected!r:.80}, only the number of a single layer is supported"
        )
    count = selected if selected > 0 else num_layers + 1 + selected
    if selected == 0 or not 1 <= count <= num_layers:
        raise root.refused("vision_feature_layer", f"{selected} is none of the {num_layers} layers")
    return count
