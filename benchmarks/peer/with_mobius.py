"""mobius-onnx: three graphs."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from onnx_graphs import DecoderSession, prefills, session
from serve import Ask, Feed, Prefills, main, now, questions

_NUM_TOKENS = 4


def export(checkpoint: Path, out: Path) -> None:
    """Export as `mobius build` does."""
    from mobius.__main__ import main as mobius

    sys.argv = ["mobius", "build", "--config", str(checkpoint), "--dtype", "f32", str(out)]
    if code := mobius():
        sys.exit(code)


def prefill(_: Path, out: Path, feed: Feed) -> Prefills:
    """The decoder graph."""
    return prefills(out / "decoder" / "model.onnx", int(feed["head_dim"]), feed)


def answer(_: Path, out: Path, folder: Path) -> dict[str, Any]:
    """Vision tower, embedding and decoder, greedily."""
    tower, embedding = (session(out / name / "model.onnx") for name in ("vision_encoder", "embedding"))
    decoder = DecoderSession(out / "decoder" / "model.onnx")
    wanted = [entry.name for entry in tower.get_inputs()]
    tokens = []
    for question in questions(folder):
        features = tower.run(None, {name: question[f"hf.{name}"] for name in wanted})[0]

        def embed(ids: np.ndarray, features: np.ndarray = features) -> np.ndarray:
            return embedding.run(None, {"input_ids": ids[None], "image_features": features})[0]

        ids, positions = question["input_ids"], question["position_ids"]
        cache = decoder.empty_cache(int(question["head_dim"]))
        logits, cache = decoder(embed(ids), positions, cache, 0)
        said = [int(logits.argmax())]
        while len(said) < _NUM_TOKENS and said[-1] not in question["eos_token_ids"]:
            num_past = len(ids) + len(said) - 1
            place = int(question["next_position"]) + len(said) - 1
            step = np.full((len(positions), 1), place)
            logits, cache = decoder(embed(np.array(said[-1:]), features[:0]), step, cache, num_past)
            said.append(int(logits.argmax()))
        tokens.append(said)
    return {"dense": {"tokens": tokens}}


def ask(checkpoint: Path, out: Path, variant: str) -> Ask:  # noqa: ARG001 - there is one.
    """Vision tower, embedding and decoder on ONNX Runtime; runs in this project's environment."""
    from PIL import Image
    from subject import hf_inputs, opened, prompter_of

    from capa_export.model.generation import eos_token_ids

    _, source = opened(checkpoint)
    prompter, stop = prompter_of(source), eos_token_ids(checkpoint)
    tower, embedding = (session(out / name / "model.onnx") for name in ("vision_encoder", "embedding"))
    decoder = DecoderSession(out / "decoder" / "model.onnx")

    def run(*, picture: str, question: str, tokens: int, exact: bool) -> dict[str, Any]:
        began = now()
        image = Image.open(picture).convert("RGB")
        opened = now()
        prompt = prompter(question, [image])
        processed = now()
        arrays = hf_inputs(source, prompter, prompt, image)
        twice = now() - processed
        features = tower.run(None, {entry.name: arrays[entry.name] for entry in tower.get_inputs()})[0]
        seen = now()

        def embed(ids: np.ndarray, features: np.ndarray) -> np.ndarray:
            return embedding.run(None, {"input_ids": ids[None], "image_features": features})[0]

        cache = decoder.empty_cache(source.dims.decoder.head_dim)
        logits, cache = decoder(embed(prompt.input_ids, features), prompt.position_ids, cache, 0)
        said, times = [int(logits.argmax())], [now()]
        while len(said) < tokens and (exact or said[-1] not in stop):
            step = np.full((len(prompt.position_ids), 1), prompt.next_position + len(said) - 1)
            num_past = len(prompt.input_ids) + len(said) - 1
            logits, cache = decoder(embed(np.array(said[-1:]), features[:0]), step, cache, num_past)
            said.append(int(logits.argmax()))
            times.append(now())
        return {
            "text": prompter.decode([token for token in said if token not in stop]),
            "milliseconds": [1e3 * (moment - began - twice) for moment in times],
            "file": 1e3 * (opened - began),
            "processor": 1e3 * (processed - opened),
            "tower": 1e3 * (seen - processed - twice),
            "prefill": 1e3 * (times[0] - seen),
        }

    return run


if __name__ == "__main__":
    main(export=export, prefill=prefill, answer=answer, ask=ask)
