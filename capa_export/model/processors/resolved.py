"""The files in which a bundle keeps its tokenizer and image processor, every setting resolved."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from capa_export.base.errors import CapaError, refusing
from capa_export.base.toml import Settings, first_problem
from capa_export.model.processors.pictures import PictureProcessor, PictureSettings
from capa_export.model.processors.tokenizer import Tokenizer, TokenizerSettings

__all__ = ["PROCESSORS", "Processors", "read_processors", "write_processors"]

PROCESSORS = "processors"
"""The folder, beside `llm` and `visual`."""
_SETTINGS, _VOCABULARY = "processors.json", "tokenizer.json"


class Processors(NamedTuple):
    """The processors that make prompts, with the calls of transformers' own that prompts need."""

    tokenizer: Any
    image_processor: Any


class _Settings(Settings):
    tokenizer: TokenizerSettings
    image_processor: PictureSettings


def read_processors(folder: Path) -> Processors | None:
    """The processors kept in a folder; None where it keeps none, and transformers must read the published files.

    Raises:
        CapaError: a file is damaged.
    """
    path, vocabulary = folder / _SETTINGS, folder / _VOCABULARY
    if not path.is_file():
        return None
    try:
        settings = _Settings.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CapaError(f"{path}: {first_problem(error, _Settings)}; build the bundle again") from error
    from tokenizers import Tokenizer as Backend

    with refusing(f"{vocabulary}: does not load", "build the bundle again"):
        backend = Backend.from_str(vocabulary.read_text(encoding="utf-8"))
    return Processors(Tokenizer(backend, settings.tokenizer), PictureProcessor(settings.image_processor))


def write_processors(tokenizer: Any, image_processor: Any, folder: Path) -> str | None:
    """Keep what transformers loaded; returns why it cannot be kept, and a bundle then needs transformers to run."""
    reason = _reason_against_tokenizer(tokenizer)
    settings = _picture_settings(image_processor)
    if reason or settings is None:
        return reason or f"{type(image_processor).__name__} is not among the image processors that are known here"
    folder.mkdir(parents=True, exist_ok=True)
    kept = _Settings(
        tokenizer=TokenizerSettings(
            chat_template=tokenizer.get_chat_template(),
            special_tokens=tokenizer.special_tokens_map,
            split_special_tokens=tokenizer.split_special_tokens,
        ),
        image_processor=settings,
    )
    (folder / _SETTINGS).write_text(json.dumps(kept.model_dump(exclude_none=True), indent=2) + "\n", encoding="utf-8")
    (folder / _VOCABULARY).write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    return None


_TOKENIZER_METHODS = (
    "__call__",
    "_encode_plus",
    "_decode",
    "decode",
    "convert_ids_to_tokens",
    "convert_tokens_to_ids",
    "_convert_token_to_id_with_added_voc",
    "apply_chat_template",
)


def _reason_against_tokenizer(tokenizer: Any) -> str | None:
    """Why the tokenizer is more than its backend, if it is."""
    from transformers import TokenizersBackend

    kind = type(tokenizer)
    if not kind.__module__.startswith("transformers.") or not isinstance(tokenizer, TokenizersBackend):
        return f"{kind.__name__} is no tokenizer of transformers' own over the tokenizers library"
    if any(getattr(kind, name) is not getattr(TokenizersBackend, name) for name in _TOKENIZER_METHODS):
        return f"{kind.__name__} has a way of its own to read or write text"
    if tokenizer.clean_up_tokenization_spaces and type(tokenizer.backend_tokenizer.model).__name__ != "BPE":
        return f"{kind.__name__} cleans up the spaces of what it writes"
    return None


_WITHOUT_EFFECT = {
    "data_format",
    "default_to_square",
    "device",
    "disable_grouping",
    "do_convert_rgb",
    "image_seq_length",
    "input_data_format",
    "return_tensors",
}
"""Settings that say nothing once sizes are resolved, pictures are Pillow's and arrays are NumPy's."""


def _picture_settings(image_processor: Any) -> PictureSettings | None:
    """The settings of a call of transformers' image processor; None where it is of no kind known here."""
    from transformers.image_utils import SizeDict
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    kinds = {
        CLIPImageProcessorPil: "plain",
        LlavaImageProcessorPil: "squared",
        GotOcr2ImageProcessorPil: "tiles",
        Qwen2VLImageProcessorPil: "patches",
    }
    kind = kinds.get(type(image_processor))
    if kind is None or not image_processor.do_convert_rgb:
        return None
    told = {name: getattr(image_processor, name, None) for name in type(image_processor).valid_kwargs.__annotations__}
    plain = {name: dict(value) if isinstance(value, SizeDict) else value for name, value in told.items()}
    resolved = {name: value for name, value in plain.items() if value is not None and name not in _WITHOUT_EFFECT}
    try:
        return PictureSettings.model_validate({"kind": kind, **resolved})
    except ValidationError:
        return None
