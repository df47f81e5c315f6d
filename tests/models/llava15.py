"""A LLaVA-1.5 of five decoder layers."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.models.making import randomized, saved

__all__ = ["PATCH", "SIDE", "TEMPLATE", "build_image_processor", "build_tokenizer", "random_model", "save_model"]

TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
WORDS = ("USER:", "ASSISTANT:", "\n", "what", "color", "is", "the", "star", "?", "red", "blue", "Describe", "image.")
SIDE, PATCH = 56, 14


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word by word; like Llama's, it puts `<s>` in front."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(Regex("[ \t]+"), "removed")]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


def build_image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def random_model(seed: int = 0, **options: Any) -> LlavaForConditionalGeneration:
    """Five decoder layers with as many KV heads as query heads; four vision layers, the third of which is taken."""
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(SPECIAL) + len(WORDS) + 14,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        image_token_index=SPECIAL.index("<image>"),
        **options,
    )
    return randomized(LlavaForConditionalGeneration, config, seed)


def save_model(folder: Path, model: LlavaForConditionalGeneration, **options: Any) -> Path:
    """A whole checkpoint folder, tokenizer and image processor included."""
    return saved(folder, model, build_tokenizer(), build_image_processor(), **options)
