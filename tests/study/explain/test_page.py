"""The page: complete, self-contained, well-formed and safe, from a small hand-made explanation."""

import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from capa_export.study.explain.page import write_page
from capa_export.study.explain.schema import (
    Explanation,
    Grid,
    Maps,
    MethodExplanation,
    Sinks,
    SkippedMethod,
    StageTokens,
)
from capa_export.study.explain.surfaces import Surface

EVIL = '<script>alert("&")</script>'
_VOID = {"meta", "img", "br", "link", "input", "hr"}


class Wellformed(HTMLParser):
    """Tags are closed in turn, pictures have words, headers say what they head, and measures are explained once."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.alts: list[str] = []
        self.named: set[str | None] = set()
        self.explained: list[str | None] = []
        self.feed(page)
        self.close()
        assert not self.open
        assert sorted(map(str, self.explained)) == sorted(map(str, self.named)), "a measure is explained once"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "img":
            self.alts.append(given["alt"] or "")
            assert (given["src"] or "").startswith("data:image/png;base64,")
        if tag == "th":
            assert given["scope"] in ("row", "col")
        if "popovertarget" in given:
            self.named.add(given["popovertarget"])
        if "popover" in given:
            self.explained.append(given["id"])
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def method(name: str, kept: tuple[int, ...], **given: Any) -> MethodExplanation:
    stages = () if name == "dense" else (StageTokens(where="after layer 2", selector="capa", kept=len(kept)),)
    defaults = {"answer": "red", "same_answer": True, "iou": 0.5, "kl": 0.25}
    return MethodExplanation(**{"method": name, "stages": stages, "kept": kept, **defaults, **given})


def explanation(**changes: Any) -> Explanation:
    given: dict[str, Any] = {
        "bundle": "out",
        "model": EVIL,
        "question": f"What? {EVIL}",
        "pictures": ("a.png",),
        "visual_tokens": 6,
        "grids": (Grid(picture=0, first=0, rows=2, cols=3),),
        "linear_layers": (0, 1, 4),
        "maps": Maps(
            layer=2,
            contribution=(0.01, 0.5, 2.0, 0.1, 0.3, 0.02),
            attention=(0.3, 0.01, 0.2, 0.0, 0.05, 0.02),
            value_norm=(1.0, 9.0, 8.0, 3.0, 4.0, 5.0),
            phi=(25.0, 3.0, 30.0, 1.0, 1.0, None),
            kept=(1, 2),
            cut=0.5,
        ),
        "sinks": Sinks(threshold=20, channels=(5,), dumps=(0,), anchors=(2,), words=("Found so.", EVIL)),
        "methods": (
            method("dense", (0, 1, 2, 3, 4, 5), kl=0.0),
            method("capa@2:0.75", (1, 2), own=True, iou=1.0),
            method("random@2:0.75", (4, 5), answer=EVIL, same_answer=False, iou=0.0, kl=float("nan")),
        ),
        "left_out": (SkippedMethod(method="vispruner:0.75", reason="no attention from the tower"),),
        "max_new_tokens": 8,
    }
    return Explanation(**{**given, **changes})


def render(folder: Path, found: Explanation, surfaces: list[Surface] | None = None) -> str:
    if surfaces is None:
        surfaces = [Surface(Image.new("RGB", (60, 40), "white"), grid) for grid in found.grids]
    write_page(folder / "page.html", found, surfaces)
    return (folder / "page.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees, roughly."""
    body = re.sub(r'<span class="nowrap">([^<]*)</span>', r"\1", page.partition("<body>")[2])
    return " ".join(re.sub(r"<[^>]*>", " ", body).replace("&#39;", "'").split())


def test_every_method_has_its_card(tmp_path: Path) -> None:
    page = render(tmp_path, explanation())
    text = text_of(page)
    assert page.count("<article") == 3
    assert "dense red kept all 6 KL, nats 0" in text
    assert "capa@2:0.75 the bundle's own red kept after layer 2 2 of 6 KL, nats 0.25" in text
    shared = "as the bundle none of 2 (IoU 0.00)"
    assert f"differs from dense kept after layer 2 2 of 6 {shared} KL, nats not finite" in text
    assert text.count("differs from dense") == 1
    assert "vispruner:0.75 no attention from the tower" in text
    assert "red with all 6 visual tokens red with the 2 that capa@2:0.75 keeps, outlined" in text
    assert "eager model's in FP32" in text
    assert "in layers 0-1, 4, but for dense" in text


