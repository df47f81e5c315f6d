"""A small random Qwen2.5-VL of the real class, and what the tests do with it over and over."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read where triton is first imported, and transformers imports it.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from capa_export import cuda
from capa_export.checkpoint import open_checkpoint
from capa_export.export import Source
from capa_export.families import qwen25vl
from capa_export.prompt import Prompter
from capa_export.testbed.tiny_qwen25vl import build_image_processor, build_tokenizer

if TYPE_CHECKING:
    from tests.fake_driver import FakeDriver, FakeTensorRT


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite the golden graph texts")


def random_model(seed: int = 0, **text: Any) -> Qwen2_5_VLForConditionalGeneration:
    """Five decoder layers, GQA 4/2, biases; three vision blocks of which the last sees the whole picture."""
    tokenizer = build_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
            **text,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [2],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Zero biases and unit norms would hide a mistake in either.
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif parameter.ndim == 1:
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(0, 0.6 * parameter[0].numel() ** -0.5)
    return model


def save_model(folder: Path, model: Qwen2_5_VLForConditionalGeneration, **options: Any) -> Path:
    """A whole checkpoint folder, tokenizer and image processor included."""
    model.generation_config.eos_token_id = build_tokenizer().convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(folder, **options)
    build_tokenizer().save_pretrained(folder)
    build_image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model() -> Qwen2_5_VLForConditionalGeneration:
    return random_model()


@pytest.fixture(scope="session")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP32, one shard. Tests copy it before they change it."""
    return save_model(tmp_path_factory.mktemp("checkpoint"), model)


@pytest.fixture(scope="session")
def source(checkpoint: Path) -> Source:
    return Source.of(open_checkpoint(str(checkpoint)), qwen25vl)


@pytest.fixture(scope="session")
def prompter(checkpoint: Path, source: Source) -> Prompter:
    return Prompter(checkpoint, checkpoint, qwen25vl, source.dims)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture in which every patch is different."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> "FakeDriver":
    """Stands where CUDA's driver would: for call order, never for numerics."""
    from tests.fake_driver import FakeDriver

    fake = FakeDriver()
    monkeypatch.setattr(cuda, "_driver", lambda: fake)
    return fake


@pytest.fixture
def trt(driver: "FakeDriver", monkeypatch: pytest.MonkeyPatch) -> "FakeTensorRT":
    """Stands where TensorRT-RTX would, with the driver above."""
    from tests.fake_driver import FakeTensorRT

    fake = FakeTensorRT(driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    return fake


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """A Ray cluster of two nodes with a processor each, and the second one of them."""
    from ray.cluster_utils import Cluster

    # Nobody counts the tests' clusters, and they need little.
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    options = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    try:
        yield cluster, cluster.add_node(**options)
    finally:
        cluster.shutdown()
