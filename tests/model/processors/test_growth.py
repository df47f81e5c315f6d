"""A tokenizer that multiplies what it is given is refused before it is given anything."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

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
