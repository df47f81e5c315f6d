"""The settings of `generation_config.json`, read as transformers' `generate` reads them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import first_problem

__all__ = ["Generation", "GenerationOptions", "eos_token_ids", "read_generation"]

_DEFAULT_NEW_TOKENS = 64
_SAMPLING = ("temperature", "top_p", "top_k")
_Range: TypeAlias = tuple[Callable[[float], bool], str]
_RANGES: dict[str, _Range] = {
    "temperature": (lambda value: 0 < value < inf, "above 0"),
    "top_k": (lambda value: value >= 0, "0 or more, where 0 keeps every token"),
    "top_p": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "min_p": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda value: 0 < value < inf, "above 0"),
}
"""Settings -> whether a value is one that `generate` takes, and in words."""
_OPTION_RANGES: dict[str, _Range] = {
    **_RANGES,
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "seed": (lambda value: value >= 0, "0 or more"),
    "max_new_tokens": (lambda value: value >= 1, "1 or more"),
}
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "assistant_early_exit": (),
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "prompt_lookup_num_tokens": (),
    "remove_invalid_values": (False,),
    "sequence_bias": (),
    "stop_strings": (),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "use_mtp": (False,),
    "watermarking_config": (),
}
"""Settings of `generate` that change answers and that are not done here -> the values that change nothing."""
_OF_SAMPLING = ("epsilon_cutoff", "eta_cutoff", "top_h", "typical_p")
"""Ignored settings of sampling, which change nothing either where the likeliest token is taken."""
_INERT = frozenset(
    {
        # Of beams, assistants and encoders, where there are none.
        *("early_stopping", "length_penalty", "low_memory", "decoder_start_token_id", "is_assistant"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
        "speculation_type",
        # How `generate` computes, and what it returns besides the tokens.
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
        *("compile_config", "disable_compile", "continuous_batching_config", "return_dict_in_generate"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_legacy_cache"),
        # Changes no order and no ratio of probabilities.
        "renormalize_logits",
        # `eos_token_ids` reads the first; the others are said by the tokenizer.
        *("eos_token_id", "bos_token_id", "pad_token_id"),
        *("transformers_version", "_from_model_config", "_commit_hash"),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationOptions:
    """The settings of a command line, in place of the file's; None where it says nothing."""

    greedy: bool = False
    """Take the likeliest token, whatever the file says of sampling."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            CapaError: two options do, or one is out of range.
        """
        sampling = [name for name in (*_SAMPLING, "seed") if getattr(self, name) is not None]
        if self.greedy and sampling:
            raise CapaError(
                f"--greedy takes the likeliest token, where {_option(sampling[0])} has no effect; give one of them",
                ExitCode.USAGE,
            )
        for name in self.__slots__:
            if problem := _problem(name, getattr(self, name), _OPTION_RANGES):
                instead = "; --greedy takes the likeliest token" if name in _SAMPLING else ""
                raise CapaError(f"{_option(name)} {problem}{instead}", ExitCode.USAGE)

    @property
    def given(self) -> dict[str, Any]:
        """The options that take the place of a setting of the same name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None and name in Generation.model_fields}


class Generation(BaseModel):
    """The settings that choose tokens; names and defaults are those of `generate`, which takes null for a default."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="forbid")

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    """Divides the positive logits of all tokens of the prompt and of the answer so far, and multiplies the others."""
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    bad_words_ids: list[Annotated[list[int], Field(min_length=1)]] = Field(default_factory=list[list[int]])
    """Tokens, or rows of them, that are never said; one that ends an answer is."""
    suppress_tokens: list[int] = Field(default_factory=list[int])
    begin_suppress_tokens: list[int] = Field(default_factory=list[int])
    """Never the first of an answer."""
    min_length: int = 0
    """Tokens of prompt and answer, unless `min_new_tokens` is set."""
    min_new_tokens: int | None = None
    max_length: int | None = Field(default=None, ge=1)
    """Tokens of prompt and answer, unless `max_new_tokens` is set."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    unsupported: dict[str, Any] = Field(default_factory=dict[str, Any], exclude=True)
    """Settings of the file that are not supported."""
    source: Path = Field(exclude=True)
    """The file."""

    @property
    def in_effect(self) -> dict[str, Any]:
        """The settings that decide which token comes next."""
        lengths = {"max_length", "max_new_tokens"}
        given = self.model_dump(exclude=lengths, exclude_none=True, exclude_defaults=True)
        sampling = {name: getattr(self, name) for name in _SAMPLING if self.do_sample}
        always = {"do_sample": self.do_sample, **sampling, "repetition_penalty": self.repetition_penalty}
        return {**always, **{name: value for name, value in given.items() if self.do_sample or name not in _RANGES}}

    @property
    def ignored(self) -> list[str]:
        """Settings that would change the answer, and do not."""
        wanted = {name: value for name, value in self.unsupported.items() if self.do_sample or name not in _OF_SAMPLING}
        return [f"{name} {value!r:.40}" for name, value in wanted.items()]

    def with_options(self, options: GenerationOptions) -> "Generation":
        """Replace settings by a command line's options; an option that shapes sampling turns it on.

        Raises:
            CapaError: a setting that takes effect is out of range, or an option would have none.
        """
        given: dict[str, Any] = options.given
        if options.greedy or any(name in given for name in _SAMPLING):
            given["do_sample"] = not options.greedy
        changed = self.model_copy(update=given)
        if options.seed is not None and not changed.do_sample:
            raise CapaError(
                "--seed has no effect where the likeliest token is taken; give --temperature to sample", ExitCode.USAGE
            )
        for name, problem in changed.out_of_range():
            instead = _option(name) if hasattr(options, name) else "--greedy"
            raise CapaError(f"{self.source}: {name} {problem}; {instead} goes in its place")
        return changed

    def check(self) -> None:
        """Refuse what `run` would refuse where its command line says nothing.

        Raises:
            CapaError: a setting that takes effect is out of range.
        """
        for name, problem in self.out_of_range():
            raise CapaError(f"{self.source}: {name} {problem}; download it again, or correct it")

    def out_of_range(self) -> list[tuple[str, str]]:
        """The settings that take effect and must be otherwise, each with what it must be."""
        names = (*_RANGES,) if self.do_sample else ("repetition_penalty",)
        return [(name, problem) for name in names if (problem := _problem(name, getattr(self, name)))]

    def longest(self, prompt_tokens: int) -> int:
        """Tokens that the answer to a prompt may have.

        Raises:
            CapaError: the prompt itself is longer than prompt and answer may be.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return _DEFAULT_NEW_TOKENS
        if self.max_length <= prompt_tokens:
            raise CapaError(
                f"{self.source}: max_length is {self.max_length}, and the prompt alone has {prompt_tokens} tokens; "
                "give --max-new-tokens, or a smaller picture"
            )
        return self.max_length - prompt_tokens


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _problem(name: str, value: float | None, ranges: Mapping[str, _Range] = _RANGES) -> str | None:
    """The condition that a setting breaks, if it does."""
    takes, words = ranges.get(name, (lambda _: True, ""))
    return None if value is None or takes(value) else f"must be {words}, not {value}"


