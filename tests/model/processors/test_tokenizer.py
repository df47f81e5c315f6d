"""Text becomes the tokens that transformers makes of it, and tokens the text."""

from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors as post_processors
from transformers import BertTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from capa_export.base.errors import CapaError
from capa_export.model.processors import template as template_module
from capa_export.model.processors.rendering import render
from capa_export.model.processors.resolved import read_processors, write_processors
from tests.models import FAMILIES

TEXTS = [
    "",
    "what color is the star ?",
    " two  spaces\n\n",
    "e\u0301 \u00e9 \U0001f600",
    "<|im_end|>a<pad></s> b",
    "\ud7ff1234567",
]
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": [{"type": "text", "text": "Be <short>."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": 'what\'s "it"?'}, {"type": "video"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a star"}]},
    {"role": "user", "content": [{"type": "text", "text": "é?"}]},
]
TEMPLATES = {
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ tools is none }}{{ documents is none }}",
    "generation": (
        "{% for message in messages %}{% set seen = 1 %}{% generation %}{{ message.role }}{% set seen = 2 %}"
        "{% endgeneration %}{{ seen }}{% endfor %}"
    ),
    "controls": (
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}"
        "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}"
    ),
    "blocks": "{% for m in messages %}\n    {% if true %}\n  {{ m.role }}\n{% endif %}\n{% endfor %}\n",
    "names": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ image_token }}|{{ add_generation_prompt }}",
    "namespace": "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ ns.self }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys(['a']) }}",
    "time": "{{ strftime_now('%Y') }}",
}
REFUSED = {
    "raise": "{{ raise_exception('no') }}",
    "sandbox": "{{ messages.__class__.__mro__ }}{{ messages.__class__.__mro__[1] }}",
    "immutable": "{{ messages.append(1) }}",
    "underscore": "{% set ns = namespace(_x=1) %}",
    "undefined": "{{ nothing.at.all }}",
    "syntax": "{% for %}",
}


def byte_level(**options: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = post_processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    core.add_special_tokens([AddedToken("<s>"), AddedToken("<|im_end|>", lstrip=True), AddedToken("<pad>")])
    core.add_tokens([AddedToken("star", single_word=True)])
    core.enable_truncation(3)
    core.enable_padding(length=20, pad_token="<pad>")
    given = {"bos_token": "<s>", "pad_token": "<pad>", "chat_template": "{{ messages[0].role }}", **options}
    return PreTrainedTokenizerFast(tokenizer_object=core, **given)


def sentence_pieces(**options: Any) -> Any:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "b"]
    return LlamaTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[("▁", "a")],
        chat_template={"default": "{{ bos_token }}{{ messages[0].role }}", "tool_use": "tools"},
        **options,
    )


def qwen2(**options: Any) -> Any:
    letters = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    return Qwen2Tokenizer(
        vocab=letters, merges=[], chat_template="{{ messages[0].role }}", extra_special_tokens=["<|im_end|>"], **options
    )


TOKENIZERS = {
    **{family: module.build_tokenizer for family, module in FAMILIES.items()},
    "byte level": byte_level,
    "no specials in text": lambda: byte_level(split_special_tokens=True),
    "clean up, which BPE ignores": lambda: byte_level(clean_up_tokenization_spaces=True),
    "both ends marked": lambda: byte_level(add_bos_token=True, add_eos_token=True, eos_token="<|im_end|>"),
    "several templates": sentence_pieces,
    "prefix space": lambda: sentence_pieces(add_prefix_space=False),
    "qwen2": qwen2,
}


def image_processor() -> Any:
    return FAMILIES["llava15"].build_image_processor()


def kept(tokenizer: Any, folder: Path) -> Any:
    assert write_processors(tokenizer, image_processor(), folder) is None
    processors = read_processors(folder)
    assert processors is not None
    return processors.tokenizer


def rendered(tokenizer: Any, messages: Any = None) -> str:
    """The conversation as prompts have it, in a process of the template's own."""
    return render(tokenizer.get_chat_template(), messages or MESSAGES, tokenizer.special_tokens_map)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_and_texts_are_transformers(name: str, tmp_path: Path) -> None:
    theirs = TOKENIZERS[name]()
    own = kept(theirs, tmp_path)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert own(text, add_special_tokens=special)["input_ids"] == ids
            for skip in (True, False):
                assert own.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    everything = list(range(len(theirs)))
    assert len(own) == len(theirs) and own.get_vocab() == theirs.get_vocab()
    assert [own.convert_ids_to_tokens(i) for i in everything] == theirs.convert_ids_to_tokens(everything)
    asked = ["<s>", "<pad>", "</s>", "no such token"]
    assert own.convert_tokens_to_ids(asked) == theirs.convert_tokens_to_ids(asked)
    assert own.bos_token == theirs.bos_token
    assert own.get_chat_template() == theirs.get_chat_template()
    for count in (1, len(MESSAGES)):
        options: Any = {"tokenize": False, "add_generation_prompt": True}
        said = rendered(own, MESSAGES[:count])
        assert said == theirs.apply_chat_template(MESSAGES[:count], **options)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_say_what_they_say_in_transformers(template: str, tmp_path: Path) -> None:
    theirs = byte_level(chat_template=template, eos_token="<|im_end|>", extra_special_tokens={"image_token": "<img>"})
    said = rendered(kept(theirs, tmp_path))
    assert said == theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("template", REFUSED.values(), ids=REFUSED)
def test_templates_are_confined_as_in_transformers(template: str, tmp_path: Path) -> None:
    theirs = byte_level(chat_template=template)
    with pytest.raises(TemplateError) as expected:
        theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    with pytest.raises(CapaError, match=r"chat template does not take this conversation: "):
        rendered(kept(theirs, tmp_path))
    own = kept(theirs, tmp_path)
    with pytest.raises(type(expected.value)):
        template_module.render(template, MESSAGES, own.special_tokens_map)


class OwnTokenizer(PreTrainedTokenizerFast):
    """Code of a checkpoint's own."""


UNKNOWN = {
    "own code": lambda: OwnTokenizer(tokenizer_object=byte_level().backend_tokenizer, chat_template="x"),
    "cleans up": lambda: BertTokenizer(
        vocab={"[UNK]": 0, "a": 1}, chat_template="x", clean_up_tokenization_spaces=True
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_tokenizer_not_known_here_is_left_to_transformers(name: str, tmp_path: Path) -> None:
    tokenizer = UNKNOWN[name]()
    reason = write_processors(tokenizer, image_processor(), tmp_path)
    assert reason is not None and type(tokenizer).__name__ in reason
    assert read_processors(tmp_path) is None and not list(tmp_path.iterdir())
