"""Tokenizers, image processors, batched towers and packed training rows of every test bed."""

from typing import Any

import numpy as np
import pytest
import torch

from capa_export.testbed.batches import BATCH, STOPS, Batches
from capa_export.testbed.beds import BEDS, NUM_VISUAL, Bed, family_of, load_bed
from capa_export.testbed.scenes import samples
from capa_export.testbed.train import HARD, answer_logits

PROMPTS = {
    "tiny-qwen25vl": (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what color is the star ?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "tiny-llava15": "USER: <image>\nwhat color is the star ? ASSISTANT:",
    "tiny-internvl3": ("<|im_start|>user\n<IMG_CONTEXT>\nwhat color is the star ?<|im_end|>\n<|im_start|>assistant\n"),
}


@pytest.fixture(params=BEDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def bed(name: str) -> Bed:
    return load_bed(name)


def test_tokenizer_round_trip(bed: Bed) -> None:
    tokenizer = bed.build_tokenizer()
    texts = [text for s in samples(40, seed=0) for text in (s.question, s.answer)]
    encoded: Any = tokenizer(texts)["input_ids"]
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded] == texts
    assert tokenizer.tokenize("What colour is the star?") == tokenizer.tokenize("what color is the star ?")
    assert tokenizer.tokenize("is there a zebra ?")[-2] == "<unk>"


def test_chat_template_is_the_familys(name: str, bed: Bed) -> None:
    content: Any = [{"type": "image"}, {"type": "text", "text": "what color is the star ?"}]
    tokenizer = bed.build_tokenizer()
    text: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert text == PROMPTS[name]
    known: Any = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in known


def test_pixels_are_those_of_the_image_processor(bed: Bed) -> None:
    pictures = [sample.image for sample in samples(2, seed=0)]
    inputs = bed.build_image_processor()(images=pictures, return_tensors="pt", **family_of(bed).IMAGE_OPTIONS)
    pixels = bed.pixels_from_pictures(np.stack([np.asarray(picture) for picture in pictures]))
    torch.testing.assert_close(pixels.reshape(inputs["pixel_values"].shape), inputs["pixel_values"])


@torch.inference_mode()
def test_a_packed_question_computes_what_it_computes_alone(bed: Bed) -> None:
    tokenizer = bed.build_tokenizer()
    model = bed.build_model(tokenizer).eval()
    batches = Batches(bed, tokenizer, model.config, seed=0)
    batch = batches(0, HARD)
    assert batch.ids.shape[0] == BATCH
    assert int((batch.ids[0] == batches.pad).sum()) == NUM_VISUAL
    answered, stopped, _ = answer_logits(bed, model, batches, batch)
    inputs: Any = bed.build_image_processor()(images=[batch.pictures[0]], return_tensors="pt")
    taken = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_grid_thw")}
    start = len(batches.prefix)
    for index, end in enumerate(batch.layout.stops[:, -1].tolist()):
        alone = torch.cat([batch.ids[:1, : len(batches.prefix)], batch.ids[:1, start : end + 1]], dim=1)
        if "image_grid_thw" in taken:
            taken["mm_token_type_ids"] = (alone == batches.pad).int()
        expected = model(input_ids=alone, attention_mask=torch.ones_like(alone), **taken).logits
        packed = torch.cat([answered[:1, index, None], stopped[:1, index]], dim=1)
        # fp32 on both sides, summed in another order through 16 layers; logits are of order 1.
        torch.testing.assert_close(packed, expected[:, -1 - STOPS :], atol=5e-5, rtol=0)
        start = end + 1
