"""The eager model in half precision with parts of it in FP32: what computes in which dtype, for every family."""

import re
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.model.families import load_family
from capa_export.model.low_precision import lowered
from capa_export.model.prompt import Prompt, Prompter
from capa_export.model.source import Source
from tests.conftest import noise
from tests.models import FAMILIES
from tests.models.qwen25vl import random_model
from tests.planted import plant_in_decoder, plant_in_tower

HALF, FLOAT = torch.float16, torch.float32
IN_BLOCK = re.compile(r".*\.(?:layers?|blocks)\.(?P<part>\d+\..+)")
GATED = ("gate", "up", "down")
Case = tuple[Any, str, Prompt]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A small random model, its family, and a prompt."""
    family, small = request.param, FAMILIES[request.param]
    model = small.random_model()
    folder = small.save_model(tmp_path_factory.mktemp(family), model)
    source = Source.of(open_checkpoint(str(folder)), load_family(family))
    prompter = Prompter(folder, folder, source.family, source.dims)
    return model, family, prompter("what color is the star ?", [noise(112, 84)])


@torch.no_grad()
def logits(model: Any, family: str, prompt: Prompt, kept: Any = None) -> tuple[np.ndarray, Any]:
    """[2, V], of the prompt and of one more token, with layer 2 pruning; and what it kept."""
    eager, inputs = Eager(model), EagerInputs.of(load_family(family).eager_inputs(model, prompt))
    plan = EagerPlan({2: prompt.num_visual // 2}, forced=kept or {}, min_keep_per_image=1)
    is_visual = torch.from_numpy(prompt.is_visual)
    run = eager.prefill(inputs, is_visual, plan)
    return torch.stack([run.logits, eager.step(run, 5, prompt.next_position)]).numpy(), run.kept


def dtypes(model: Any, family: str, prompt: Prompt) -> dict[str, torch.dtype]:
    """What every projection and every norm computes in, by module path."""
    seen: dict[str, set[torch.dtype]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or ("norm" in name.rpartition(".")[2] and list(module.parameters())):
            of = seen.setdefault(name, set())
            module.register_forward_hook(lambda _, __, output, of=of: of.add(output.dtype), prepend=True)
    logits(model, family, prompt)
    assert all(len(of) <= 1 for of in seen.values())
    return {name: next(iter(of)) for name, of in seen.items() if of}


def test_without_islands_only_weights_are_lowered(case: Case) -> None:
    model, family, prompt = case
    half = lowered(model, HALF)
    assert {parameter.dtype for parameter in half.parameters()} == {HALF}
    assert {parameter.dtype for parameter in model.parameters()} == {FLOAT}
    for (name, buffer), other in zip(model.named_buffers(), half.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert set(dtypes(half, family, prompt).values()) == {HALF}


def test_patches_are_summed_in_fp32_and_rounded_once(case: Case) -> None:
    half = lowered(case[0], HALF)
    embedding = next(module for module in half.modules() if isinstance(module, nn.Conv2d | nn.Conv3d))
    random = torch.Generator().manual_seed(0)
    patches = torch.randn((4, embedding.in_channels, *embedding.kernel_size), generator=random).to(HALF)
    plain = deepcopy(embedding).float()
    with torch.no_grad():
        assert torch.equal(embedding(patches), plain(patches.float()).to(HALF))


def test_branches_compute_in_fp32_with_their_norms(case: Case) -> None:
    model, family, prompt = case
    half = lowered(model, HALF, ["2.self_attn", "3.mlp", "visual.0.attn", "visual.1.mlp"])
    wide = {name for name, dtype in dtypes(half, family, prompt).items() if dtype == FLOAT}
    of_decoder = {name.partition("layers.")[2] for name in wide if "language_model" in name}
    norms = {"2.self_attn.q_norm", "2.self_attn.k_norm"} if family == "qwen3vl" else set()
    assert of_decoder == norms | {
        "2.input_layernorm",
        *(f"2.self_attn.{part}_proj" for part in "qkvo"),
        "3.post_attention_layernorm",
        *(f"3.mlp.{part}_proj" for part in GATED),
    }
    of_tower = {found["part"] for name in wide if (found := IN_BLOCK.fullmatch(name)) and "language_model" not in name}
    assert (
        of_tower
        == {
            "qwen25vl": {"0.norm1", "0.attn.qkv", "0.attn.proj", "1.norm2", *(f"1.mlp.{part}_proj" for part in GATED)},
            "qwen3vl": {"0.norm1", "0.attn.qkv", "0.attn.proj", "1.norm2", "1.mlp.linear_fc1", "1.mlp.linear_fc2"},
            "llava15": {
                "0.layer_norm1",
                *(f"0.self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
                "1.layer_norm2",
                "1.mlp.fc1",
                "1.mlp.fc2",
            },
            "internvl3": {
                "0.layernorm_before",
                *(f"0.attention.{part}_proj" for part in "qkv"),
                "0.attention.projection_layer",
                "1.layernorm_after",
                "1.mlp.fc1",
                "1.mlp.fc2",
            },
        }[family]
    )


def test_the_stream_is_in_fp32_and_branches_are_not(case: Case) -> None:
    model, family, prompt = case
    half = lowered(model, HALF, ["residual", "visual.residual"])
    streams: list[torch.dtype] = []
    for name, module in half.named_modules():
        if (found := IN_BLOCK.fullmatch(name)) and "norm" in name and found["part"].count(".") == 1:
            module.register_forward_pre_hook(lambda _, given: streams.append(given[0].dtype))
    found = dtypes(half, family, prompt)
    assert set(streams) == {FLOAT}
    projections = {
        name for name, dtype in found.items() if dtype == FLOAT and "norm" not in name and "ln_q" not in name
    }
    # LLaVA's projector takes the stream as it is: its first product is computed in FP32, and cast.
    assert projections <= {"model.multi_modal_projector.linear_1"}


@pytest.mark.parametrize(
    "units", [["residual", "visual.residual"], ["2", "visual.1"], ["2.self_attn", "visual.0.mlp", "residual"]], ids=str
)
def test_is_as_close_as_half_precision_is(case: Case, units: Sequence[str]) -> None:
    model, family, prompt = case
    expected, kept = logits(model, family, prompt)
    plain, _ = logits(lowered(model, HALF), family, prompt, kept)
    islands, _ = logits(lowered(model, HALF, units), family, prompt, kept)
    scale = np.abs(expected).max()
    # Fewer roundings, but others: an ulp or two may go the other way.
    assert np.abs(islands - expected).max() <= max(2 * np.abs(plain - expected).max(), 2e-3 * scale)


def test_all_in_fp32_leaves_what_goes_in_and_out(case: Case) -> None:
    """The hidden states are those of FP32 over an embedding table in half precision, on whatever processor."""
    model, family, prompt = case
    text_only = Prompt(
        prompt.input_ids[:4],
        np.zeros(4, bool),
        (),
        prompt.position_ids[:, :4],
        4,
    )
    rounded = deepcopy(model)
    table = rounded.get_input_embeddings().weight
    table.data = table.data.to(HALF).float()

    def hidden(of: Any) -> np.ndarray:
        """[L, T, D], behind each layer."""
        states: list[np.ndarray] = []
        inputs = EagerInputs.of(load_family(family).eager_inputs(of, text_only))

        def watch(_layer: int, hidden_TD: torch.Tensor, _positions: torch.Tensor) -> None:
            states.append(hidden_TD.float().numpy())

        Eager(of).prefill(inputs, torch.zeros(4, dtype=torch.bool), EagerPlan({}), watch)
        return np.stack(states)

    expected = hidden(rounded)
    islands, plain = (hidden(lowered(model, HALF, units)) for units in (["residual", *map(str, range(5))], ()))
    scale = np.abs(expected).max()
    # The last bits of FP32 against those of FP16.
    np.testing.assert_allclose(islands, expected, rtol=0, atol=1e-6 * scale)
    assert np.abs(plain - expected).max() > 1e-4 * scale


@pytest.mark.parametrize(
    ("plant", "too_few", "enough"),
    [
        (plant_in_decoder, ["1.mlp"], ["1.mlp", "residual"]),
        (plant_in_tower, ["visual.residual"], ["visual.2.mlp", "visual.residual"]),
    ],
)
def test_massive_activations_need_all_of_it(
    prompter: Prompter, plant: Any, too_few: Sequence[str], enough: Sequence[str]
) -> None:
    model, prompt = random_model(), prompter("what color is the star ?", [noise(112, 84)])
    plant(model)
    expected, kept = logits(model, "qwen25vl", prompt)
    assert np.isfinite(expected).all()
    for units in ((), too_few):
        assert np.isnan(logits(lowered(model, HALF, units), "qwen25vl", prompt, kept)[0]).any()
    found, _ = logits(lowered(model, HALF, enough), "qwen25vl", prompt, kept)
    # As of any model in FP16: see `test_fp16_stays_close`.
    assert np.abs(found - expected).max() <= 1e-2 * np.abs(expected).max()
