"""Held-out accuracy of a saved checkpoint, asked as a user would ask it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from capa_export.testbed.scenes import CELL, KINDS, Sample, samples

__all__ = ["Asker", "evaluate"]


class Asker:
    """A checkpoint in fp32 with its own tokenizer, chat template and image processor."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.processor: Any = AutoImageProcessor.from_pretrained(folder)
        self.model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    @torch.inference_mode()
    def answer(self, sample: Sample) -> str:
        """Everything the model says after the prompt, the end token included."""
        content = [{"type": "image"}, {"type": "text", "text": sample.question}]
        message = {"role": "user", "content": content}
        text = self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        num_visual = sample.image.width * sample.image.height // CELL**2
        text = text.replace("<|image_pad|>", "<|image_pad|>" * num_visual)
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
            max_new_tokens=4,
            **self.processor(images=[sample.image], return_tensors="pt"),
        )
        return self.tokenizer.decode(out[0, ids.shape[1] :])


def evaluate(
    folder: Path, *, per_kind: int = 200, seed: int = 1, cells: tuple[int, int] = (8, 8), clutter: bool = True
) -> dict[str, float]:
    """Share of right answers by kind: one question a prompt, the answer word and then the end."""
    asker = Asker(folder)
    accuracy: dict[str, float] = {}
    for kind in KINDS:
        drawn = samples(per_kind, seed=seed, kinds=[kind], cells=cells, clutter=clutter)
        right = [asker.answer(sample) == f"{sample.answer} <|im_end|>" for sample in drawn]
        accuracy[kind] = sum(right) / per_kind
    return accuracy
