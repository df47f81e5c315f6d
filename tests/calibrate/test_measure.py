"""Calibration: sums against a direct computation, merging, alpha, linear layers, sinks and ranges."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.workers import Workers
from capa_export.bundle.store import Bundle
from capa_export.calibrate.measure import _largest_product, calibrate
from capa_export.calibrate.sums import Calibration, LayerSums, merged
from capa_export.cli import main
from capa_export.config.recipe import FFN, load_recipe
from capa_export.data.samples import Samples, samples_from
from capa_export.model import memory
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Prompter
from tests.building import Building
from tests.conftest import noise
from tests.models.qwen25vl import random_model


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
    xs, ys, of_text = [], [], []
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
        cosines = torch.cosine_similarity((states[3] + mixed)[0].double(), states[4][0].double(), dim=-1)
        of_text.append(cosines[~prompt.is_visual])
    x, y = torch.cat(xs), torch.cat(ys)
    sums = measured.layers[3]
    np.testing.assert_allclose(sums.xx, (x * x).sum(0), rtol=1e-5)
    np.testing.assert_allclose(sums.xy, (x * y).sum(0), rtol=1e-4, atol=1e-3)
    assert sums.visual_tokens == len(x)
    assert sums.cosine == pytest.approx(float(torch.cosine_similarity(x, y).mean()), abs=1e-6)
    text = torch.cat(of_text)
    assert sums.text_tokens == len(text)
    assert measured.summary(FFN())["layers"][3]["cosine_text"] == pytest.approx(float(text.mean()), abs=1e-6)
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


def test_any_layer_may_be_linear_and_only_beyond_eta() -> None:
    layers = [LayerSums.zeros(4) for _ in range(4)]
    for sums, cosine in zip(layers, (0.75, 0.5, 0.25, 0.625), strict=True):
        sums.visual_tokens, sums.visual_cosine = 2, 2 * cosine
    assert Calibration("x", 1, layers, {}).linear_layers(0.5) == (0, 3)


def test_every_block_is_watched(calibration: Calibration) -> None:
    parts = ["", ".mlp", ".mlp.up_proj", ".mlp.down_proj", ".mlp.down_proj.input"]
    attention = ["", ".query", ".key", ".value", ".scores"]
    decoder = [
        *parts,
        ".input_layernorm",
        ".post_attention_layernorm.input",
        *(".self_attn" + part for part in attention),
    ]
    tower = [*parts, ".norm1", ".norm2.input", *(".attn" + part for part in attention)]
    names = [f"model.language_model.layers.{layer}{part}" for layer in range(5) for part in decoder]
    names += [f"model.visual.blocks.{block}{part}" for block in range(3) for part in tower]
    names += ["model.language_model.norm", "model.visual.merger.ln_q.input", "model.visual.merger.mlp.2"]
    assert all(calibration.absmax[name] > 0 for name in names)
    # Two norms and three projections in a block, one and two behind the tower's, one behind the decoder's.
    assert len(calibration.absmax) == (5 + 3) * (2 + len(attention) + 2 * 5) + 2 * 3 + 2


def test_ranges_are_those_of_the_model(model: Any, prompter: Prompter, pictures: Path) -> None:
    samples = samples_from(pictures, load_recipe("qwen25vl"), 1, split="train")
    absmax = run(model, prompter, samples).absmax
    [sample] = samples
    embeds, position_ids = qwen25vl.eager_inputs(model, prompter(sample.question, [sample.image]))
    text, name = model.model.language_model, "model.language_model.layers.2"
    layer = text.layers[2]
    with torch.no_grad():
        states = text(inputs_embeds=embeds, position_ids=position_ids, output_hidden_states=True).hidden_states
        normed = layer.input_layernorm(states[2])
        rotary = text.rotary_emb(embeds, position_ids)
        mixed, _ = layer.self_attn(normed, attention_mask=None, position_embeddings=rotary)
        between = layer.post_attention_layernorm(states[2] + mixed)
        inner = layer.mlp.act_fn(layer.mlp.gate_proj(between)) * layer.mlp.up_proj(between)
    expected = {
        "": states[3],
        ".input_layernorm": normed,
        ".self_attn": mixed,
        ".post_attention_layernorm.input": states[2] + mixed,
        ".mlp.down_proj.input": inner,
    }
    for part, values in expected.items():
        assert absmax[name + part] == pytest.approx(float(values.abs().max()), rel=1e-5), part


@pytest.mark.parametrize("tile", [1 << 20, 40])
def test_the_largest_score_is_found_in_tiles(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr("capa_export.calibrate.measure._TILE", tile)
    torch.manual_seed(0)
    for spread in (0.0, 2.0):
        lengths = torch.exp(spread * torch.randn(6, 37, 1))
        query, key = lengths * torch.randn(6, 37, 8), torch.randn(2, 19, 8)
        products = query @ key.repeat_interleave(3, dim=0).mT
        assert float(_largest_product(query, key)) == pytest.approx(float(products.abs().max()), rel=1e-6)


def test_the_longest_key_bounds_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """One long key that the longest queries do not meet, and a short query does."""
    monkeypatch.setattr("capa_export.calibrate.measure._TILE", 1)
    key, query = torch.zeros(1, 19, 2), torch.zeros(1, 4, 2)
    key[0, :, 1], key[0, 5] = 0.5, torch.tensor([10.0, 0.0])
    query[0, :, 1], query[0, 2] = 3.0, torch.tensor([1.0, 0.0])
    assert _largest_product(query, key) == 10


def test_the_attention_is_left_as_it_was(model: Any, prompter: Prompter, pictures: Path) -> None:
    before = AttentionInterface()["sdpa"]
    run(model, prompter, samples_from(pictures, load_recipe("qwen25vl"), 1, split="train"))
    assert AttentionInterface()["sdpa"] is before


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
    summary = json.loads(json.dumps(calibration.summary(FFN(paper_layers=(2, 3)))))
    assert summary["paper_layers"] == [2, 3]
    assert summary["largest"]["absmax"] == max(calibration.absmax.values())


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CapaError, match="no such calibration"):
        Calibration.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(CapaError, match="not a calibration"):
        Calibration.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("option", [["--workers", "2"], ["--ray", "auto"]])
def test_layers_one_at_a_time_are_not_spread(
    option: list[str], checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["calibrate", "--model", "qwen25vl", "--checkpoint", str(checkpoint), "--images", str(pictures)]
    assert main([*asked, "--layer-by-layer", *option, "--out", str(tmp_path / "out")]) == ExitCode.USAGE
    assert "--layer-by-layer runs in one process: drop it, or --workers and --ray" in capsys.readouterr().err


def test_more_workers_than_memory(
    checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    recipe = load_recipe("qwen25vl")
    workers = Workers(count=3)
    building = Building.of(recipe, Bundle(tmp_path), checkpoint, images=pictures, workers=workers)
    with pytest.raises(CapaError, match=r"--workers 3: so many copies of the model take .* use fewer"):
        building.calibrate()
