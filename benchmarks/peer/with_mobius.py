"""mobius-onnx: three graphs."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from onnx_graphs import DecoderSession, prefills, session
from serve import Feed, Prefills, main, questions

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


if __name__ == "__main__":
    main(export=export, prefill=prefill, answer=answer)
