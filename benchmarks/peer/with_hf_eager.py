"""Hugging Face transformers as it is: no export."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from serve import THREADS, Ask, Feed, Prefills, main, now, questions
from transformers import AutoModelForImageTextToText
from transformers.generation.streamers import BaseStreamer


def _load(checkpoint: Path) -> Any:
    torch.set_num_threads(THREADS)
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


class _Clock(BaseStreamer):
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002 - the first is the prompt.
        self.times.append(now())

    def end(self) -> None:
        pass


def ask(checkpoint: Path, _: Path, variant: str) -> Ask:
    """`generate` as it is, or with the decoder compiled by `torch.compile`."""
    from subject import ask_about, opened, prompter_of

    model, (_, source) = _load(checkpoint), opened(checkpoint)
    prompter = prompter_of(source)
    tower = getattr(model.model, "visual", None) or model.model.vision_tower
    if variant == "compiled":
        decoder = model.model.language_model
        decoder.forward = torch.compile(decoder.forward, dynamic=True)
    at: dict[str, float] = {}
    tower.register_forward_pre_hook(lambda *_: at.update(begun=now()))
    tower.register_forward_hook(lambda *_: at.update(seen=now()))

    @torch.inference_mode()
    def run(*, picture: str, question: str, tokens: int, exact: bool) -> dict[str, Any]:
        asked = ask_about(source, prompter, picture, question)
        ids = torch.from_numpy(asked.prompt.input_ids)[None]
        clock = _Clock()
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens if exact else None,
            do_sample=False,
            repetition_penalty=1.0,
            streamer=clock,
            **{name: torch.from_numpy(value) for name, value in asked.arrays.items()},
        )
        milliseconds = asked.milliseconds(clock.times[1:])
        parts = {**asked.parts, "tower": 1e3 * (at["seen"] - at["begun"])}
        return {
            "text": prompter.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True),
            "milliseconds": milliseconds,
            **parts,
            "prefill": milliseconds[0] - sum(parts.values()),
        }

    return run


if __name__ == "__main__":
    main(prefill=prefill, answer=answer, ask=ask)
