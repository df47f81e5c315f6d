"""A tokenizer as the `tokenizers` library runs it, with the chat template that goes with it."""

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer as Backend

from capa_export.base.toml import Settings

__all__ = ["Tokenizer", "TokenizerSettings"]


class TokenizerSettings(Settings):
    """The settings that a tokenizer's own file does not hold."""

    chat_template: str
    special_tokens: Mapping[str, str]
    """Special tokens by their names in templates: `bos_token`, `eos_token` and so on."""
    split_special_tokens: bool = False
    """Whether a special token in the text is read as plain text."""


class Tokenizer:
    """The part of transformers' tokenizers that prompts and answers need, under the same names."""

    def __init__(self, backend: Backend, settings: TokenizerSettings) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = settings.split_special_tokens
        self._backend, self._settings = backend, settings

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
