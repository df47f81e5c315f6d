"""Training: the head start from a trained bed, and a run that was cut off."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tiny import distil
from benchmarks.tiny.batches import Batches
from benchmarks.tiny.beds import load_bed
from benchmarks.tiny.curriculum import FURTHER
from benchmarks.tiny.distil import Teacher, go_on_from
from benchmarks.tiny.tokenizer import HARD_WORDS
from benchmarks.tiny.train import Training, lesson_loss, train
from capa_export.config.recipe import load_recipe

STUDENTS = ("tiny-llava15", "tiny-internvl3")


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(load_recipe("tiny-qwen25vl").checkpoint)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_starts_with_the_teachers_decoder_and_words(name: str, folder: Path) -> None:
    bed, teacher = load_bed(name), Teacher(folder)
    tokenizer = bed.build_tokenizer()
    model = bed.build_model(tokenizer)
    vocab = tokenizer.get_vocab()
    teacher.give_words(bed, model, vocab)
    given, theirs = model.model.language_model, teacher.model.model.language_model
    for layer, other in zip(given.layers, theirs.layers, strict=True):
        assert torch.equal(layer.self_attn.q_proj.weight, other.self_attn.q_proj.weight)
        assert torch.equal(layer.mlp.down_proj.weight, other.mlp.down_proj.weight)
    known = {word: word for word in vocab.keys() & teacher.vocab.keys()} | dict(bed.STANDS_FOR)
    # A teacher may be older than the hard kinds.
    assert known.keys() | set(HARD_WORDS) == vocab.keys()
    for word, source in known.items():
        row, other = vocab[word], teacher.vocab[source]
        assert torch.equal(given.embed_tokens.weight[row], theirs.embed_tokens.weight[other])
        assert torch.equal(model.lm_head.weight[row], teacher.model.lm_head.weight[other])


@pytest.mark.parametrize("name", STUDENTS)
def test_imitation_brings_the_visual_tokens_closer(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "PICTURES", 2)
    bed, teacher = load_bed(name), Teacher(folder)
    training = Training(bed.build_model(bed.build_tokenizer()), Path("unused"))
    losses: list[float] = []
    for _ in range(12):
        loss = teacher.tower_loss(bed, training.model, seed=0, step=0)
        training.descend(loss, 1e-3)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_a_bed_goes_on_from_weights_with_fewer_words(tmp_path: Path) -> None:
    bed = load_bed("tiny-qwen25vl")
    tokenizer = bed.build_tokenizer()
    known = len(tokenizer) - len(HARD_WORDS)
    smaller = bed.build_model(tokenizer, seed=1)
    smaller.resize_token_embeddings(known)
    smaller.save_pretrained(tmp_path)
    model = bed.build_model(tokenizer, seed=2)
    new_words = model.lm_head.weight[known:].clone()
    go_on_from(tmp_path, model)
    ids = torch.arange(8)[None]
    # The same weights; products are summed in another order where the head is larger.
    torch.testing.assert_close(model(ids).logits[..., :known], smaller(ids).logits, atol=1e-5, rtol=0)
    assert torch.equal(model.lm_head.weight[known:], new_words)


def test_every_lesson_lowers_its_loss(tmp_path: Path) -> None:
    bed = load_bed("tiny-llava15")
    tokenizer = bed.build_tokenizer()
    training = Training(bed.build_model(tokenizer), tmp_path / "unused")
    batches = Batches(bed, tokenizer, training.model.config, seed=0, size=2)
    for lesson in FURTHER[0].lessons[:2]:
        losses: list[float] = []
        for _ in range(6):
            loss, _ = lesson_loss(bed, training.model, batches, batches(0, lesson), seen_weight=0.5)
            training.descend(loss, 1e-3)
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("cut", [1, 3], ids=["imitating", "answering"])
def test_a_run_that_was_cut_off_goes_on(
    cut: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "PICTURES", 2)

    def run(state: str, *, resume: bool = False) -> dict[str, Any]:
        model = train(
            load_bed("tiny-llava15"),
            state_file=tmp_path / state,
            minutes=None,
            steps=2,
            seed=0,
            resume=resume,
            teacher=folder,
            distil_steps=2,
            size=2,
        )
        return model.state_dict()

    whole = run("whole")
    left = cut

    def tell(training: Training, _line: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            training.save()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "tell", tell)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    again = run("cut", resume=True)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
