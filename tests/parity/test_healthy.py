"""A hundred healthy builds, and no false alarm."""

from pathlib import Path

import pytest

from capa_export.parity.validate import compare_onnx
from tests.parity.builds import build


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_a_healthy_build_passes(seed: int, tmp_path: Path) -> None:
    healthy = build(seed, tmp_path)
    compared = compare_onnx(healthy.folder, healthy.precision, healthy.records, healthy.recipe)
    entries = [*compared.export_error, *compared.selection]
    assert [check.failure for entry in entries for check in entry.checks if check.failure] == [], healthy.about
