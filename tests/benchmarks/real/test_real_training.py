"""Training a small decoder of random weights."""

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.real import train
from benchmarks.real.smollm2 import Decoder
from benchmarks.real.train import Packer, align, answer, start_parts, trainable, trained_parts
from benchmarks.tiny.decoder import packed_hidden
from benchmarks.tiny.tiny_llava15 import pixels_from_pictures, visual_tokens
from capa_export.data.scenes import generator, samples


@pytest.fixture
def model(small_decoder: Decoder) -> Any:
    torch.manual_seed(0)
    return trainable(small_decoder, start_parts(small_decoder))


@torch.inference_mode()
def test_a_packed_question_computes_what_it_computes_alone(model: Any, small_decoder: Decoder) -> None:
    tokenizer = small_decoder.tokenizer
    packer = Packer(tokenizer)
    pictures = np.stack([np.asarray(sample.image) for sample in samples(2, seed=0)])
    asked = [("What color is the star?", "red"), ("What shape is blue?", "square")]
    batch = packer.pack(pictures, [asked, asked[::-1]])
    decoder = model.model.language_model
    visual = visual_tokens(model, pixels_from_pictures(batch.pictures))
    embeds = decoder.embed_tokens(batch.ids_BT).index_copy(1, packer.visual, visual)
    packed = model.lm_head(packed_hidden(decoder, embeds, batch.mask_TT, batch.position_ids))
    for row, questions in enumerate((asked, asked[::-1])):
        start = len(packer.prefix)
        for question, said in questions:
            text = f"{question}{packer.behind}{said}"
            ids = torch.tensor([[*packer.prefix, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
            pixels = pixels_from_pictures(pictures[row : row + 1])
            alone = model(input_ids=ids, pixel_values=pixels).logits[0, len(packer.prefix) :]
            # FP32 on both sides, summed in another order.
            torch.testing.assert_close(packed[row, start : start + len(alone)], alone, atol=1e-5, rtol=0)
            due = batch.labels_BT[row, start : start + len(alone)]
            count = len(tokenizer(said, add_special_tokens=False)["input_ids"]) + 1
            assert (due == -100).tolist() == [True] * (len(alone) - count) + [False] * count
            assert tokenizer.decode(due[-count:]) == f"{said}<|im_end|>"
            start += max(len(packer.tokenizer(f"{q}{packer.behind}{a}")["input_ids"]) for q, a in asked)


def test_it_learns_and_leaves_what_is_published(
    model: Any, small_decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = model.model.language_model
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    parts = trained_parts(model)
    begun = {name: change.b.clone() for name, change in parts.changes.items()}
    packer = Packer(small_decoder.tokenizer)
    align(model, small_decoder.tokenizer, steps=2, size=2)
    again = packer.draw(generator(0, 0, split="train"), 2, "easy")
    monkeypatch.setattr(packer, "draw", lambda *_: again)
    shares = list(answer(model, packer, steps=40, size=2))
    assert shares[-1] > shares[0] + 0.2
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("weight.0." not in name)
    after = trained_parts(model)
    assert begun.keys() == after.changes.keys()
    assert not any(torch.equal(change.b, begun[name]) for name, change in after.changes.items())


def test_it_goes_on_from_trained_parts(model: Any, small_decoder: Decoder) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("weight.0.b"):
            torch.nn.init.normal_(parameter)
    parts = trained_parts(model)
    again = trainable(small_decoder, parts)
    for (name, mine), (_, theirs) in zip(train._projections(again), train._projections(model), strict=True):
        assert torch.equal(mine.weight, theirs.weight), name
