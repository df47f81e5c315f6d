"""Samples are the same wherever they are drawn, other ones with another seed, and validation's are held out."""

import json
from pathlib import Path

import numpy as np
import pytest

from capa_export.base.errors import CapaError
from capa_export.config.recipe import load_recipe
from capa_export.data.samples import Sample, Samples, samples_from
from tests.conftest import noise

RECIPE = load_recipe("qwen25vl")
SCENES = load_recipe("tiny-qwen25vl")


def test_conversations_are_samples(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    for index in range(3):
        noise(20, 10 + index, index).save(tmp_path / f"{index}.png")
    lines = [
        {"messages": [{"role": "user", "content": [*shown(0), *shown(1), {"type": "text", "text": "compare"}]}]},
        {
            "messages": [
                {"role": "user", "content": shown(2)},
                {"role": "assistant", "content": "red"},
                {"role": "user", "content": "why"},
            ]
        },
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    samples = samples_from(path, RECIPE, 5, split="train")
    assert (samples.count, samples.has_answers) == (2, False)
    first, second = samples
    assert [part.size for part in first.turns[0].content[:2]] == [(20, 10), (20, 11)]
    assert (first.question, second.question) == ("compare", "why")
    assert second.image.size == (20, 12)
    assert len(list(samples_from(path, RECIPE, 5, split="held_out", repeat=True))) == 5
    digest = samples.digest()
    noise(20, 11, 9).save(tmp_path / "1.png")
    assert samples.digest() != digest
    for line, message in (
        ("", "holds no question"),
        ("{", "line 1: is no JSON object"),
        ('{"message": []}', "line 1: has neither messages nor an image and a question, but message"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 1: shows no picture"),
        (json.dumps(lines[0]).replace("1.png", "9.png"), "line 1: .*9.png: no such picture"),
    ):
        path.write_text(line, encoding="utf-8")
        with pytest.raises(CapaError, match=message):
            samples_from(path, RECIPE, 5, split="train")
    with pytest.raises(CapaError, match=r"nowhere\.jsonl: no such file"):
        samples_from(tmp_path / "nowhere.jsonl", RECIPE, 5, split="train")


def shown(index: int) -> list[dict[str, str]]:
    return [{"type": "image", "image": f"{index}.png"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twice as many pictures as validation asks for, and some more."""
    for index in range(2 * RECIPE.parity.prompts + 6):
        noise(4 + index, 4, index).save(tmp_path / f"{index:02}.png")
    return tmp_path


def widths(samples: Samples) -> list[int]:
    return [sample.image.width - 4 for sample in samples]


def test_a_seed_shuffles_a_folder_before_it_is_split(folder: Path) -> None:
    num_held_out = RECIPE.parity.prompts
    assert widths(samples_from(folder, RECIPE, 99, split="held_out")) == list(range(num_held_out))
    assert widths(samples_from(folder, RECIPE, 99, split="train")) == list(range(num_held_out, 2 * num_held_out - 3))
    judges = list(range(2 * num_held_out - 3, 2 * num_held_out + 6))
    assert widths(samples_from(folder, RECIPE, 99, split="judge")) == judges
    held_out = samples_from(folder, RECIPE, 99, split="held_out", seed=3)
    assert widths(held_out) == widths(samples_from(folder, RECIPE, 99, split="held_out", seed=3))
    assert widths(held_out) != widths(samples_from(folder, RECIPE, 99, split="held_out", seed=4))
    train, judge = (samples_from(folder, RECIPE, 99, split=split, seed=3) for split in ("train", "judge"))
    assert sorted(widths(held_out) + widths(train) + widths(judge)) == list(range(2 * num_held_out + 6))
    assert widths(held_out) != sorted(widths(held_out))


def test_a_seed_draws_other_scenes_of_the_same_split() -> None:
    def first(seed: int | None, split: str = "held_out") -> Sample:
        return next(iter(samples_from(None, SCENES, 3, split=split, seed=seed)))  # type: ignore[arg-type]

    def pixels(sample: Sample) -> bytes:
        return np.asarray(sample.image).tobytes()

    drawn = {pixels(first(seed, split)) for seed in (None, 0, 1) for split in ("held_out", "train")}
    assert len(drawn) == 6
    assert pixels(first(1)) == pixels(first(1))
    assert first(1).answer


def test_no_seed_changes_no_digest(folder: Path) -> None:
    """Stages that ran before seeds were known are not run again."""
    scenes = samples_from(None, SCENES, 32, split="held_out").digest()
    assert scenes == "d24863b03c05e63b22c9db942261a7513487dd46b84577c41b34394e56e016f6"
    digests = {samples_from(None, SCENES, 32, split="held_out", seed=seed).digest() for seed in (None, 0, 1, 2602)}
    assert len(digests) == 4
    digests = {samples_from(folder, RECIPE, 32, split="held_out", seed=seed).digest() for seed in (None, 0, 1)}
    assert len(digests) == 3


def test_answers_of_conversations(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "0.png")
    messages = [{"role": "user", "content": [*shown(0), {"type": "text", "text": "what ?"}]}]
    path = tmp_path / "samples.jsonl"

    def written(*answers: str | None) -> Samples:
        lines = [{"messages": messages} | ({} if answer is None else {"answer": answer}) for answer in answers]
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        return samples_from(path, RECIPE, 9, split="held_out")

    unknown, known = written(None, None), written("blue", " 12\n")
    assert (unknown.has_answers, known.has_answers) == (False, True)
    assert [sample.answer for sample in unknown] == ["", ""]
    assert [sample.answer for sample in known] == ["blue", "12"]
    assert len({unknown.digest(), known.digest(), written("blue", "13").digest(), written("12", "blue").digest()}) == 4
    for answers, number in ((("blue", None), 2), ((None, "blue", None), 1), (("blue", "blue", " "), 3)):
        with pytest.raises(CapaError, match=f"samples.jsonl: line {number}: has no answer, others have; give all"):
            written(*answers)
    with pytest.raises(CapaError, match="line 1: answer: must be one"):
        written(["blue"])  # type: ignore[arg-type]
