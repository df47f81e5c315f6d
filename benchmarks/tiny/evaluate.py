"""Held-out accuracy of a saved checkpoint, asked as a user would ask it."""

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from capa_export.data.scenes import HARD_KINDS, KINDS, SceneSample, samples
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import Family
from capa_export.model.prompt import Prompter

__all__ = ["Asker", "evaluate"]


class Asker:
    """A checkpoint in fp32 with its own tokenizer, chat template and image processor."""

    def __init__(self, folder: Path, family: Family) -> None:
        dims = family.model_dims(open_checkpoint(str(folder)).config)
        self.prompter = Prompter(folder, folder, family, dims)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)

    @torch.inference_mode()
    def answer(self, sample: SceneSample) -> str:
        """Everything the model says after the prompt, the end token included."""
        images, prompter = list(sample.images), self.prompter
        prompt = prompter(sample.question, images)
        seen = prompter.image_processor(images=images, return_tensors="pt", **prompter.family.IMAGE_OPTIONS)
        ids = torch.from_numpy(prompt.input_ids)[None]
        given = {**seen, "mm_token_type_ids": torch.from_numpy(prompt.is_visual)[None].int()}
        taken = signature(self.model.forward).parameters
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            **{name: value for name, value in given.items() if name in taken},
        )
        return prompter.tokenizer.decode(out[0, ids.shape[1] :])

    def is_right(self, sample: SceneSample) -> bool:
        """Whether the model says the answer and then ends."""
        return self.answer(sample) == f"{sample.answer} {self.prompter.tokenizer.eos_token}"


def evaluate(
    folder: Path,
    family: Family,
    *,
    per_kind: int = 200,
    seed: int = 1,
    cells: tuple[int, int] = (8, 8),
    clutter: bool = True,
    heavy: bool = False,
) -> dict[str, float]:
    """Share of right answers by kind: one question a prompt, the answer and then the end."""
    asker = Asker(folder, family)
    accuracy: dict[str, float] = {}
    for kind in (*KINDS, *HARD_KINDS):
        drawn = samples(per_kind, seed=seed, kinds=[kind], cells=cells, clutter=clutter, heavy=heavy)
        accuracy[kind] = sum(asker.is_right(sample) for sample in drawn) / per_kind
    return accuracy
