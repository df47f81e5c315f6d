"""Healthy builds, drawn from a seed: small random models of all families, and ways to prune them."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.schedule import Prune, Stage
from capa_export.data.samples import Sample, Samples
from capa_export.export.graphs import write_onnx
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.prompt import Prompter, Turn
from capa_export.model.source import Source
from capa_export.parity.oracle import Oracle
from capa_export.parity.records import Records, write_records
from tests.conftest import noise
from tests.models import FAMILIES
from tests.models.making import randomized

__all__ = ["Asked", "Build", "build"]

_PRECISIONS = ("fp32", "fp16", "bf16")
_ROTARY = {8: [2, 1, 1], 16: [4, 2, 2], 24: [4, 4, 4], 32: [6, 5, 5]}
"""Frequencies of the three axes by head size, for Qwen."""


@dataclass(frozen=True)
class Asked(Samples):
    """Conversations that are at hand."""

    asked: Sequence[Sequence[Turn]] = ()

    def __iter__(self) -> Iterator[Sample]:
        return (Sample(turns) for turns in self.asked)


def asked(conversations: Sequence[Sequence[Turn]]) -> Samples:
    """Them as samples without answers."""
    return Asked(count=len(conversations), name="random pictures", has_answers=False, asked=conversations)


@dataclass(frozen=True)
class Build:
    """One healthy build beside its oracle."""

    about: str
    folder: Path
    """Its `onnx` folder."""
    precision: str
    recipe: Recipe
    records: Records


@cache
def _base(family: str) -> Any:
    """A model of the family, whose config the others vary."""
    return FAMILIES[family].random_model()


@cache
def _prompter(family: str) -> Prompter:
    """Prompts depend on nothing that is varied."""
    with TemporaryDirectory() as folder:
        checkpoint = FAMILIES[family].save_model(Path(folder), _base(family))
        module = load_family(family)
        return Prompter(checkpoint, checkpoint, module, Source.of(open_checkpoint(folder), module).dims)


def _varied(family: str, rng: np.random.Generator) -> tuple[Any, str]:
    """A random model of another shape than the family's, and that shape in words."""
    base = _base(family)
    config = copy.deepcopy(base.config)
    text = config.text_config
    heads, groups = [(4, 2), (4, 4), (4, 1), (2, 1), (6, 2), (3, 3)][rng.integers(6)]
    size = int(rng.choice([8, 16, 24, 32]))
    text.num_attention_heads, text.num_key_value_heads = heads, groups
    text.hidden_size = heads * size
    text.head_dim = size
    if family == "qwen3vl" and rng.random() < 0.5:
        text.hidden_size = 48
    text.intermediate_size = int(rng.choice([48, 96, 112]))
    text.num_hidden_layers = int(rng.choice([3, 3, 4]))
    if hasattr(text, "layer_types") and text.layer_types:
        text.layer_types = text.layer_types[:1] * text.num_hidden_layers
    if family.startswith("qwen"):
        text.rope_parameters = {**text.rope_parameters, "mrope_section": _ROTARY[size]}
    if family == "qwen25vl":
        config.vision_config.depth, config.vision_config.fullatt_block_indexes = 2, [1]
    if hasattr(config.vision_config, "out_hidden_size"):
        config.vision_config.out_hidden_size = text.hidden_size
    config.tie_word_embeddings = bool(rng.random() < 0.3)
    model = randomized(type(base), config, int(rng.integers(2**31)), spread=rng.uniform(0.4, 0.8))
    return model, f"heads {heads}/{groups} of {size}, hidden {text.hidden_size}, {text.num_hidden_layers} layers"


def _schedule(layers: int, rng: np.random.Generator) -> tuple[Stage, ...]:
    stages = int(rng.integers(1, 3))
    chosen = sorted(rng.choice(layers - 1, stages, replace=False).tolist())
    ratios = sorted(rng.uniform(0.25, 0.9, stages).round(2).tolist())
    return tuple(Stage(layer=layer, ratio=ratio) for layer, ratio in zip(chosen, ratios, strict=True))


def build(
    seed: int, folder: Path, *, prompts: int = 2, steps: int = 3, change: Callable[[Any], None] = lambda _: None
) -> Build:
    """The build of a seed, written into an empty folder with what the oracle makes of its prompts.

    Args:
        seed: of everything that is drawn.
        folder: gets the checkpoint, the graphs and the records.
        prompts: number of questions.
        steps: logits compared per prompt.
        change: changes the weights of the model that is drawn.
    """
    rng = np.random.default_rng(seed)
    name = list(FAMILIES)[seed % len(FAMILIES)]
    precision = _PRECISIONS[seed // len(FAMILIES) % 3]
    model, shape = _varied(name, rng)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder / "checkpoint")
    family = load_family(name)
    source = Source.of(open_checkpoint(str(folder / "checkpoint")), family)
    layers = source.dims.decoder.num_layers
    prune = Prune(schedule=_schedule(layers, rng), min_keep_per_image=int(rng.integers(0, 3)))
    linear = sorted(rng.choice(layers, int(rng.integers(0, layers)), replace=False).tolist())
    scales = {layer: rng.normal(1, 0.2, source.dims.decoder.hidden_size) for layer in linear}
    write_onnx(
        source,
        precision,
        folder / "onnx",
        prune_layers=[stage.layer for stage in prune.schedule],
        scales=scales,
        min_keep_per_image=prune.min_keep_per_image,
    )
    recipe = load_recipe(name).model_copy(update={"prune": prune})
    oracle = Oracle(
        model=model,
        family=family,
        prompter=_prompter(name),
        prune=prune,
        scales=scales,
        precision=precision,
        onnx=folder / "onnx",
        fp32_onnx=folder / "onnx",
        eos_token_ids=(),
    )
    count = int(rng.integers(1, 4))

    def question() -> list[Turn]:
        sizes = rng.integers(56, 113, (count, 2)).tolist()
        pictures = [noise(width, height, int(rng.integers(2**31))) for width, height in sizes]
        return [Turn("user", [*pictures, "what color is the star ?"])]

    records = folder / "records"
    records.mkdir()
    written = write_records(records, oracle, asked([question() for _ in range(prompts)]), steps)
    stages = ", ".join(f"{stage.ratio:g} after {stage.layer}" for stage in prune.schedule)
    about = f"{seed}: {name} {precision}, {shape}, {stages}, linear {linear}, {count} pictures"
    return Build(about, folder / "onnx", precision, recipe, written)
