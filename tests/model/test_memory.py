"""Models that memory has no room for are refused, or go layer by layer, before they are loaded."""

from pathlib import Path

import pytest

from capa_export.base.errors import CapaError
from capa_export.base.workers import Workers
from capa_export.config.recipe import load_recipe
from capa_export.model.memory import (
    LIBRARIES,
    calibration_bytes,
    exceeds_memory,
    require_eager_memory,
    validation_bytes,
)
from capa_export.model.model import Model


@pytest.fixture
def small(checkpoint: Path) -> Model:
    return Model(recipe=load_recipe("qwen25vl"), checkpoint=str(checkpoint))


def test_bytes_are_those_of_the_copies() -> None:
    assert calibration_bytes(10) - LIBRARIES == 10 * (4 + 2)
    # The eager model, and four FP32 copies in ONNX Runtime; in lower precision a half copy, too.
    assert validation_bytes(10, "fp32") - LIBRARIES == 10 * 4 * 5
    assert validation_bytes(10, "fp16") - validation_bytes(10, "fp32") == 10 * 2


def test_a_model_fits_to_the_byte(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = calibration_bytes(small.source.checkpoint.num_parameters)
    monkeypatch.setattr("capa_export.model.memory.available_memory", lambda: needed)
    require_eager_memory(small)
    require_eager_memory(small, Workers(count=1))
    with pytest.raises(CapaError, match=r"--workers 2: so many copies .*; use fewer"):
        require_eager_memory(small, Workers(count=2))
    # A cluster's memory is its own.
    require_eager_memory(small, Workers(count=2, ray="auto"))
    monkeypatch.setattr("capa_export.model.memory.available_memory", lambda: needed - 1)
    with pytest.raises(CapaError, match=r"the model takes 0\.5 GB in FP32, 0\.5 GB are free; end other programs"):
        require_eager_memory(small)


def test_what_goes_layer_by_layer_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("capa_export.model.memory.available_memory", lambda: 10**9)
    assert not exceeds_memory("it takes {}", 10**9)
    assert capsys.readouterr().err == ""
    assert exceeds_memory("it takes {}", 2 * 10**9)
    assert "layer by layer: it takes 2.0 GB, 1.0 GB are free; --in-memory tries" in capsys.readouterr().err
