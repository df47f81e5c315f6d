"""Calibration: sums against a direct computation, merging, alpha, linear layers, sinks and ranges."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capa_export.calibrate import calibrate
from capa_export.calibration import Calibration, LayerSums, merged
from capa_export.errors import CapaError
from capa_export.families import qwen25vl
from capa_export.prompt import Prompter
from capa_export.recipe import load_recipe
from capa_export.samples import Samples, samples_from
from tests.conftest import noise, random_model


def run(model: Any, prompter: Prompter, samples: Samples) -> Calibration:
    return calibrate(model, qwen25vl, prompter, samples, checkpoint_digest="x")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(6):
        noise(56 + 28 * index, 84, index).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def calibration(model: Any, prompter: Prompter, pictures: Path) -> Calibration:
    return run(model, prompter, samples_from(pictures, load_recipe("qwen25vl"), 500, split="train"))


def test_sums_are_those_of_the_hidden_states(model: Any, prompter: Prompter, pictures: Path) -> None:
    samples = samples_from(pictures, load_recipe("qwen25vl"), 2, split="train")
    measured = run(model, prompter, samples)
    xs, ys = [], []
    layer = model.model.language_model.layers[3]
    for sample in samples:
        prompt = prompter(sample.question, [sample.image])
        embeds, position_ids = qwen25vl.eager_inputs(model, prompt)
        with torch.no_grad():
            states = model.model.language_model(
                inputs_embeds=embeds, position_ids=position_ids, output_hidden_states=True
            ).hidden_states
            rotary = model.model.language_model.rotary_emb(embeds, position_ids)
            mixed, _ = layer.self_attn(
                layer.input_layernorm(states[3]), attention_mask=None, position_embeddings=rotary
            )
        xs.append((states[3] + mixed)[0, prompt.is_visual].double())
        ys.append(states[4][0, prompt.is_visual].double())
    x, y = torch.cat(xs), torch.cat(ys)
    sums = measured.layers[3]
    np.testing.assert_allclose(sums.xx, (x * x).sum(0), rtol=1e-5)
    np.testing.assert_allclose(sums.xy, (x * y).sum(0), rtol=1e-4, atol=1e-3)
    assert sums.visual_tokens == len(x)
    assert sums.cosine == pytest.approx(float(torch.cosine_similarity(x, y).mean()), abs=1e-6)
    alpha = torch.stack([torch.linalg.lstsq(x[:, c : c + 1], y[:, c : c + 1]).solution[0, 0] for c in range(64)])
    np.testing.assert_allclose(sums.alpha, alpha, rtol=1e-3, atol=1e-4)
    error = (y - x * alpha).norm() / y.norm()
    assert sums.relative_error == pytest.approx(float(error), rel=1e-4)


def test_runs_merge_to_the_run_over_everything(
    model: Any, prompter: Prompter, pictures: Path, calibration: Calibration, tmp_path: Path
) -> None:
    parts = []
    for index, chosen in enumerate((slice(0, 2), slice(2, 6))):
        samples = samples_from(pictures, load_recipe("qwen25vl"), 500, split="train")
        files = samples.files[chosen]
        part = run(
            model,
            prompter,
            Samples(count=len(files), name="", has_answers=False, files=files, question=samples.question),
        )
        part.save(tmp_path / f"{index}.safetensors")
        parts.append(Calibration.load(tmp_path / f"{index}.safetensors"))
    whole = merged(parts)
    assert whole.samples == calibration.samples == 6
    assert whole.absmax == calibration.absmax
    for one, other in zip(whole.layers, calibration.layers, strict=True):
        # Only the order of FP64 additions differs.
        np.testing.assert_allclose(one.xx, other.xx, rtol=1e-13)
        np.testing.assert_array_equal(one.alpha.astype(np.float32), other.alpha.astype(np.float32))
        assert one.visual_tokens == other.visual_tokens
        assert one.sinks == other.sinks


def test_calibrations_of_different_checkpoints_do_not_merge() -> None:
    parts = [Calibration(digest, 1, [LayerSums.zeros(4)], {}) for digest in "ab"]
    with pytest.raises(CapaError, match="different checkpoints"):
        merged(parts)


def test_alpha_of_a_dead_channel_is_one() -> None:
    sums = LayerSums(xx=np.array([4.0, 0.0, 1e-40]), xy=np.array([6.0, 0.0, 1.0]), yy=np.array([9.0, 0.0, 0.0]))
    np.testing.assert_array_equal(sums.alpha, [1.5, 1.0, 1.0])


def test_linear_layers_follow_eta(calibration: Calibration) -> None:
    cosines = [layer.cosine for layer in calibration.layers]
    middle = sorted(cosines)[2]
    assert calibration.linear_layers(middle) == tuple(i for i, cosine in enumerate(cosines) if cosine > middle)
    assert calibration.linear_layers(0.999999) == ()


def test_every_block_is_watched(calibration: Calibration) -> None:
    for name in ("model.language_model.layers.4", "model.language_model.layers.0.mlp", "model.visual.blocks.2.attn"):
        assert calibration.absmax[name] > 0
    assert len(calibration.absmax) == 3 * (5 + 3)


def test_planted_sinks_are_found(prompter: Prompter, pictures: Path) -> None:
    # RMS norm bounds |x_d| by sqrt(D), so that phi > 20 needs more than 400 channels.
    model = random_model(
        1,
        hidden_size=640,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [20, 30, 30]},
    )
    model.model.visual.merger.mlp[2] = torch.nn.Linear(128, 640)
    with torch.no_grad():
        model.model.visual.merger.mlp[2].bias[77] = 1e4
    samples = samples_from(pictures, load_recipe("qwen25vl"), 1, split="train")
    found = run(model, prompter, samples)
    assert found.sink_channels == (77,)
    assert found.sink_tokens(2) == found.layers[2].visual_tokens


def test_sinks_count_tokens_with_any_sink_channel() -> None:
    layers = [LayerSums.zeros(8) for _ in range(4)]
    layers[0].sinks = Counter({(1, 3): 2, (3,): 4, (5,): 8})
    layers[1].sinks = Counter({(1,): 1})
    found = Calibration("x", 1, layers, {})
    assert found.sink_channels == (1, 3, 5)
    assert [found.sink_tokens(layer) for layer in range(4)] == [14, 1, 0, 0]


def test_summary_is_json(calibration: Calibration) -> None:
    summary = json.loads(json.dumps(calibration.summary(0.96, (2, 3))))
    assert summary["paper_layers"] == [2, 3]
    assert summary["largest"]["absmax"] == max(calibration.absmax.values())


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CapaError, match="no such calibration"):
        Calibration.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(CapaError, match="not a calibration"):
        Calibration.load(tmp_path / "bad.safetensors")
