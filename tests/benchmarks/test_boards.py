"""The page of boards is what is counted, and that is what the command says."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import boards
from benchmarks.random_checkpoint import CONFIGS
from capa_export.cli import main


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return boards.counted()


def test_the_figures_are_what_is_counted(rows: list[dict[str, Any]]) -> None:
    kept = json.loads((boards.DOCS / "figures" / "boards.json").read_text(encoding="utf-8"))["rows"]
    assert kept == json.loads(json.dumps(rows))


@pytest.mark.parametrize("quantize", [[], ["--quantize", "int4"]], ids=["fp16", "int4"])
def test_a_row_is_what_plan_says(
    rows: list[dict[str, Any]], quantize: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen25vl-7b"]))
    main(["plan", str(tmp_path), "--model", "qwen25vl", "--target", "orin", "--json", *quantize])
    plan = json.loads(capsys.readouterr().out)
    row = next(row for row in rows if row["name"] == "Qwen2.5-VL-7B/Orin NX 16GB")
    found = row["types"]["int4" if quantize else "fp16"]
    fits = {name: fits for name, _, fits in plan["device"]["devices"]}
    assert (found["gb"], found["fits"]) == (plan["device"]["total"] / 1e9, fits["Orin NX 16GB"])
    times = next(one for one in plan["forecast"] if one["device"] == "Orin NX 16GB")
    assert found["tokens_a_second"]["capa"] == 1000 / times["capa"]["token"]
    assert found["first_ms"] == {way: times[way]["first"] for way in ("dense", "capa")}
