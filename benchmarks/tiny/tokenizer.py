"""The word-level tokenizer that the test beds share; each has its own special tokens and chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from capa_export.data.drawing import COLORS, SHAPES

__all__ = ["HARD_WORDS", "WORDS", "word_tokenizer"]

WORDS = (
    *("\n", "system", "user", "assistant", "?", ".", ",", "!"),
    *("what", "color", "shape", "is", "the", "there", "a", "an", "has", "same", "as", "yes", "no"),
    # "purple" and "triangle" are known but never drawn: a model trained with them took purple for
    # pink and the triangle for the star when both were in a picture.
    *(*tuple(COLORS)[:5], "purple", *tuple(COLORS)[5:]),
    *(*SHAPES[:3], "triangle", *SHAPES[3:]),
)
HARD_WORDS = (
    *("number", "how", "many", "shapes", "are", "which", "further", "left", "right", "up", "down", "or"),
    *("in", "first", "second", "picture"),
    *map(str, range(10)),
)
"""Words of the hard kinds, behind all others, whose ids stay."""


def word_tokenizer(
    special: Sequence[str],
    *,
    eos: str,
    pad: str,
    chat_template: str,
    bos: str | None = None,
    more_words: Sequence[str] = (),
    spelled: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, punctuation apart, `colour` read as `color`.

    Args:
        special: the special tokens, `<unk>` among them, in the order of their ids.
        eos: the one that ends an answer.
        pad: the one that fills a batch.
        chat_template: in Jinja.
        bos: the one that is put in front of every text, if any.
        more_words: known beside `WORDS` and `HARD_WORDS`.
        spelled: words that are cut, with spaces between their pieces.
        roles: special tokens that a processor looks up by the name of an attribute.
    """
    vocab = {token: i for i, token in enumerate((*special, *WORDS, *more_words, *HARD_WORDS))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    replaced = {"colour": "color", **(spelled or {})}
    core.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), *(normalizers.Replace(word, other) for word, other in replaced.items())]
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.Split(Regex("[ \t\r]+"), "removed"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    options: dict[str, Any] = {"extra_special_tokens": dict(roles)} if roles else {}
    if bos is not None:
        options["bos_token"] = bos
        core.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token=eos,
        pad_token=pad,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
        padding_side="left",
        **options,
    )
