"""The benchmark for GPUs, imported as files, as it runs on a machine that lacks most packages."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks" / "gpu"

OPERATORS = ("ContributionScore", "TopKKeep", "TokenGather", "VisualScale")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports one of the benchmark's files."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    return importlib.import_module
