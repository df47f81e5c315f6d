"""The inputs of the comparison: a checkpoint, its recipe, and the arrays that every peer gets.

T = prompt tokens, D = hidden size, X = text tokens.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from serve import now

from capa_export.base.toml import shipped_names
from capa_export.config.quantization import Quantization
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.schedule import kept_tokens
from capa_export.data.samples import samples_from
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.generation import eos_token_ids
from capa_export.model.prompt import Prompt, Prompter
from capa_export.model.source import Source

__all__ = ["AskedPicture", "ask_about", "hf_inputs", "opened", "prompter_of", "write_feed", "write_questions"]

_TEXT = 48
_BEFORE = 4
"""Text tokens in front of the picture."""


def opened(checkpoint: Path, quantize: Quantization | None = None) -> tuple[Recipe, Source]:
    """A checkpoint with the recipe of its folder's name, or else its family's; the prune layer fits the decoder."""
    found = open_checkpoint(str(checkpoint))
    recipes = [load_recipe(name) for name in shipped_names("graphs")]
    architectures = found.config["architectures"]
    fitting = [recipe for recipe in recipes if load_family(recipe.family).ARCHITECTURE in architectures]
    for recipe in sorted(fitting, key=lambda recipe: recipe.name != checkpoint.name):
        if recipe.name in {checkpoint.name, recipe.family}:
            source = Source.of(found, load_family(recipe.family), quantize)
            layer = min(recipe.prune.schedule[0].layer, source.dims.decoder.num_layers // 2)
            return recipe.with_options(prune_layer=layer), source
    raise SystemExit(f"{checkpoint}: no recipe for {', '.join(architectures)}")


def prompter_of(source: Source) -> Prompter:
    """A checkpoint's tokenizer, chat template and image processor."""
    return Prompter(source.checkpoint.folder, source.checkpoint.folder, source.family, source.dims)


def hf_inputs(source: Source, prompter: Prompter, prompt: Prompt, image: Image.Image) -> dict[str, np.ndarray]:
    """What a Hugging Face model is fed of a picture besides the prompt's tokens."""
    processed = prompter.image_processor(images=[image], return_tensors="np", **source.family.IMAGE_OPTIONS)
    names = ("pixel_values", "image_grid_thw")
    arrays = {name: np.asarray(processed[name]) for name in names if name in processed}
    if "image_grid_thw" in processed:
        arrays["mm_token_type_ids"] = prompt.is_visual[None].astype(np.int32)
    return arrays


@dataclass(frozen=True)
class AskedPicture:
    """A question about a picture from its file, ready for a Hugging Face model; moments in seconds."""

    prompt: Prompt
    arrays: dict[str, np.ndarray]
    began: float
    opened: float
    processed: float
    twice: float
    """Seconds behind `processed`: pixels are processed once more, as nobody else has to."""

    @property
    def parts(self) -> dict[str, float]:
        """Milliseconds of decoding the file, and of the processor."""
        return {"file": 1e3 * (self.opened - self.began), "processor": 1e3 * (self.processed - self.opened)}

    def milliseconds(self, moments: Iterable[float]) -> list[float]:
        """Since it began, without what was done twice."""
        return [1e3 * (moment - self.began - self.twice) for moment in moments]


def ask_about(source: Source, prompter: Prompter, picture: str, question: str) -> AskedPicture:
    """Read a picture and make a prompt of it."""
    began = now()
    image = Image.open(picture).convert("RGB")
    opened = now()
    prompt = prompter(question, [image])
    processed = now()
    arrays = hf_inputs(source, prompter, prompt, image)
    return AskedPicture(prompt, arrays, began, opened, processed, now() - processed)


def write_feed(source: Source, path: Path, *, visual_tokens: int, ratio: float) -> dict[str, int]:
    """A prompt of random embeddings, as many visual tokens as asked for or as the context takes; returns its sizes."""
    dims = source.dims.decoder
    text_config = source.checkpoint.config.get("text_config", source.checkpoint.config)
    context = dims.rope_limit or text_config.get("max_position_embeddings") or visual_tokens + _TEXT
    visual = min(visual_tokens, context - _TEXT)
    total = visual + _TEXT
    embeds_1TD = np.random.default_rng(0).standard_normal((1, total, dims.hidden_size), dtype=np.float32)
    feed = {
        "inputs_embeds": embeds_1TD,
        "position_ids": np.tile(np.arange(total), (dims.position_axes, 1)),
        "text_positions": np.r_[0:_BEFORE, visual + _BEFORE : total],
        "num_visual": np.array([visual]),
        "num_keep": np.array([kept_tokens(visual, ratio)]),
        "head_dim": np.array(dims.head_dim),
    }
    if dims.deepstack_layers:
        feed["deepstack_embeds"] = np.zeros((dims.deepstack_layers, total, dims.hidden_size), np.float32)
    np.savez(path, **feed)
    return {"visual": visual, "kept": int(feed["num_keep"][0]), "text": _TEXT}


def write_questions(recipe: Recipe, source: Source, folder: Path, *, count: int, ratio: float) -> list[dict[str, Any]]:
    """Held-out scenes with what a Hugging Face model and bare graphs are fed; nothing where the recipe has none."""
    checkpoint = source.checkpoint.folder
    if not recipe.scenes:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    prompter = prompter_of(source)
    listed: list[dict[str, Any]] = []
    for index, sample in enumerate(samples_from(None, recipe, count, split="held_out")):
        prompt = prompter(sample.question, [sample.image])
        arrays = {f"hf.{name}": value for name, value in hf_inputs(source, prompter, prompt, sample.image).items()}
        image, file = f"{index:04d}.png", f"{index:04d}.npz"
        sample.image.save(folder / image)
        np.savez(
            folder / file,
            input_ids=prompt.input_ids,
            position_ids=prompt.position_ids,
            next_position=np.array(prompt.next_position),
            head_dim=np.array(source.dims.decoder.head_dim),
            eos_token_ids=np.array(eos_token_ids(checkpoint)),
            ratio=np.array(ratio),
            **arrays,
        )
        listed.append({"question": sample.question, "answer": sample.answer, "image": image, "arrays": file})
    (folder / "questions.json").write_text(json.dumps(listed, indent=1), encoding="utf-8")
    return listed
