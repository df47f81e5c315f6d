"""Tokenizers, image processors, batched towers and packed training rows of every test bed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.tiny.batches import Batches, Lesson
from benchmarks.tiny.beds import BEDS, NUM_VISUAL, Bed, family_of, load_bed
from benchmarks.tiny.curriculum import FURTHER
from benchmarks.tiny.tokenizer import HARD_WORDS
from benchmarks.tiny.train import answer_logits
from capa_export.config.recipe import load_recipe
from capa_export.data.scenes import HARD_KINDS, samples
from capa_export.model.prompt import Prompter

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
@pytest.mark.parametrize("lesson", FURTHER[-1].lessons, ids=["numbers", "basic", "two pictures", "twins"])
def test_a_packed_question_computes_what_it_computes_alone(bed: Bed, lesson: Lesson) -> None:
    tokenizer = bed.build_tokenizer()
    model = bed.build_model(tokenizer).eval()
    batches = Batches(bed, tokenizer, model.config, seed=0, size=4)
    batch = batches(0, lesson)
    layout = batch.layout
    assert layout is not None
    num_pictures = len(batch.pictures) // 4
    assert num_pictures == 1 + ("pictures" in lesson.asked)
    assert batch.ids.shape[0] == 4
    assert int((batch.ids[0] == batches.pad).sum()) == num_pictures * NUM_VISUAL
    assert tokenizer.unk_token_id not in batch.ids
    visual = bed.visual_tokens(model, bed.pixels_from_pictures(batch.pictures))
    answered, stopped = answer_logits(model, layout, batch.ids, visual)
    pictures = list(batch.pictures[:num_pictures])
    inputs: Any = bed.build_image_processor()(images=pictures, return_tensors="pt")
    taken = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_grid_thw")}
    shared = start = len(batches.frames[num_pictures].prefix)
    for index, end in enumerate(layout.stops[:, -1].tolist()):
        alone = torch.cat([batch.ids[:1, :shared], batch.ids[:1, start : end + 1]], dim=1)
        if "image_grid_thw" in taken:
            taken["mm_token_type_ids"] = (alone == batches.pad).int()
        expected = model(input_ids=alone, attention_mask=torch.ones_like(alone), **taken).logits
        packed = torch.cat([answered[:1, layout.of == index], stopped[:1, index]], dim=1)
        # fp32 on both sides, summed in another order through 16 layers; logits are of order 1.
        torch.testing.assert_close(packed, expected[:, -packed.shape[1] :], atol=5e-5, rtol=0)
        start = end + 1


def test_hard_words_are_known_and_behind_all_others(bed: Bed) -> None:
    tokenizer = bed.build_tokenizer()
    vocab = tokenizer.get_vocab()
    assert sorted(vocab, key=lambda word: vocab[word])[-len(HARD_WORDS) :] == list(HARD_WORDS)
    texts = [text for s in samples(200, seed=0, kinds=HARD_KINDS) for text in (s.question, s.answer)]
    encoded: Any = tokenizer(texts)["input_ids"]
    assert tokenizer.unk_token_id not in {token for ids in encoded for token in ids}
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded] == texts


def test_older_words_keep_their_ids(name: str, bed: Bed) -> None:
    vocab = bed.build_tokenizer().get_vocab()
    first = {"tiny-qwen25vl": 8, "tiny-llava15": 5, "tiny-internvl3": 8}[name]
    # Those of the first checkpoints that shipped.
    expected = {"\n": 0, "what": 8, "no": 20, "red": 21, "purple": 26, "cyan": 28, "circle": 29, "cross": 36}
    assert {word: vocab[word] - first for word in expected} == expected


def test_a_training_row_is_the_prompt_that_a_user_gets(name: str, bed: Bed) -> None:
    tokenizer = bed.build_tokenizer()
    config = bed.build_model(tokenizer).config
    batches = Batches(bed, tokenizer, config, seed=0, size=1)
    folder = Path(load_recipe(name).checkpoint)
    prompter = Prompter(folder, folder, batches.family, batches.dims)
    prompter.tokenizer = tokenizer
    for kind in ("number", "pictures"):
        batch = batches(0, Lesson(asked={kind: 1}))
        assert batch.layout is not None
        prompt = prompter(batch.questions[0], [Image.fromarray(picture) for picture in batch.pictures])
        first_answer = int(batch.layout.answers[0])
        assert batch.ids[0, :first_answer].tolist() == prompt.input_ids.tolist()
        assert batch.layout.position_ids[:, :first_answer].tolist() == prompt.position_ids.tolist()
        assert batch.layout.visual.tolist() == np.flatnonzero(prompt.is_visual).tolist()
