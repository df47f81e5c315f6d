"""Engines of the small random model, over the stand-ins for CUDA and TensorRT."""

import pytest

from capa_export.bundle.store import Bundle
from capa_export.model.prompt import Prompt, Prompter
from capa_export.model.source import Source
from capa_export.run.engine import require_engines
from capa_export.run.engine_model import EngineModel
from tests.conftest import noise
from tests.fake_driver import FakeDriver
from tests.fake_tensorrt import FakeTensorRT, write_bundle


@pytest.fixture(scope="module")
def built(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(source, tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def prompts(prompter: Prompter) -> list[Prompt]:
    """Of 256 and of 64 visual tokens."""
    return [prompter("what color is the star ?", [noise(size, size)]) for size in (448, 224)]


@pytest.fixture
def engines(built: Bundle, driver: FakeDriver, trt: FakeTensorRT) -> EngineModel:
    loaded = EngineModel(require_engines(built, "rtx"))
    driver.calls.clear()
    return loaded
