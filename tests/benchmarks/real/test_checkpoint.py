"""The checkpoint folder: trained parts, their merging, layout and names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.real.checkpoint import write_checkpoint
from benchmarks.real.smollm2 import Decoder
from benchmarks.real.train import start_parts
from benchmarks.real.trained import CLUTTER, Change, TrainedParts, load_parts, merged, save_parts
from capa_export.config.recipe import load_recipe
from capa_export.data.scenes import samples
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.prompt import Prompter
from capa_export.model.recipe_choice import find_recipe
from tests.benchmarks.real.conftest import HIDDEN

CHECKOUT = Path(__file__).parents[3]
PROJECTION = "layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def parts(small_decoder: Decoder) -> TrainedParts:
    torch.manual_seed(0)
    change = Change(torch.randn(4, HIDDEN), torch.randn(HIDDEN, 4))
    start = start_parts(small_decoder)
    return TrainedParts(tower=start.tower, projector=start.projector, changes={PROJECTION: change})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_decoder: Decoder, parts: TrainedParts) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, small_decoder, parts)
    return folder


def test_a_change_adds_the_outer_products_of_its_ranks() -> None:
    weight, a, b = torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2)
    expected = weight + torch.outer(b[:, 0], a[0]) + torch.outer(b[:, 1], a[1])
    torch.testing.assert_close(merged(weight, Change(a, b)), expected)


def test_parts_come_back_as_they_were_packed(tmp_path: Path, parts: TrainedParts) -> None:
    save_parts(tmp_path / "parts.safetensors", parts)
    back = load_parts(tmp_path / "parts.safetensors")
    for found, given in ((back.tower, parts.tower), (back.projector, parts.projector)):
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], tensor.half().float()) for name, tensor in given.items())
    assert back.changes.keys() == {PROJECTION}
    assert torch.equal(back.changes[PROJECTION].a, parts.changes[PROJECTION].a.half().float())
    assert torch.equal(back.changes[PROJECTION].b, parts.changes[PROJECTION].b.half().float())


def test_the_parts_in_git_change_attention_alone_and_are_small() -> None:
    assert CLUTTER.stat().st_size <= 10e6
    parts = load_parts(CLUTTER)
    expected = {f"layers.{layer}.self_attn.{part}_proj" for layer in range(30) for part in "qkvo"}
    assert parts.changes.keys() == expected
    assert all(len(change.a) == change.b.shape[1] == 16 for change in parts.changes.values())


def test_only_what_was_trained_differs_from_what_is_published(
    folder: Path, small_decoder: Decoder, parts: TrainedParts
) -> None:
    written = load_file(folder / "model.safetensors")
    known = len(small_decoder.tensors["embed_tokens.weight"])
    for name, published in small_decoder.tensors.items():
        found = written[f"language_model.model.{name}"].numpy()
        if name == "embed_tokens.weight":
            assert len(found) % 64 == 0
            assert len(found) >= known + 2
            np.testing.assert_allclose(found[known:], np.broadcast_to(published.mean(axis=0), found[known:].shape))
            found = found[:known]
        assert np.array_equal(found, published) == (name != f"{PROJECTION}.weight")
    assert torch.equal(written["multi_modal_projector.linear_1.weight"], parts.projector["linear_1.weight"])


def test_the_same_bytes_each_time(folder: Path, tmp_path: Path, small_decoder: Decoder, parts: TrainedParts) -> None:
    write_checkpoint(tmp_path, small_decoder, parts)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_the_layout_is_that_of_published_checkpoints(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llava", ["LlavaForConditionalGeneration"])
    names = {name.partition(".layers")[0] for name in load_file(folder / "model.safetensors") if ".layers." in name}
    assert names == {"language_model.model", "vision_tower.vision_model.encoder"}


def test_it_is_built_by_the_familys_recipe_and_has_one_of_its_own(folder: Path) -> None:
    assert find_recipe(str(folder)).name == "llava15"
    own = load_recipe(str(CHECKOUT / "benchmarks" / "real" / "real.toml"))
    assert own.family == find_recipe(str(folder)).family
    assert [(stage.layer, stage.ratio) for stage in own.prune.schedule] == [(12, 0.75)]


def test_transformers_finds_every_weight(folder: Path) -> None:
    model: Any
    model, found = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_prompts_are_those_of_the_published_processor(folder: Path) -> None:
    processor: Any = AutoProcessor.from_pretrained(folder)
    family = load_family("llava15")
    prompter = Prompter(folder, folder, family, family.model_dims(open_checkpoint(str(folder)).config))
    (sample,) = samples(1, seed=0)
    content = [{"type": "image"}, {"type": "text", "text": "What color is the star?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(images=[sample.image], text=[text], return_tensors="np")
    prompt = prompter("What color is the star?", [sample.image])
    assert prompt.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert prompt.num_visual == 64
