"""Training: the head start from a trained bed, and a run that was cut off."""

from pathlib import Path
from typing import Any

import pytest
import torch

from capa_export.recipe import load_recipe
from capa_export.testbed import batches, distil
from capa_export.testbed.beds import load_bed
from capa_export.testbed.distil import Teacher
from capa_export.testbed.train import Training, train

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
    assert known.keys() == vocab.keys()
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


@pytest.mark.parametrize("cut", [1, 3], ids=["imitating", "answering"])
def test_a_run_that_was_cut_off_goes_on(
    cut: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH", 2)
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
