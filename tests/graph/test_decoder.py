"""Prefill and decode on ONNX Runtime against the eager model."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from capa_export.config.schedule import Prune, Stage
from capa_export.export.graphs import write_onnx
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Prompt, Prompter
from capa_export.model.source import Source
from capa_export.run.onnx import OnnxModel
from capa_export.run.runtime import KVCache
from tests.agreement import compare
from tests.conftest import noise

SCALES = {1: np.linspace(0.5, 1.5, 64), 3: np.linspace(1.2, 0.8, 64)}
Build = Callable[..., OnnxModel]


@pytest.fixture(scope="module")
def built(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """ONNX of the small model, each variant written once."""
    made: dict[str, OnnxModel] = {}

    def build(
        layers: tuple[int, ...] = (2,), scales: Mapping[int, np.ndarray] = SCALES, precision: str = "fp32"
    ) -> OnnxModel:
        key = f"{layers} {sorted(scales)} {precision}"
        if key not in made:
            folder = tmp_path_factory.mktemp("onnx")
            write_onnx(source, precision, folder, prune_layers=layers, scales=scales)
            made[key] = OnnxModel(folder, threads=1)
        return made[key]

    return build


BATCH = [
    ("what color is the star ?", [noise(224, 224)]),
    ("what shape is red ?", []),
    ("is there a red star ?", [noise(56, 84, 1), noise(28, 28, 2)]),
]


def test_a_batch_of_unequal_prompts_answers_as_each_alone(model: Any, prompter: Prompter, built: Build) -> None:
    """Padded with values that would show if anything read them."""
    onnx, eager = built((1, 3)), Eager(model)
    prompts = [prompter(question, pictures) for question, pictures in BATCH]
    keep = [[-(-prompt.num_visual // 3), -(-prompt.num_visual // 5)] for prompt in prompts]
    runs = [onnx.prefill(prompt, counts) for prompt, counts in zip(prompts, keep, strict=True)]
    expected = []
    for prompt, counts in zip(prompts, keep, strict=True):
        embeds, position_ids = qwen25vl.eager_inputs(model, prompt)
        plan = EagerPlan(
            dict(zip((1, 3), counts, strict=True)),
            {i: torch.from_numpy(a).float() for i, a in SCALES.items()},
            min_keep_per_image=1,
        )
        expected.append(eager.prefill(EagerInputs(embeds, position_ids), torch.from_numpy(prompt.is_visual), plan))
    cache = KVCache.stacked([run.cache for run in runs])
    for layer, stage in enumerate((0, 1, 1, 2, 2)):
        for part in ("key", "value"):
            tensor = cache.tensors[f"past_key_values.{layer}.{part}"]
            for row, length in enumerate(cache.lengths[stage]):
                tensor[row, :, : tensor.shape[2] - length] = 1e4
    logits = np.stack([run.logits for run in runs])
    wanted = [run.logits for run in expected]
    for step in range(6):
        for row, reference in zip(logits, wanted, strict=True):
            np.testing.assert_allclose(row, reference.numpy(), rtol=0, atol=1e-5 * float(reference.abs().max()))
        tokens = [int(reference.argmax()) for reference in wanted]
        positions = [prompt.next_position + step for prompt in prompts]
        wanted = [eager.step(*row) for row in zip(expected, tokens, positions, strict=True)]
        logits, cache = onnx.append(cache, [[token] for token in tokens], positions)


@pytest.mark.parametrize("least", [0, 1, 7])
def test_every_image_keeps_its_share(
    model: Any, source: Source, prompter: Prompter, tmp_path: Path, least: int
) -> None:
    write_onnx(source, "fp32", tmp_path, prune_layers=(1, 3), scales=SCALES, min_keep_per_image=least)
    onnx = OnnxModel(tmp_path, threads=1)
    dark = Image.new("RGB", (224, 224))
    prompt = prompter("what color is the star ?", [noise(28, 28, 1), dark, noise(84, 56, 2)])
    assert prompt.image_lengths == [4, 64, 6]
    prune = Prune(schedule=(Stage(layer=1, ratio=0.8), Stage(layer=3, ratio=0.95)), min_keep_per_image=least)
    num_keep = prune.num_keep(prompt.image_lengths)
    assert num_keep == {0: [15, 4], 1: [15, 4], 7: [17, 17]}[least]
    keep = dict(zip((1, 3), num_keep, strict=True))
    compare(qwen25vl, model, onnx, prompt, keep, SCALES, 1e-5, min_keep_per_image=least)
    images = np.cumsum(~prompt.is_visual)
    for kept in onnx.prefill(prompt, num_keep).kept:
        counts = Counter(images[kept[prompt.is_visual[kept]]].tolist())
        assert all(
            counts[image] >= min(least, length)
            for image, length in zip(np.unique(images[prompt.is_visual]), prompt.image_lengths, strict=True)
        )


PICTURES = {
    "one": [noise(224, 224)],
    "no multiple of a window": [noise(140, 196)],
    "one token": [noise(28, 28)],
    "several sizes": [noise(196, 280, 1), noise(84, 56, 2), noise(336, 140, 3)],
    "none": [],
}


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("layers", [(2,), (1, 3)], ids=str)
def test_fp32_equals_eager_capa(
    model: Any, prompter: Prompter, built: Build, layers: tuple[int, ...], pictures: list[Any]
) -> None:
    prompt = prompter("what color is the star ?", pictures)
    keep = {
        layer: min(prompt.num_visual, max(1, prompt.num_visual // (3 * stage))) for stage, layer in enumerate(layers, 1)
    }
    # 1e-5: FP32 sums in another order, over at most 250 tokens.
    compare(qwen25vl, model, built(layers), prompt, keep, SCALES, 1e-5)


@pytest.mark.parametrize("kept", [1, 7, 63, 64])
def test_the_number_kept_is_a_run_time_input(model: Any, prompter: Prompter, built: Build, kept: int) -> None:
    compare(qwen25vl, model, built(), prompter("what shape is red ?", [noise(224, 224)]), {2: kept}, SCALES, 1e-5)


def test_fp16_stays_close(model: Any, prompter: Prompter, built: Build) -> None:
    # 1e-2: half has 11 bits, and errors of five layers add up.
    compare(
        qwen25vl,
        model,
        built(precision="fp16"),
        prompter("what shape is red ?", [noise(224, 224)]),
        {2: 16},
        SCALES,
        1e-2,
    )


def test_without_pruning_or_scales_it_is_the_dense_model(model: Any, prompter: Prompter, built: Build) -> None:
    prompt = prompter("what shape is red ?", [noise(224, 140)])
    embeds, position_ids = qwen25vl.eager_inputs(model, prompt)
    with torch.no_grad():
        dense = model(inputs_embeds=embeds, position_ids=position_ids).logits[0, -1].numpy()
    run = built(scales={}).prefill(prompt, [prompt.num_visual])
    np.testing.assert_allclose(run.logits, dense, atol=1e-5 * np.abs(dense).max(), rtol=0)
    np.testing.assert_array_equal(run.kept[0], np.arange(len(prompt.input_ids)))


def test_text_between_and_around_pictures_is_never_pruned(
    model: Any, prompter: Prompter, built: Build, source: Source
) -> None:
    one = prompter("what shape is red ?", [noise(112, 84)])
    # Two turns: text before, between and after the pictures.
    input_ids = np.concatenate([one.input_ids, one.input_ids])
    is_visual = input_ids == source.dims.image_token_id
    pictures = one.pictures * 2
    position_ids, next_position = qwen25vl.positions(is_visual, pictures)
    prompt = Prompt(input_ids, is_visual, pictures, position_ids, next_position)
    compare(qwen25vl, model, built(), prompt, {2: 5}, SCALES, 1e-5)
    run = built().prefill(prompt, [5])
    assert set(prompt.text_positions) <= set(run.kept[0].tolist())
    assert len(run.kept[0]) == len(prompt.text_positions) + 5


def test_several_tokens_can_be_appended_at_once(prompter: Prompter, built: Build) -> None:
    onnx, prompt = built(), prompter("what shape is red ?", [noise(112, 112)])
    run = onnx.prefill(prompt, [4])
    tokens, cache = [9, 12, 15], run.cache
    for offset, token in enumerate(tokens):
        logits, cache = onnx.step(cache, token, prompt.next_position + offset)
    [together], grown = onnx.append(run.cache, [tokens], [prompt.next_position])
    np.testing.assert_allclose(together, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    for name, value in cache.tensors.items():
        np.testing.assert_allclose(grown.tensors[name], value, atol=1e-5)
    np.testing.assert_array_equal(grown.lengths, cache.lengths)


def test_the_cache_shrinks_from_the_pruning_layer_on(prompter: Prompter, built: Build) -> None:
    prompt = prompter("what shape is red ?", [noise(224, 224)])
    cache = built().prefill(prompt, [16]).cache.tensors
    total, text = len(prompt.input_ids), len(prompt.text_positions)
    lengths = [cache[f"past_key_values.{layer}.key"].shape[2] for layer in range(5)]
    assert lengths == [total, total, text + 16, text + 16, text + 16]


def test_same_inputs_give_identical_bytes(source: Source, tmp_path: Path) -> None:
    """In processes with different hash seeds."""
    code = (
        "import sys; from pathlib import Path; from capa_export.model.checkpoint import open_checkpoint; "
        "from capa_export.export.graphs import write_onnx; from capa_export.model.source import Source; "
        "from capa_export.model.families import load_family; "
        "import numpy as np; source = Source.of(open_checkpoint(sys.argv[1]), load_family('qwen25vl')); "
        "write_onnx(source, 'fp16', Path(sys.argv[2]), prune_layers=(2,), scales={1: np.ones(64), 3: np.ones(64) / 3})"
    )
    for name in ("a", "b"):
        command = [sys.executable, "-c", code, str(source.checkpoint.folder), str(tmp_path / name)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": str(ord(name))})
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
