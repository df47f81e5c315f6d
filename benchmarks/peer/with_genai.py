"""onnxruntime-genai's model builder: a text decoder, where it knows the family, on ONNX Runtime."""

import runpy
import sys
from pathlib import Path

from onnx_graphs import prefills
from serve import Ask, Feed, Prefills, main, weights_of


def export(checkpoint: Path, out: Path) -> None:
    """The builder's own command line; the graph starts from embeddings."""
    sys.argv = ["builder", "-i", str(checkpoint), "-o", str(out), "-p", weights_of(out), "-e", "cpu"]
    sys.argv += ["-c", str(out.with_name("cache")), "--extra_options", "exclude_embeds=true"]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def prefill(_: Path, out: Path, feed: Feed) -> Prefills:
    """The decoder graph."""
    return prefills(out / "model.onnx", int(feed["head_dim"]), feed)


def answer(*_: Path) -> None:
    """There is no graph of the vision tower."""
    sys.exit("NotImplementedError: the builder writes the text decoder only")


def ask(checkpoint: Path, out: Path, variant: str) -> Ask:  # noqa: ARG001 - there is one.
    """Its decoder behind the tower and the embedding that mobius-onnx exported beside it.

    Its own pipeline takes pictures from a folder with three graphs, of which the builder writes one.
    """
    from with_mobius import Graphs, asking

    tower = out.with_name(out.name.removesuffix("-int4").replace("genai", "mobius"))
    return asking(checkpoint, Graphs(tower, out / "model.onnx"))


if __name__ == "__main__":
    main(export=export, prefill=prefill, answer=answer, ask=ask)
