"""Every figure of README and docs is that of the result file it comes from."""

import json
from pathlib import Path

import pytest

from benchmarks import flops
from benchmarks.cited import PAGES, figures, rewritten, uncited, value_of

ROOT = Path(__file__).resolve().parent.parent
ALL = sorted({"README.md", *PAGES, *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))})
PREFILL = '3.86<!-- prefill-qwen25vl-1024 prefill "pruned + FFN scales" speedup -->'


@pytest.mark.parametrize("page", ALL)
def test_cited_figures_are_those_of_the_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert rewritten(text) == text, f"run `python -m benchmarks.cited`: {page}"


@pytest.mark.parametrize("page", PAGES)
def test_no_figure_with_a_unit_stands_without_its_source(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert list(figures(text))
    assert uncited(text) == []


@pytest.mark.parametrize("wrong", ["3.87", "4.86"])
def test_another_figure_is_found(wrong: str) -> None:
    assert rewritten(PREFILL) == PREFILL
    assert rewritten(PREFILL.replace("3.86", wrong)) == PREFILL
    assert rewritten(PREFILL.replace("3.86", "3")) == PREFILL.replace("3.86", "4")


def test_a_figure_without_a_source_is_found() -> None:
    assert uncited("it saves 66.9 % of 20<!-- not measured --> GB, `12 %`, [5 ms](a/7%20ms.md)") == ["66.9 %", "5 ms"]


@pytest.mark.parametrize(
    "where", ["nothing-of-this-name a", "prefill-qwen25vl-1024 prefill sparse", "growth-qwen25vl-512 rows none"]
)
def test_a_source_that_is_not_there_is_an_error(where: str) -> None:
    with pytest.raises(KeyError):
        value_of(where)


def test_the_page_of_flops_is_what_is_counted() -> None:
    rows = flops.counted()
    assert (flops.DOCS / "flops.md").read_text(encoding="utf-8") == flops.page(rows)
    kept = json.loads((flops.DOCS / "figures" / "flops.json").read_text(encoding="utf-8"))["rows"]
    assert kept == json.loads(json.dumps(rows))
    saved = {row["name"]: row["saved"] for row in rows}
    assert saved["Qwen2.5-VL-7B@3/scales"]["visual_alone"] == pytest.approx(77.4, abs=0.05)
    assert saved["Qwen2.5-VL-7B@3/scales"]["with_text"] == pytest.approx(73.0, abs=0.05)
    assert max(each["visual_alone"] for each in saved.values()) < 78
