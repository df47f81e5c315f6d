"""The tokens of answers, against what transformers' `generate` makes of the same logits and of the same model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from capa_export.base.errors import CapaError
from capa_export.export.graphs import write_onnx
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.families.qwen25vl import tower_inputs
from capa_export.model.generation import Generation
from capa_export.model.prompt import Prompt, Prompter
from capa_export.model.source import Source
from capa_export.run.decoding import TokenChooser, generate
from capa_export.run.onnx import OnnxModel
from tests.conftest import noise
from tests.models import FAMILIES
from tests.products import once_each

NOWHERE = Path("generation_config.json")
VOCABULARY, STOP = 40, [3, 7]
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=4)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "do_sample": st.booleans(),
        "temperature": st.floats(0.05, 3),
        "top_k": st.integers(0, VOCABULARY + 3),
        "top_p": st.floats(0, 1),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.5, 2),
        "no_repeat_ngram_size": st.integers(0, 4),
        "bad_words_ids": st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3), min_size=1),
        "suppress_tokens": TOKENS,
        "begin_suppress_tokens": TOKENS,
        "min_length": st.integers(0, 12),
        "min_new_tokens": st.integers(0, 5),
    },
)


def asked(**given: Any) -> Generation:
    return Generation(**given, source=NOWHERE)


def reference(model: Any, given: dict[str, Any], num_prompt: int) -> Any:
    """The processors that `generate` would apply with the same settings."""
    config = GenerationConfig(**given, eos_token_id=STOP)
    config.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    model._prepare_special_tokens(config, device="cpu")
    inputs = torch.zeros((1, num_prompt), dtype=torch.long)
    config = model._prepare_generated_length(
        config,
        has_default_max_length=True,
        has_default_min_length="min_length" not in given,
        model_input_name="input_ids",
        input_ids_length=num_prompt,
        inputs_tensor=inputs,
    )
    return model._get_logits_processor(config, input_ids_seq_length=num_prompt, device="cpu")


@settings(deadline=None, max_examples=300)
@given(
    given=SETTINGS,
    prompt=st.lists(st.integers(0, VOCABULARY + 2), min_size=1, max_size=8),
    said=st.lists(st.integers(0, VOCABULARY - 1), max_size=5),
    seed=st.integers(0, 1000),
)
def test_scores_are_those_of_generate(
    model: Any, given: dict[str, Any], prompt: list[int], said: list[int], seed: int
) -> None:
    """Placeholders of visual tokens may lie above the vocabulary, and tokens repeat themselves."""
    logits = np.random.default_rng(seed).normal(0, 3, VOCABULARY).astype(np.float32)
    chooser = TokenChooser(asked(**given), prompt, STOP)
    chooser.tokens += said
    processors = reference(model, given, len(prompt))
    expected = processors(torch.tensor([prompt + said]), torch.from_numpy(logits[None])).numpy()[0]
    if not np.isfinite(expected).any():
        with pytest.raises(CapaError, match="leaves no token to say"):
            chooser.scores(logits)
        return
    np.testing.assert_allclose(chooser.scores(logits), expected, rtol=1e-5)


def inputs_of(family: str, model: Any, prompt: Prompt) -> dict[str, torch.Tensor]:
    """What a processor of the family gives `generate`."""
    inputs = {"input_ids": torch.from_numpy(prompt.input_ids)[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if not prompt.pictures:
        return inputs
    if family.startswith("qwen"):
        patches, grid = tower_inputs(model, prompt.pictures)
        kinds = torch.from_numpy(prompt.is_visual)[None].int()
        return {**inputs, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    pixels = np.concatenate([picture.patches for picture in prompt.pictures])
    return {**inputs, "pixel_values": torch.from_numpy(pixels)}


Case = tuple[str, Any, OnnxModel, Sequence[Prompt]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A small random model of a family with its graphs in FP32, and prompts of two pictures, of one and of none."""
    family, small = request.param, FAMILIES[request.param]
    model = small.random_model()
    folder = small.save_model(tmp_path_factory.mktemp(family), model)
    source = Source.of(open_checkpoint(str(folder)), load_family(family))
    out = tmp_path_factory.mktemp("onnx")
    write_onnx(source, "fp32", out, prune_layers=(2,), scales={})
    prompter = Prompter(folder, folder, source.family, source.dims)
    pictures = [noise(112, 84), noise(84, 84, 1)]
    prompts = [prompter("what color is the star ?", pictures[:count]) for count in (2, 1, 0)]
    return family, model, OnnxModel(out, threads=1), prompts


