"""onnxruntime-genai's model builder: a text decoder, where it knows the family."""

import runpy
import sys
from pathlib import Path

from onnx_graphs import prefills
from serve import Ask, Feed, Prefills, main


def export(checkpoint: Path, out: Path) -> None:
    """The builder's own command line; the graph starts from embeddings."""
    sys.argv = ["builder", "-i", str(checkpoint), "-o", str(out), "-p", "fp32", "-e", "cpu"]
    sys.argv += ["-c", str(out.with_name("cache")), "--extra_options", "exclude_embeds=true"]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def prefill(_: Path, out: Path, feed: Feed) -> Prefills:
    """The decoder graph."""
    return prefills(out / "model.onnx", int(feed["head_dim"]), feed)


def answer(*_: Path) -> None:
    """There is no graph of the vision tower."""
    sys.exit("NotImplementedError: the builder writes the text decoder only")


def ask(_: Path, out: Path, variant: str) -> Ask:  # noqa: ARG001 - there is one.
    """Its own pipeline; it ends where it has no processor for pictures."""
    import onnxruntime_genai

    processor = onnxruntime_genai.Model(str(out)).create_multimodal_processor()
    raise NotImplementedError(f"it has a processor for pictures by now: {processor}")


if __name__ == "__main__":
    main(export=export, prefill=prefill, answer=answer, ask=ask)
