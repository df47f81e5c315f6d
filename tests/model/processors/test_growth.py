"""A tokenizer that multiplies what it is given is refused before it is given anything."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from capa_export.base.errors import CapaError
from capa_export.model.processors.tokenizer import check_growth
from tests.models import FAMILIES

TENFOLD = normalizers.Replace("a", "a" * 10)
HOSTILE: dict[str, tuple[str, Any]] = {
    "a normalizer ten times": ("normalizer", normalizers.Sequence([TENFOLD] * 10)),
    "sequences in sequences": (
        "normalizer",
        normalizers.Sequence([normalizers.Sequence([TENFOLD] * 2), normalizers.Sequence([TENFOLD] * 2)]),
    ),
    "one long replacement": ("normalizer", normalizers.Replace("a", "a" * 10_000)),
    "decoders": ("decoder", decoders.Sequence([decoders.Replace("a", "aaaa")] * 9)),
    "bytes of bytes": ("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 40)),
    "a prompt many times": ("post_processor", processors.TemplateProcessing(single=["$A"] * 500, special_tokens=[])),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_multiplies_text_is_refused(name: str) -> None:
    step, part = HOSTILE[name]
    backend: Any = Tokenizer(models.WordLevel({"a": 0}, "a"))
    setattr(backend, step, part)
    with pytest.raises(CapaError, match=f"x: the tokenizer's {step} may make a text .* times as long"):
        check_growth(backend, Path("x"))


PUBLISHED = (
    # GPT-2, Qwen2, DeepSeek-V3 and o200k.
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{Lm}]+(?i:'s|'t|'re|'ve|'m|'d)?|\p{N}{1,3}| ?[^\s\p{L}]+[\r\n/]*",
    r"(\d{3})(?=(?:\d{3})*)|(?:ab)+|(a\+)*|([(+*)])+|([[a-z]+*])*|\(a+\)+",
)


@pytest.mark.parametrize("expression", PUBLISHED)
def test_published_expressions_are_taken(expression: str) -> None:
    backend: Any = Tokenizer(models.WordLevel({"a": 0}, "a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(expression), "isolated")
    check_growth(backend, Path("x"))


@pytest.mark.parametrize(
    "expression",
    [r"(.+)+\x00", "(?:a*)*b", "((a+)b?)+", "(a|b+){2,}c", "([a-z]+)*!", "(?:x(?:y{1,9})?)*"],
)
@pytest.mark.parametrize("step", ["normalizer", "pre_tokenizer", "decoder"])
def test_expressions_that_backtrack_are_refused(expression: str, step: str) -> None:
    backend: Any = Tokenizer(models.WordLevel({"a": 0}, "a"))
    made: dict[str, Any] = {
        "normalizer": normalizers.Sequence([normalizers.Replace(Regex(expression), "")]),
        "pre_tokenizer": pre_tokenizers.Split(Regex(expression), "isolated"),
        "decoder": decoders.Replace(Regex(expression), ""),
    }
    setattr(backend, step, made[step])
    with pytest.raises(CapaError, match=f"x: the tokenizer's {step} has an expression that repeats what repeats"):
        check_growth(backend, Path("x"))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers_of_the_families_are_taken(family: str) -> None:
    check_growth(FAMILIES[family].build_tokenizer().backend_tokenizer, Path("x"))


def test_the_usual_steps_are_taken() -> None:
    backend: Any = Tokenizer(models.WordLevel({"a": 0}, "a"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581"), normalizers.NFKC(), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel()])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="a $A", special_tokens=[("a", 0)])
    check_growth(backend, Path("x"))