def test_one_line_says_what_pruning_did_to_the_answer(tmp_path: Path) -> None:
    text = text_of(render(tmp_path, explanation()))
    conclusion = "The bundle keeps 2 of 6 visual tokens, which give the same answer as all of them"
    assert f"{conclusion}; so do 0 of 1 other methods." in text
    dense, own, _ = explanation().methods
    changed = own.model_copy(update={"same_answer": False})
    text = text_of(render(tmp_path, explanation(methods=(dense, changed))))
    assert "2 of 6 visual tokens, which give another answer than all of them." in text


def test_a_picture_that_stands_alone_is_large(tmp_path: Path) -> None:
    def widths(page: str) -> list[int]:
        return [Image.open(BytesIO(b64decode(data))).width for data in re.findall(r'base64,([^"]*)" alt="p', page)[:3]]

    assert widths(render(tmp_path, explanation())) == [768, 768, 384]
    two = explanation(
        pictures=("a.png", "b.png"), grids=tuple(Grid(picture=n, first=3 * n, rows=1, cols=3) for n in (0, 1))
    )
    assert widths(render(tmp_path, two)) == [384, 384, 384]


def test_sinks_are_in_the_table_on_the_picture_and_on_the_chart(tmp_path: Path) -> None:
    page = render(tmp_path, explanation())
    text = text_of(page)
    assert "0 picture 1, row 1, column 1 25.0 0.3 1 1.0e-02 6 dump" in text
    assert "2 picture 1, row 1, column 3 30.0 0.2 2 2 1 anchor" in text
    assert "picture 1: 1 dumps, crossed, and 1 anchors, ringed" in Wellformed(page).alts
    chart = page[page.index('role="img"') :].partition('class="axis"')[0]
    assert (chart.count('"kind-dropped"'), chart.count('"kind-kept"')) == (3, 1)
    assert (chart.count('"kind-dump"'), chart.count('"kind-anchor"')) == (1, 1)
    places = re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)%" overflow="visible"><\w+ class="kind-(\w+)"', chart)
    assert ("100.00", "100.00", "dump") in places, "most attention, least contribution"
    assert ("0.00", "56.54", "dropped") in places, "no attention, and 0.1 between 0.01 and 2"


def test_without_sinks(tmp_path: Path) -> None:
    none = Sinks(threshold=20, channels=(), dumps=(), anchors=(), words=("This model shows no sinks.",))
    page = render(tmp_path, explanation(sinks=none))
    Wellformed(page)
    assert "This model shows no sinks." in text_of(page)
    assert "<table" not in page


def test_maps_say_their_range_and_where_the_most_is(tmp_path: Path) -> None:
    page = render(tmp_path, explanation())
    assert (
        "Contribution of each visual token over picture 1: most in row 1 of 2, column 3 of 3" in Wellformed(page).alts
    )
    text = text_of(page)
    assert "0.01 0.141 2 Attention" in text
    assert "0.01 0.0548 0.3 Value norm" in text


@pytest.mark.parametrize("grids", [(), (Grid(picture=1, first=2, rows=1, cols=4),)])
def test_pictures_whose_tokens_make_no_grid(tmp_path: Path, grids: tuple[Grid, ...]) -> None:
    page = render(tmp_path, explanation(pictures=("a.png", "b.png"), grids=grids))
    Wellformed(page)
    assert f"The visual tokens of {2 - len(grids)} of 2 pictures make no grid" in text_of(page)
    assert "0 visual token 0 25.0" in text_of(page)


def test_user_text_is_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    page = render(tmp_path, explanation())
    Wellformed(page)
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page
    assert not re.search(r"url\(|@import|<link|<iframe|<object|https?://", page)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page


def test_amounts_without_a_range(tmp_path: Path) -> None:
    flat = explanation().maps.model_copy(update={"attention": (0.0,) * 6, "contribution": (0.5,) * 6})
    Wellformed(render(tmp_path, explanation(maps=flat)))


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    assert render(tmp_path, explanation()) == render(tmp_path, explanation())


def test_it_is_the_same_after_json() -> None:
    found = explanation()
    assert found.methods[2].kl is None
    assert Explanation.model_validate_json(found.model_dump_json()) == found