def answers(
    onnx: OnnxModel, prompts: Sequence[Prompt], choosers: Sequence[TokenChooser], limit: int
) -> list[list[int]]:
    runs = [onnx.prefill(prompt, [prompt.num_visual]) for prompt in prompts]
    steps = list(generate(onnx, prompts, runs, choosers, choosers[0].stop, limit))
    return [[token for step in steps if (token := step[row]) is not None] for row in range(len(prompts))]


GIVEN = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"repetition_penalty": 1.1, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
    # One token left: sampled, and all the same no matter of chance.
    {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05},
    {"do_sample": True, "top_k": 1, "suppress_tokens": [5, 6]},
]


@pytest.mark.parametrize(("case", "given"), once_each(FAMILIES, GIVEN), ids=str, indirect=["case"], scope="module")
def test_what_is_not_pruned_answers_as_generate_does(case: Case, given: dict[str, Any]) -> None:
    family, model, onnx, prompts = case
    limit = 12

    def generated(stop: list[int] | None, **given: Any) -> list[list[int]]:
        config = GenerationConfig(**given, eos_token_id=stop, pad_token_id=0, max_new_tokens=limit)
        said = [model.generate(**inputs_of(family, model, prompt), generation_config=config)[0] for prompt in prompts]
        return [tokens[len(prompt.input_ids) :].tolist() for tokens, prompt in zip(said, prompts, strict=True)]

    endless = generated(None, **given)
    if given.get("repetition_penalty", 1) > 1.1 or "no_repeat_ngram_size" in given:
        assert endless != generated(None)
    # Tokens that are said late, so that answers end, and at different places.
    stop = [list(dict.fromkeys(tokens))[-1] for tokens in endless[:2]]
    expected = [tokens[:-1] if tokens[-1] in stop else tokens for tokens in generated(stop, **given)]
    choosers = [
        TokenChooser(asked(**given), prompt.input_ids.tolist(), stop, np.random.default_rng(0)) for prompt in prompts
    ]
    assert answers(onnx, prompts, choosers, limit) == expected


def test_samples_are_distributed_as_generate_s(model: Any) -> None:
    """Chi-square of 20,000 draws; a threshold that one in a thousand seeds would miss, and this seed does not."""
    given = {"do_sample": True, "temperature": 0.8, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.2}
    logits = np.random.default_rng(5).normal(0, 1.5, VOCABULARY).astype(np.float32)
    processors = reference(model, given, 2)
    scores = processors(torch.tensor([[4, 9]]), torch.from_numpy(logits[None]))
    probabilities = scores.double().softmax(-1).numpy()[0]
    kinds = np.flatnonzero(probabilities)
    assert 5 < len(kinds) < 12
    random, draws = np.random.default_rng(1), 20_000
    found = np.bincount(
        [TokenChooser(asked(**given), [4, 9], STOP, random)(logits) for _ in range(draws)], minlength=VOCABULARY
    )
    assert set(np.flatnonzero(found)) == set(kinds)
    expected = draws * probabilities[kinds]
    statistic, freedom = float(((found[kinds] - expected) ** 2 / expected).sum()), len(kinds) - 1
    # Wilson and Hilferty: the cube root of chi-square over its degrees of freedom is nearly normal.
    spread = 2 / (9 * freedom)
    assert ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5 < 3.09


def test_a_seed_gives_an_answer_again_and_in_a_batch(case: Case) -> None:
    _, _, onnx, prompts = case
    given = asked(do_sample=True, temperature=1.5)

    def sampled(seed: int, *indices: int) -> list[list[int]]:
        seeds = np.random.SeedSequence(seed).spawn(len(prompts))
        choosers = [
            TokenChooser(given, prompts[index].input_ids.tolist(), [], np.random.default_rng(seeds[index]))
            for index in indices
        ]
        return answers(onnx, [prompts[index] for index in indices], choosers, 8)

    together = sampled(3, 0, 1, 2)
    assert together == sampled(3, 0, 1, 2) == [sampled(3, index)[0] for index in range(3)]
    assert together != sampled(4, 0, 1, 2)


def test_the_coldest_temperature_is_one() -> None:
    """`generate` divides by it, and gets infinities."""
    logits = np.array([1, 20, 20, -5], np.float32)
    for temperature in (1e-30, 1e-45, 5e-324):
        chooser = TokenChooser(asked(do_sample=True, temperature=temperature), [0], [], np.random.default_rng(0))
        assert {chooser(logits) for _ in range(30)} == {1, 2}


def test_what_no_token_can_follow_is_one_line() -> None:
    for logits in ([np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]):
        with pytest.raises(CapaError, match=r"logits are not finite.*validate --bisect"):
            TokenChooser(asked(), [0], [])(np.array(logits, np.float32))
    with pytest.raises(CapaError, match="leaves no token to say"):
        TokenChooser(asked(suppress_tokens=[0, 1]), [0], [])(np.array([1, 2], np.float32))