def read_generation(folder: Path) -> Generation:
    """Read a checkpoint's `generation_config.json`, or without one its `config.json`, as older ones have it.

    Raises:
        CapaError: the file is missing or malformed, or a setting has a wrong type.
    """
    from capa_export.model.checkpoint import read_json

    path = folder / "generation_config.json"
    own = path.is_file()
    path = path if own else folder / "config.json"
    config = read_json(path)
    if not own:
        text = config.get("text_config")
        sections = (text if isinstance(text, dict) else {}, config)
        config = {name: value for section in sections for name, value in section.items() if value is not None}
        # Nobody's wish: old versions of transformers wrote their default of 20 into every config.
        config.pop("max_length", None)
    settings = {name: value for name, value in config.items() if value is not None}
    names = Generation.model_fields.keys() - {"unsupported", "source"}
    known = {name: settings.pop(name) for name in names & settings.keys()}
    others = {
        name: value
        for name, value in settings.items()
        # A config says a lot else, a generation config that is not known here may be new in `generate`.
        if name not in _INERT and (own or name in _UNSUPPORTED) and value not in _UNSUPPORTED.get(name, ())
    }
    try:
        return Generation(**known, unsupported=others, source=path)
    except ValidationError as error:
        raise CapaError(f"{path}: {first_problem(error, Generation)}; download it again, or correct it") from error


def eos_token_ids(folder: Path) -> list[int]:
    """Tokens that end an answer: those of `generation_config.json`, or of `config.json` where that says nothing.

    Raises:
        CapaError: neither file names one, or one is malformed.
    """
    from capa_export.model.checkpoint import read_json

    for name in ("generation_config.json", "config.json"):
        path = folder / name
        config = read_json(path) if path.is_file() else {}
        text = config.get("text_config")
        for section in (config, text if isinstance(text, dict) else {}):
            given = section.get("eos_token_id")
            ids = given if isinstance(given, list) else [] if given is None else [given]
            if not all(type(token) is int for token in ids):
                raise CapaError(f"{path}: eos_token_id: must be a whole number or a list of them, not {given!r:.80}")
            if ids:
                return ids
    raise CapaError(f"{folder}: no eos_token_id in generation_config.json or config.json; copy the published files")
