"""A small random Qwen2.5-VL, a picture, and what stands where a GPU or a cluster would."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read where triton is first imported, and transformers imports it.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
from PIL import Image

from capa_export.base.progress import talk

# Fixtures load the libraries: the process that hands out the tests reads this module too, and runs none of them.
if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

    from capa_export.bundle.store import Bundle
    from capa_export.model.prompt import Prompter
    from capa_export.model.source import Source
    from tests.fake_driver import FakeDriver
    from tests.fake_tensorrt import FakeTensorRT


# What stages say, tests read on stderr.
talk()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite the golden graph texts")


def pytest_collection_finish() -> None:
    # What the libraries made while they were loaded stays: half a million objects that no collection need look at.
    gc.freeze()
    gc.enable()
    gc.set_threshold(7_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("giant") is None)


@pytest.fixture(scope="session", autouse=True)
def sessions() -> Iterator[None]:
    """What ONNX Runtime opened is not opened again."""
    from capa_export.run.onnx import OnnxModel
    from tests.opened import opened_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxModel, "_connected", opened_once(OnnxModel._connected))
        yield


@pytest.fixture(scope="session")
def model() -> "Qwen2_5_VLForConditionalGeneration":
    from tests.models.qwen25vl import random_model

    return random_model()


@pytest.fixture(scope="session")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP32, one shard. Tests copy it before they change it."""
    from tests.models.qwen25vl import save_model

    return save_model(tmp_path_factory.mktemp("checkpoint"), model)


@pytest.fixture(scope="session")
def source(checkpoint: Path) -> "Source":
    from capa_export.model.checkpoint import open_checkpoint
    from capa_export.model.families import qwen25vl
    from capa_export.model.source import Source

    return Source.of(open_checkpoint(str(checkpoint)), qwen25vl)


@pytest.fixture(scope="session")
def prompter(checkpoint: Path, source: "Source") -> "Prompter":
    from capa_export.model.families import qwen25vl
    from capa_export.model.prompt import Prompter

    return Prompter(checkpoint, checkpoint, qwen25vl, source.dims)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture in which every patch is different."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def recorded(bundle: "Bundle") -> None:
    """Make the manifest say that the export is what was built."""
    from tests.recorded import record

    entry = dict(bundle.stage("export"))
    names = [*entry.pop("files")]
    entry.pop("linked")
    record(bundle.folder, "export", names, **entry)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> "FakeDriver":
    """Stands where CUDA's driver would: for call order, never for numerics."""
    from capa_export.kernels import cuda
    from tests.fake_driver import FakeDriver, compile_from_ptx

    fake = FakeDriver()
    monkeypatch.setattr("capa_export.kernels.plugins.launcher.compile_kernels", compile_from_ptx)
    monkeypatch.setattr(cuda, "_driver", lambda: fake)
    return fake


@pytest.fixture
def trt(driver: "FakeDriver", monkeypatch: pytest.MonkeyPatch) -> "FakeTensorRT":
    """Stands where TensorRT-RTX would, with the driver above."""
    from tests.fake_tensorrt import FakeTensorRT

    fake = FakeTensorRT(driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    return fake


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forks, which import nothing. An interrupted evaluation's are interpreters, as a user's are."""
    from tests.forked import FORKED

    monkeypatch.setattr("capa_export.base.workers.get_context", {"spawn": FORKED}.__getitem__)


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
