"""Hugging Face transformers as it is: no export."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from serve import Feed, Prefills, main, questions
from transformers import AutoModelForImageTextToText


def _load(checkpoint: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()


def prefill(checkpoint: Path, _: Path, feed: Feed) -> Prefills:
    """The decoder from embeddings, with either attention that runs on a CPU."""
    model = _load(checkpoint)
    embeds, positions = (torch.from_numpy(feed[name]) for name in ("inputs_embeds", "position_ids"))
    if len(positions) > 1:
        positions = positions[:, None]

    def runner(attention: str) -> Any:
        @torch.inference_mode()
        def run() -> np.ndarray:
            model.set_attn_implementation(attention)
            hidden = model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=True)
            return model.lm_head(hidden.last_hidden_state[:, -1]).numpy()

        return run

    return {"sdpa": runner("sdpa"), "eager attention": runner("eager")}


@torch.inference_mode()
def answer(checkpoint: Path, _: Path, folder: Path) -> dict[str, Any]:
    """`generate`, greedily."""
    model = _load(checkpoint)
    tokens = []
    for question in questions(folder):
        ids = torch.from_numpy(question["input_ids"])[None]
        pictures = {key[3:]: torch.from_numpy(value) for key, value in question.items() if key.startswith("hf.")}
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, **pictures
        )
        tokens.append(out[0, ids.shape[1] :].tolist())
    return {"sdpa": {"tokens": tokens}}


if __name__ == "__main__":
    main(prefill=prefill, answer=answer)
