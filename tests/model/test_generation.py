"""What a checkpoint and a command line say of generation, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from capa_export.base.errors import CapaError, ExitCode
from capa_export.model import generation
from capa_export.model.generation import (
    Generation,
    GenerationOptions,
    eos_token_ids,
    read_generation,
)

QWEN = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 0.000001,
    "transformers_version": "4.49.0",
}


def said(folder: Path, config: object, name: str = "generation_config.json") -> Path:
    (folder / name).write_text(json.dumps(config), encoding="utf-8")
    return folder


def read(folder: Path, **config: Any) -> Generation:
    return read_generation(said(folder, config))


def test_what_qwen_publishes(tmp_path: Path) -> None:
    found = read(tmp_path, **QWEN)
    assert found.in_effect == {
        "do_sample": True,
        "temperature": 1e-6,
        "top_p": 1.0,
        "top_k": 50,
        "repetition_penalty": 1.05,
    }
    assert not found.ignored and eos_token_ids(tmp_path) == [151645, 151643]
    greedy = found.with_options(GenerationOptions(greedy=True))
    assert greedy.in_effect == {"do_sample": False, "repetition_penalty": 1.05}


def test_what_is_not_said_is_as_in_generate(tmp_path: Path) -> None:
    found = read(tmp_path, temperature=None, top_k=None)
    defaults = GenerationConfig._get_default_generation_params()
    for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size"):
        assert getattr(found, name) == defaults[name], name
    assert found.longest(7) == 64


def test_every_setting_of_generate_is_done_or_named_or_without_effect() -> None:
    theirs = GenerationConfig._get_default_generation_params()
    known = Generation.model_fields.keys() | generation._UNSUPPORTED.keys() | generation._INERT
    assert not GenerationConfig().to_dict().keys() - known
    for name, neutral in generation._UNSUPPORTED.items():
        assert theirs.get(name) in (None, *neutral), name


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    found = read(tmp_path, num_beams=4, num_return_sequences=1, stop_strings=["."], brand_new=0.5, use_cache=False)
    assert found.ignored == ["num_beams 4", "stop_strings ['.']", "brand_new 0.5"]
    for sampled in (False, True):
        found = read(tmp_path, do_sample=sampled, typical_p=0.9, eta_cutoff=0.0)
        assert found.ignored == (["typical_p 0.9"] if sampled else [])
    assert found.with_options(GenerationOptions(greedy=True)).ignored == []


def test_without_the_file_the_config_is_asked(tmp_path: Path) -> None:
    text = {"temperature": 0.5, "top_k": 9, "max_length": 20, "hidden_size": 64, "num_beams": 2}
    found = read_generation(said(tmp_path, {"do_sample": True, "top_k": 5, "text_config": text}, "config.json"))
    assert found.in_effect | {"top_p": 1, "repetition_penalty": 1} == {
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 1,
        "repetition_penalty": 1,
    }
    assert found.ignored == ["num_beams 2"] and found.longest(700) == 64
    assert read(tmp_path).in_effect == {"do_sample": False, "repetition_penalty": 1}


def test_the_command_line_goes_first(tmp_path: Path) -> None:
    found = read(tmp_path, **QWEN, top_p=0.8, max_length=4096)
    options = GenerationOptions(temperature=0.7, top_k=0, repetition_penalty=1, seed=3, max_new_tokens=5)
    changed = found.with_options(options)
    assert (changed.temperature, changed.top_p, changed.top_k, changed.repetition_penalty) == (0.7, 0.8, 0, 1)
    assert (found.longest(96), changed.longest(96)) == (4000, 5)
    assert read(tmp_path, max_new_tokens=9, max_length=20).longest(96) == 9
    # Who says how to sample wants to.
    assert read(tmp_path).with_options(GenerationOptions(top_p=0.5)).do_sample


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"greedy": True, "temperature": 0.5}, "--greedy takes the likeliest token, where --temperature has no effect"),
        ({"greedy": True, "top_p": 0.5}, "where --top-p has no effect"),
        ({"greedy": True, "top_k": 5}, "where --top-k has no effect"),
        ({"greedy": True, "seed": 5}, "where --seed has no effect"),
        ({"temperature": 0.0}, "--temperature must be above 0, not 0.0; --greedy takes the likeliest token"),
        ({"temperature": -1.0}, "--temperature must be above 0"),
        ({"temperature": float("nan")}, "--temperature must be above 0"),
        ({"temperature": float("inf")}, "--temperature must be above 0"),
        ({"top_p": 0.0}, "--top-p must be above 0 and at most 1"),
        ({"top_p": 1.5}, "--top-p must be above 0 and at most 1"),
        ({"top_p": float("nan")}, "--top-p must be above 0 and at most 1"),
        ({"top_k": -1}, "--top-k must be 0 or more, where 0 keeps every token, not -1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty must be above 0, not 0.0"),
        ({"seed": -1}, "--seed must be 0 or more, not -1"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be 1 or more, not 0"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(CapaError) as error:
        GenerationOptions(**options)
    assert problem in str(error.value) and error.value.code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"do_sample": "yes"}, "do_sample: Input should be a valid boolean"),
        ({"temperature": "0.7"}, "temperature: Input should be a valid number"),
        ({"temperature": float("nan")}, "temperature: Input should be a finite number"),
        ({"temperature": 10**400}, "temperature: "),
        ({"top_p": True}, "top_p: Input should be a valid number"),
        ({"top_k": 1.5}, "top_k: Input should be a valid integer"),
        ({"repetition_penalty": [1]}, "repetition_penalty: "),
        ({"bad_words_ids": [3]}, "bad_words_ids.0: "),
        ({"bad_words_ids": [[]]}, "bad_words_ids.0: "),
        ({"suppress_tokens": 3}, "suppress_tokens: "),
        ({"max_new_tokens": 0}, "max_new_tokens: "),
        ({"max_length": "long"}, "max_length: "),
        ([], "not a JSON object"),
    ],
    ids=str,
)
def test_a_broken_file_is_one_line(tmp_path: Path, config: object, problem: str) -> None:
    with pytest.raises(CapaError) as error:
        read_generation(said(tmp_path, config))
    assert f"generation_config.json: {problem}" in str(error.value)
    assert "\n" not in str(error.value) and error.value.code == ExitCode.PREFLIGHT


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {"do_sample": True, "temperature": 0},
            "temperature must be above 0, not 0.0; --temperature goes in its place",
        ),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be from 0 to 1, not 1.5; --top-p goes in its place"),
        ({"do_sample": True, "top_k": -1}, "top_k must be 0 or more"),
        ({"do_sample": True, "min_p": 2}, "min_p must be from 0 to 1, not 2.0; --greedy goes in its place"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
    ],
    ids=str,
)
def test_what_generate_would_fail_on_is_refused_where_it_takes_effect(
    tmp_path: Path, config: dict[str, Any], problem: str
) -> None:
    found = read(tmp_path, **config)
    with pytest.raises(CapaError, match="generation_config") as error:
        found.with_options(GenerationOptions())
    assert problem in str(error.value)
    mended = GenerationOptions(repetition_penalty=1.0)
    assert not found.with_options(replace(mended, greedy=True)).do_sample


def test_a_prompt_longer_than_all_may_be_is_refused(tmp_path: Path) -> None:
    found = read(tmp_path, max_length=20)
    assert found.longest(19) == 1
    with pytest.raises(CapaError, match="max_length is 20, and the prompt alone has 20 tokens; give --max-new-tokens"):
        found.longest(20)


def test_a_seed_needs_chance(tmp_path: Path) -> None:
    with pytest.raises(CapaError, match="--seed has no effect where the likeliest token is taken") as error:
        read(tmp_path).with_options(GenerationOptions(seed=1))
    assert error.value.code == ExitCode.USAGE
    assert read(tmp_path, do_sample=True).with_options(GenerationOptions(seed=1)).do_sample


def test_the_end_of_an_answer_is_found_or_asked_for(tmp_path: Path) -> None:
    said(tmp_path, {"text_config": {"eos_token_id": 7}}, "config.json")
    assert eos_token_ids(tmp_path) == [7]
    said(tmp_path, {"eos_token_id": [1, 2]})
    assert eos_token_ids(tmp_path) == [1, 2]
    said(tmp_path, {"eos_token_id": [True]})
    with pytest.raises(CapaError, match="eos_token_id: must be a whole number"):
        eos_token_ids(tmp_path)
    for path in tmp_path.iterdir():
        path.write_text("{}")
    with pytest.raises(CapaError, match="no eos_token_id"):
        eos_token_ids(tmp_path)
