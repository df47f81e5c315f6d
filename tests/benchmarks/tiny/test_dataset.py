"""A data set of scenes on disk."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from pydantic import TypeAdapter

from benchmarks.tiny import dataset
from capa_export.data.conversation import Messages, turns_from
from capa_export.data.scenes import HARD_KINDS, KINDS, samples


def test_it_holds_what_was_drawn(tmp_path: Path) -> None:
    drawn = list(samples(8, seed=0, kinds=[*KINDS, *HARD_KINDS]))
    path = dataset.write_dataset(tmp_path / "scenes", drawn)
    lines = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert [(line["answer"], line["kind"]) for line in lines] == [(s.answer, s.kind) for s in drawn]
    for line, sample in zip(lines, drawn, strict=True):
        (turn,) = turns_from(TypeAdapter(Messages).validate_python(line["messages"]), path.parent)
        *images, question = turn.content
        assert question == sample.question
        assert len(images) == len(sample.images)
        for image, expected in zip(images, sample.images, strict=True):
            assert isinstance(image, Image.Image)
            assert image.tobytes() == expected.tobytes()


def test_the_command_writes_the_kinds_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path), "--per-kind", "2", "--kinds", "count", "pictures", "--heavy"]
    monkeypatch.setattr(sys, "argv", ["dataset", *arguments])
    dataset.main()
    path = Path(capsys.readouterr().out.strip())
    kinds = [json.loads(line)["kind"] for line in path.read_text(encoding="ascii").splitlines()]
    assert kinds == ["count", "pictures"] * 2
    assert len(list(tmp_path.glob("*.png"))) == 6
