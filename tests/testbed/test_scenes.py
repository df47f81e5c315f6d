"""Scenes, questions, tokenizer and packed training rows of the testbed."""

from typing import Any

import numpy as np
import pytest
import torch

from capa_export.testbed.batches import BATCH, NUM_VISUAL, Batches, patches_from_pictures
from capa_export.testbed.scenes import (
    CELL,
    COLORS,
    KINDS,
    SHAPES,
    Scene,
    Sprite,
    generator,
    questions,
    random_scene,
    render,
    samples,
)
from capa_export.testbed.tiny_qwen25vl import build_image_processor, build_model, build_tokenizer, prompt_text
from capa_export.testbed.train import STAGES, packed_hidden, visual_tokens

HAND_MADE = Scene(
    sprites=(
        Sprite(0, 0, "star", "red"),
        Sprite(3, 5, "ring", "blue"),
        Sprite(7, 7, "heart", "red"),
    )
)


def test_samples_are_deterministic_and_streaming() -> None:
    first = list(samples(6, seed=3))
    again = list(samples(8, seed=3))[:6]
    assert [(s.question, s.answer, s.kind) for s in first] == [(s.question, s.answer, s.kind) for s in again]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(first, again, strict=True))


def test_splits_and_seeds_differ() -> None:
    pictures = [
        next(iter(samples(1, seed=seed, split=split))).image.tobytes()
        for seed in (0, 1)
        for split in ("train", "held_out")
    ]
    assert len(set(pictures)) == 4


def test_every_kind_is_produced_and_answered_by_one_word() -> None:
    drawn = list(samples(40, seed=0))
    assert {s.kind for s in drawn} == set(KINDS)
    assert all(s.answer in {*COLORS, *SHAPES, "yes", "no"} for s in drawn)
    assert all(s.image.size == (8 * CELL, 8 * CELL) for s in drawn)


def test_yes_and_no_are_balanced() -> None:
    answers = [s.answer for s in samples(200, seed=0, kinds=["exists"])]
    assert 70 <= answers.count("yes") <= 130


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "color_of",
            {
                "what color is the star ?": "red",
                "what color is the ring ?": "blue",
                "what color is the heart ?": "red",
            },
        ),
        ("shape_of", {"what shape is blue ?": "ring"}),
        (
            "exists",
            {
                "is there a red star ?": "yes",
                "is there a blue ring ?": "yes",
                "is there a red heart ?": "yes",
                "is there a red ring ?": "no",
                "is there a blue star ?": "no",
                "is there a blue heart ?": "no",
            },
        ),
        (
            "same",
            {
                "what shape has the same color as the star ?": "heart",
                "what shape has the same color as the heart ?": "star",
            },
        ),
    ],
)
def test_questions_of_a_hand_made_scene(kind: str, expected: dict[str, str]) -> None:
    assert dict(questions(HAND_MADE, kind)) == expected


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="known kinds: color_of"):
        questions(HAND_MADE, "count")


def test_sprites_are_painted_where_the_scene_says() -> None:
    pixels = np.asarray(render(HAND_MADE, generator(0))).astype(int)
    centre = pixels[CELL // 2, CELL // 2]
    assert centre[0] > 180
    assert centre[1] < 80
    assert pixels[4 * CELL : 5 * CELL, :CELL].min() > 220


def test_other_sizes_and_no_clutter() -> None:
    sample = next(iter(samples(1, seed=0, cells=(4, 12))))
    assert sample.image.size == (12 * CELL, 4 * CELL)
    assert random_scene(generator(0), clutter=False).clutter == frozenset()
    assert random_scene(generator(0), clutter=True).clutter


def test_tokenizer_round_trip() -> None:
    tokenizer = build_tokenizer()
    texts = [text for s in samples(40, seed=0) for text in (s.question, s.answer)]
    assert [tokenizer.decode(ids) for ids in tokenizer(texts)["input_ids"]] == texts
    assert tokenizer.tokenize("What colour is the star?") == tokenizer.tokenize("what color is the star ?")
    assert tokenizer.tokenize("is there a zebra ?")[-2] == "<unk>"


def test_chat_template_is_the_training_layout() -> None:
    tokenizer = build_tokenizer()
    content: Any = [{"type": "image"}, {"type": "text", "text": "what color is the star ?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert text == prompt_text("what color is the star ?", 1)
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what color is the star ?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_patches_are_those_of_the_image_processor() -> None:
    picture = next(iter(samples(1, seed=0))).image
    inputs = build_image_processor()(images=[picture], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 16, 16]]
    torch.testing.assert_close(patches_from_pictures(np.asarray(picture)[None])[0], inputs["pixel_values"])


@torch.inference_mode()
def test_a_packed_question_computes_what_it_computes_alone() -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).eval()
    batches = Batches(tokenizer, seed=0)
    batch = batches(0, STAGES[-1])
    patches, ids, layout = batch.patches, batch.ids, batch.layout
    assert ids.shape[0] == BATCH
    first = batches.prefix.index(batches.pad)
    words = model.model.language_model.embed_tokens(ids[:1])
    visual = visual_tokens(model, patches[:1])
    embeds = torch.cat([words[:, :first], visual, words[:, first + NUM_VISUAL :]], dim=1)
    packed = model.lm_head(packed_hidden(model, embeds, layout.mask_TT, layout.position_ids))
    start = len(batches.prefix)
    for end in layout.answers.tolist():
        alone = torch.cat([ids[:1, : len(batches.prefix)], ids[:1, start : end + 1]], dim=1)
        expected = model(
            input_ids=alone,
            attention_mask=torch.ones_like(alone),
            mm_token_type_ids=(alone == batches.pad).int(),
            pixel_values=patches[0],
            image_grid_thw=torch.tensor([[1, 16, 16]]),
        ).logits
        # fp32 on both sides, summed in another order through 16 layers; logits are of order 1.
        torch.testing.assert_close(packed[:, end - 1 : end + 1], expected[:, -2:], atol=5e-5, rtol=0)
        start = end + 1
