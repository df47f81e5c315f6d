"""The whole-answer benchmark's own machinery, and that two systems say the same."""

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import request
from benchmarks.request import REFERENCE, Bed, System
from benchmarks.request_files import bundle, kept
from benchmarks.request_table import markdown
from benchmarks.tiny.dataset import write_dataset
from capa_export.data.scenes import KINDS, samples

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / "benchmarks" / "peer"
ADAPTER = """
import sys
sys.path.insert(0, {folder!r})
from serve import main

def ask(checkpoint, out, variant):
    def run(*, picture, question, tokens, exact):
        if question == "too much":
            raise MemoryError("no room")
        return dict(text=variant, milliseconds=[{step} * (n + 1) for n in range(tokens)], file=1.0)
    return run

main(ask=ask)
"""


def reply(first: float, each: float, count: int = 3, **parts: float) -> dict[str, Any]:
    milliseconds = [first + each * index for index in range(count)]
    return {"milliseconds": milliseconds, "peak_memory_bytes": 5 << 20, "text": "blue", **parts}


def test_times_are_medians_by_part_and_by_length() -> None:
    replies = [reply(10, 2, file=1, tower=4), reply(30, 4, file=3, tower=6), reply(20, 3, file=2, tower=5)]
    row = request._times(replies, (1, 3))
    assert row["ms_to_token_1"] == 20
    assert row["ms_to_token_3"] == 26
    assert row["ms_a_token"] == 3
    assert row["parts_ms"] == {"file": 2, "tower": 5}
    assert row["peak_MB"] == 5


def test_a_ratio_is_of_the_same_turn() -> None:
    # The machine was three times slower in the second turn, for both.
    theirs, ours = ([reply(first, 0) for first in times] for times in ((20, 60, 22), (10, 30, 10)))
    assert request._ratio(theirs, ours, 1) == 2.0


def test_a_system_that_fails_says_why(tmp_path: Path) -> None:
    script = tmp_path / "adapter.py"
    script.write_text(ADAPTER.format(folder=str(PEER), step=2.0), encoding="utf-8")
    command = [sys.executable, str(script), "ask", "c", "o", "dense"]
    line = {"picture": "p.png", "question": "what", "tokens": 2, "exact": True}
    replies, error = request._session(command, tmp_path / "log", [line, line, line], 60)
    assert error is None
    assert [(one["milliseconds"], one["text"]) for one in replies] == [([2.0, 4.0], "dense")] * 2
    assert all(one["peak_memory_bytes"] > 1 << 20 for one in replies)
    lines = [line, line, line | {"question": "too much"}, line]
    replies, error = request._session(command, tmp_path / "log", lines, 60)
    assert error == "MemoryError: no room (answer 2 of 3)"
    assert [one["milliseconds"] for one in replies] == [[2.0, 4.0]]


def test_a_system_keeps_the_sizes_that_it_answered(tmp_path: Path) -> None:
    options = request.parsed(["--work", str(tmp_path)])
    whole = [reply(100, 10, max(request.TOKENS))] * 3
    assert list(request._sizes(options, [whole[:2]], [whole])["visual_tokens"]) == ["256", "1024"]
    assert request._sizes(options, [[]], [whole]) == {"visual_tokens": {}}
    assert request._sizes(options, [], [whole]) == {"visual_tokens": {}}


@pytest.mark.parametrize("turn", [0, 1])
def test_no_picture_is_shown_twice_in_a_session(tmp_path: Path, turn: int) -> None:
    options = request.parsed(["--work", str(tmp_path), "--visual-tokens", "256", "1024"])
    lines = request._pictures_of(tmp_path, options, turn)
    assert [line["tokens"] for line in lines] == [4, 64, 64]
    assert len({line["picture"] for line in lines}) == 3
    assert [Image.open(line["picture"]).size for line in lines] == [(448, 448), (448, 448), (896, 896)]


def test_the_table_shows_rows_ratios_and_what_did_not_run() -> None:
    times = request._times([reply(100, 10, 64, file=1, processor=2, tower=30, prefill=67)], request.TOKENS)
    row = {"error": None, "visual_tokens": {"256": times | {"hf_eager_over_this": {"1": 2.0, "16": 1.5, "64": 1.25}}}}
    failed = {"error": "ValueError: unsupported"}
    beds = [{"bed": "whole", "questions": 0, "systems": {"capa-export, CAPA": row, "other": failed}}]
    load = {"before": [1.0], "after": [2.0]}
    text = markdown({"date": "d", "machine": "m", "load": load, "beds": beds})
    [line] = [line for line in text.splitlines() if line.startswith("| **capa-export, CAPA** |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
    assert cells == ["1", "2", "30", "67", "100", "2.00", "250", "1.50", "730", "1.25", "10.0", "5"]
    assert "- other: `ValueError: unsupported`" in text


@pytest.mark.slow
def test_this_project_and_transformers_answer_alike(tmp_path: Path) -> None:
    checkpoint = ROOT / "graphs" / "checkpoints" / "tiny-qwen25vl"
    write_dataset(tmp_path / "scenes", samples(2, seed=29, kinds=KINDS))
    bed = Bed(
        "tiny",
        checkpoint,
        "tiny-qwen25vl",
        "capa@2:0/full",
        "",
        None,
        "",
        "int4",
        request._asked(tmp_path / "scenes", 2),
    )
    out = kept(
        tmp_path / "dense",
        lambda path: bundle(checkpoint, bed.dense, recipe=bed.recipe, images=None, out=path),
    )
    systems = [System(REFERENCE, "hf_eager", "sdpa"), System("ours", "capa_export", files="dense")]
    files = {REFERENCE: (checkpoint, None), "ours": (out, None)}
    found = request._measured(tmp_path, bed, systems, files, request.parsed(["--work", str(tmp_path)]))
    theirs, ours = found["systems"].values()
    assert theirs["error"] is None and ours["error"] is None
    assert ours["texts"] == theirs["texts"]
    assert ours["accuracy"] == theirs["accuracy"] == 1.0
    parts = ours["parts_ms"]
    assert all(parts[part] > 0 for part in ("file", "processor", "tower", "prefill"))
    assert sum(parts.values()) <= ours["answer_ms"]
