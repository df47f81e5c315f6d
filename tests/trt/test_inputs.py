"""Prompts as users have them, on every family's random model: FP32 graphs on ONNX Runtime against eager CAPA."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from capa_export.base.errors import CapaError
from capa_export.config.schedule import Prune, Stage
from capa_export.export.graphs import write_onnx
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.model.families import load_family, qwen25vl
from capa_export.model.prompt import Prompt, Prompter, Turn, Video
from capa_export.model.source import Source
from capa_export.run.onnx import OnnxModel
from tests.conftest import noise
from tests.models import FAMILIES
from tests.models import qwen25vl as small_qwen25vl

QUESTION = "what color is the star ?"
ALPHA = {1: np.linspace(0.5, 1.5, 64), 3: np.linspace(1.2, 0.8, 64)}
PRUNE = Prune(schedule=(Stage(layer=1, ratio=0.5), Stage(layer=3, ratio=0.75)))


@dataclass
class Subject:
    """One family's small random model and its graphs."""

    family: Any
    model: Any
    prompter: Prompter
    onnx: OnnxModel

    def compare(self, prompt: Prompt, steps: int = 3) -> None:
        """The kept positions, and the logits of the prompt and of a few more tokens."""
        keep = dict(zip((1, 3), PRUNE.num_keep(prompt.image_lengths), strict=True))
        scales = {layer: torch.from_numpy(alpha).float() for layer, alpha in ALPHA.items()}
        eager = Eager(self.model)
        with torch.no_grad():
            embeds, position_ids = self.family.eager_inputs(self.model, prompt)
        np.testing.assert_array_equal(prompt.position_ids, position_ids.reshape(prompt.position_ids.shape).numpy())
        assert prompt.next_position == int(position_ids.max()) + 1
        plan = EagerPlan(keep, scales, min_keep_per_image=PRUNE.min_keep_per_image)
        expected = eager.prefill(EagerInputs(embeds, position_ids), torch.from_numpy(prompt.is_visual), plan)
        run = self.onnx.prefill(prompt, list(keep.values()))
        for kept, layer in zip(run.kept, keep, strict=True):
            np.testing.assert_array_equal(kept, expected.kept[layer].numpy())
        logits, wanted, cache = run.logits, expected.logits, run.cache
        for step in range(steps):
            # FP32 sums in another order, over at most 1,000 tokens.
            np.testing.assert_allclose(logits, wanted.numpy(), rtol=0, atol=1e-5 * float(wanted.abs().max()))
            token = int(wanted.argmax())
            wanted = eager.step(expected, token, prompt.next_position + step)
            logits, cache = self.onnx.step(cache, token, prompt.next_position + step)


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """Each family's, made once."""
    made: dict[str, Subject] = {}

    def build(name: str) -> Subject:
        if name not in made:
            small, family = FAMILIES[name], load_family(name)
            model = small.random_model()
            checkpoint = small.save_model(tmp_path_factory.mktemp(name), model)
            if name == "qwen25vl":
                allow_one_token(checkpoint)
            source = Source.of(open_checkpoint(str(checkpoint)), family)
            onnx = tmp_path_factory.mktemp("onnx")
            layers = tuple(stage.layer for stage in PRUNE.schedule)
            write_onnx(source, "fp32", onnx, prune_layers=layers, scales=ALPHA)
            prompter = Prompter(checkpoint, checkpoint, family, source.dims)
            made[name] = Subject(family, model, prompter, OnnxModel(onnx, threads=1))
        return made[name]

    return build


def allow_one_token(checkpoint: Path) -> None:
    """Qwen's image processor takes any least size."""
    path = checkpoint / "preprocessor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["size"]["shortest_edge"] = 28 * 28
    path.write_text(json.dumps(config), encoding="utf-8")


SHOWN: Mapping[str, list[Any]] = {
    "nothing": [QUESTION],
    "smallest": [noise(28, 28), QUESTION],
    "wide strip": [noise(5572, 28), QUESTION],
    "tall strip": [noise(28, 5600), QUESTION],
    "strip and dot": [noise(2800, 56, 1), noise(28, 28, 2), QUESTION],
    "text around": ["the star", noise(140, 84, 1), "is red", noise(84, 140, 2), QUESTION],
}
VISUAL = {
    "qwen25vl": {"smallest": 1, "wide strip": 199, "tall strip": 200, "strip and dot": 201, "text around": 30},
    # Tiles of four tokens each, a thumbnail with them where there are several.
    "internvl3": {"smallest": 4, "wide strip": 52, "tall strip": 52, "strip and dot": 56},
    # The middle of a strip is all that is left of it.
    "llava15": {"smallest": 16, "wide strip": 16, "tall strip": 16, "strip and dot": 32, "text around": 32},
}


