"""Sizes and budgets as people write them."""

import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.quantities import parse_budget, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8_000_000_000),
        ("7.5GB", 7_500_000_000),
        ("8GiB", 8 << 30),
        ("8000MB", 8_000_000_000),
        (" 8 gb ", 8_000_000_000),
        ("0.5tib", 1 << 39),
        (".5GB", 500_000_000),
    ],
)
def test_a_size(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "8", "GB", "0GB", "-8GB", "8 XB", "1e3GB", "8GBs", "nanGB"])
def test_no_size(text: str) -> None:
    with pytest.raises(CapaError, match="must be a size above 0 with its unit, as 8GB") as raised:
        parse_bytes(text)
    assert raised.value.code == ExitCode.USAGE


@pytest.mark.parametrize(("text", "budget"), [("0.25", 0.25), ("25%", 0.25), ("12.5 %", 0.125), ("2.5e12", 2.5e12)])
def test_a_budget(text: str, budget: float) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "half", "0", "-1", "100%", "250%", "0%", "inf", "nan", "%"])
def test_no_budget(text: str) -> None:
    with pytest.raises(CapaError, match=r"must be a fraction of dense, as 0\.25 or 25%, or FLOPs") as raised:
        parse_budget(text)
    assert raised.value.code == ExitCode.USAGE
