"""A tokenizer as the `tokenizers` library runs it, with the chat template that goes with it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer as Backend

from capa_export.base.errors import CapaError
from capa_export.base.expressions import backtracks
from capa_export.base.toml import Settings

__all__ = ["Tokenizer", "TokenizerSettings", "check_growth"]

_MOST_GROWTH = 100
"""Times that a tokenizer may lengthen a text: published ones do so three times, and NFKC may do it 18 times."""
_GROWTH = {"ByteLevel": 4, "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "BertNormalizer": 12}
"""Steps -> times that they lengthen some text."""
_PARTS = ("normalizers", "pretokenizers", "processors", "decoders")
"""Keys of the steps of a sequence."""


class TokenizerSettings(Settings):
    """The settings that a tokenizer's own file does not hold."""

    chat_template: str
    special_tokens: Mapping[str, str]
    """Special tokens by their names in templates: `bos_token`, `eos_token` and so on."""
    split_special_tokens: bool = False
    """Whether a special token in the text is read as plain text."""


def check_growth(backend: Backend, folder: Path) -> None:
    """Refuse a tokenizer that multiplies what it is given, in text or in time.

    Text fits into no memory then. Time grows with every character where a group repeats what repeats itself, as in
    `(.+)+x`: there are as many ways to fail as ways to divide what it finds.

    Raises:
        CapaError: a file of the folder says so.
    """
    for step in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (part := getattr(backend, step)) is None:
            continue
        settings = json.loads(part.__getstate__())
        if (times := _growth(settings)) > _MOST_GROWTH:
            raise CapaError(
                f"{folder}: the tokenizer's {step} may make a text {times:.3g} times as long, and at most "
                f"{_MOST_GROWTH} is supported; use the tokenizer.json that was published with the weights"
            )
        for expression in _expressions(settings):
            if backtracks(expression):
                raise CapaError(
                    f"{folder}: the tokenizer's {step} has an expression that repeats what repeats itself, and might "
                    f"never end ({expression!r:.80}); use the tokenizer.json that was published with the weights"
                )


def _growth(part: Any) -> float:
    """How many times as long a text may be after a step."""
    if not isinstance(part, dict):
        return 1
    step = cast("dict[str, Any]", part)
    if step.get("type") == "Sequence":
        return prod(_growth(inner) for key in _PARTS for inner in step.get(key, ()))
    if step.get("type") == "Replace":
        found = step["pattern"].get("String")
        # A regular expression may match nothing, everywhere.
        return max(1, len(step["content"]) / len(found)) if found else 1 + len(step["content"])
    if step.get("type") == "TemplateProcessing":
        return sum("Sequence" in piece for piece in step["single"])
    if step.get("type") == "Precompiled":
        # Nothing bounds its replacements but its own length.
        return len(step.get("precompiled_charsmap") or "")
    return _GROWTH.get(str(step.get("type")), 1)


def _expressions(part: Any) -> Iterator[str]:
    """Yield every regular expression in a step."""
    if isinstance(part, dict):
        step = cast("dict[str, Any]", part)
        if isinstance(expression := step.get("Regex"), str):
            yield expression
        part = list(step.values())
    for inner in cast("list[Any]", part) if isinstance(part, list) else ():
        yield from _expressions(inner)


class Tokenizer:
    """The part of transformers' tokenizers that prompts and answers need, under the same names."""

    def __init__(self, backend: Backend, settings: TokenizerSettings) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = settings.split_special_tokens
        self._backend, self._settings = backend, settings

    @property
    def backend_tokenizer(self) -> Backend:
        return self._backend

    @property
    def bos_token(self) -> str | None:
        return self._settings.special_tokens.get("bos_token")

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return self._backend.get_vocab()

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self._backend.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        return self._backend.id_to_token(token_id)

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]:
        unknown = self._settings.special_tokens.get("unk_token")
        other = None if unknown is None else self._backend.token_to_id(unknown)
        found = [self._backend.token_to_id(token) for token in tokens]
        return [other if token_id is None else token_id for token_id in found]

    def get_chat_template(self) -> str:
        return self._settings.chat_template

    @property
    def special_tokens_map(self) -> Mapping[str, str]:
        """Special tokens by their names in templates."""
        return self._settings.special_tokens