@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("family", VISUAL)
def test_any_picture_equals_eager_capa(subject_of: Callable[[str], Subject], family: str, shown: str) -> None:
    subject = subject_of(family)
    prompt = subject.prompter.chat([Turn("user", SHOWN[shown])])
    assert prompt.num_visual == VISUAL[family].get(shown, prompt.num_visual)
    subject.compare(prompt)


@pytest.mark.parametrize("family", VISUAL)
def test_several_turns_equal_eager_capa(subject_of: Callable[[str], Subject], family: str) -> None:
    subject = subject_of(family)
    turns = [
        Turn("user", [noise(112, 84, 1), noise(56, 56, 2), QUESTION]),
        Turn("assistant", ["red"]),
        Turn("user", ["what shape is", noise(140, 140, 3), "?"]),
    ]
    prompt = subject.prompter.chat(turns)
    assert len(prompt.image_lengths) == len(prompt.pictures) == 3
    assert "red" in subject.prompter.tokenizer.decode(prompt.input_ids[prompt.text_positions])
    subject.compare(prompt)


@pytest.mark.parametrize("family", ["internvl3", "llava15"])
def test_a_family_without_videos_says_so(subject_of: Callable[[str], Subject], family: str) -> None:
    with pytest.raises(CapaError, match="ConditionalGeneration takes no video; give some of its frames as pictures"):
        subject_of(family).prompter.chat([Turn("user", [Video([noise(56, 56)] * 4, 2.0), QUESTION])])


def test_a_template_that_refuses_is_one_line(subject_of: Callable[[str], Subject]) -> None:
    prompter = subject_of("qwen25vl").prompter
    template, prompter.tokenizer.chat_template = (
        prompter.tokenizer.chat_template,
        "{{ raise_exception('roles must alternate') }}",
    )
    try:
        with pytest.raises(CapaError, match="the chat template does not take this conversation: roles must alternate"):
            prompter("what ?", [])
    finally:
        prompter.tokenizer.chat_template = template


@pytest.mark.slow
@pytest.mark.parametrize("cells", [72, pytest.param(128, marks=pytest.mark.exhaustive)])
def test_a_large_picture_equals_eager_capa(tmp_path: Path, cells: int) -> None:
    """The largest has 16,384 visual tokens of 65,536 patches, whose attention would hold 17 GB at once.

    A quarter of the tokens is kept. Attention goes in tiles with the smaller one, too.
    """
    config = small_config()
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    checkpoint = small_qwen25vl.save_model(tmp_path / "checkpoint", model)
    source = Source.of(open_checkpoint(str(checkpoint)), qwen25vl)
    write_onnx(source, "fp32", tmp_path / "onnx", prune_layers=(0,), scales={})
    prompter = Prompter(checkpoint, checkpoint, qwen25vl, source.dims)
    prompt, num_keep = prompter(QUESTION, [noise(28 * cells, 28 * cells)]), cells**2 // 4
    assert prompt.num_visual == cells**2 and prompt.pictures[0].patches.shape[:4] == (1, cells, cells, 4)
    onnx = OnnxModel(tmp_path / "onnx")
    embeds = onnx.embed(prompt)
    assert onnx._sessions["visual/model.onnx"][1]
    with torch.no_grad():
        expected_embeds, position_ids = qwen25vl.eager_inputs(model, prompt)
    largest = float(expected_embeds.abs().max())
    np.testing.assert_allclose(embeds["inputs_embeds"], expected_embeds.numpy(), rtol=0, atol=1e-5 * largest)
    plan = EagerPlan({0: num_keep}, min_keep_per_image=1)
    expected = Eager(model).prefill(
        EagerInputs(expected_embeds, position_ids), torch.from_numpy(prompt.is_visual), plan
    )
    run = onnx.prefill(prompt, [num_keep], embeds)
    np.testing.assert_array_equal(run.kept[0], expected.kept[0].numpy())
    # FP32 sums in another order, over up to 16,384 tokens.
    np.testing.assert_allclose(run.logits, expected.logits.numpy(), rtol=0, atol=1e-5 * expected.logits.abs().max())


def small_config() -> Qwen2_5_VLConfig:
    """Two decoder layers, two vision blocks of one head."""
    config = small_qwen25vl.random_model().config
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.vision_config.depth, config.vision_config.num_heads = 2, 1
    config.vision_config.hidden_size, config.vision_config.fullatt_block_indexes = 16, [1]
    return config
