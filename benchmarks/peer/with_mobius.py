"""mobius-onnx: three graphs."""

import itertools
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx_graphs import DecoderSession, prefills, session
from serve import Ask, Feed, Prefills, main, now, quantized, questions, weights_of

_NUM_TOKENS = 4
_DECODER = Path("decoder", "model.onnx")


def export(checkpoint: Path, out: Path) -> None:
    """Export as `mobius build` does; it quantizes nothing, and keeps four bits that a checkpoint has."""
    if weights_of(out) == "int4" and not quantized(checkpoint):
        sys.exit("NotImplementedError: `mobius build` has no option that quantizes")
    from mobius.__main__ import main as mobius

    sys.argv = ["mobius", "build", "--config", str(checkpoint), "--dtype", "f32", str(out)]
    if code := mobius():
        sys.exit(code)


def prefill(_: Path, out: Path, feed: Feed) -> Prefills:
    """The decoder graph."""
    return prefills(out / _DECODER, int(feed["head_dim"]), feed)


class Graphs:
    """Vision tower, embedding and decoder on ONNX Runtime."""

    def __init__(self, folder: Path, decoder: Path) -> None:
        self._tower, self._embedding = (
            session(folder / name / "model.onnx") for name in ("vision_encoder", "embedding")
        )
        self._decoder = DecoderSession(decoder)

    def features(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Of a picture, from what Hugging Face's tower is fed."""
        return self._tower.run(None, {entry.name: inputs[entry.name] for entry in self._tower.get_inputs()})[0]

    def tokens(
        self, features: np.ndarray, input_ids: np.ndarray, positions: np.ndarray, next_position: int, head_dim: int
    ) -> Iterator[int]:
        """The likeliest one after the other, without end; each is computed when it is asked for."""
        cache = self._decoder.empty_cache(head_dim)
        logits, cache = self._decoder(self._embed(input_ids, features), positions, cache, 0)
        for count in itertools.count():
            token = int(logits.argmax())
            yield token
            step = np.full((len(positions), 1), next_position + count)
            embeds = self._embed(np.array([token]), features[:0])
            logits, cache = self._decoder(embeds, step, cache, len(input_ids) + count)

    def _embed(self, ids: np.ndarray, features: np.ndarray) -> np.ndarray:
        return self._embedding.run(None, {"input_ids": ids[None], "image_features": features})[0]


def answer(_: Path, out: Path, folder: Path) -> dict[str, Any]:
    """Greedily."""
    graphs = Graphs(out, out / _DECODER)
    tokens = []
    for question in questions(folder):
        features = graphs.features({name.removeprefix("hf."): array for name, array in question.items()})
        places = (question[name] for name in ("input_ids", "position_ids"))
        said = graphs.tokens(features, *places, int(question["next_position"]), int(question["head_dim"]))
        tokens.append(list(_until(said, question["eos_token_ids"], _NUM_TOKENS)))
    return {"dense": {"tokens": tokens}}


def _until(tokens: Iterable[int], stop: Container[int], limit: int) -> Iterator[int]:
    """As many tokens at most, the one that ends an answer included."""
    for token in itertools.islice(tokens, limit):
        yield token
        if token in stop:
            return


def ask(checkpoint: Path, out: Path, variant: str) -> Ask:  # noqa: ARG001 - there is one.
    """Greedily; runs in this project's environment."""
    return asking(checkpoint, Graphs(out, out / _DECODER))


def asking(checkpoint: Path, graphs: Graphs) -> Ask:
    """Answers of graphs that take turns."""
    from subject import ask_about, opened, prompter_of

    from capa_export.model.generation import eos_token_ids

    _, source = opened(checkpoint)
    prompter, stop = prompter_of(source), eos_token_ids(checkpoint)

    def run(*, picture: str, question: str, tokens: int, exact: bool) -> dict[str, Any]:
        asked = ask_about(source, prompter, picture, question)
        begun = now()
        features = graphs.features(asked.arrays)
        seen = now()
        prompt = asked.prompt
        places = (prompt.input_ids, prompt.position_ids, prompt.next_position, source.dims.decoder.head_dim)
        said, times = [], []
        for token in _until(graphs.tokens(features, *places), () if exact else stop, tokens):
            said.append(token)
            times.append(now())
        return {
            "text": prompter.decode([token for token in said if token not in stop]),
            "milliseconds": asked.milliseconds(times),
            **asked.parts,
            "tower": 1e3 * (seen - begun),
            "prefill": 1e3 * (times[0] - seen),
        }

    return run


if __name__ == "__main__":
    main(export=export, prefill=prefill, answer=answer, ask=ask)
