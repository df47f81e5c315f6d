"""Answers a question from a bundle alone."""

import re
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capa_export.bundle import Bundle
from capa_export.errors import CapaError
from capa_export.families import load_family
from capa_export.job import ONNX, eos_token_ids
from capa_export.prompt import Prompter, open_picture
from capa_export.recipe import kept_tokens, recipe_of
from capa_export.runtime import OnnxModel, greedy

__all__ = ["answer"]


def answer(
    bundle: Bundle,
    question: str,
    images: Sequence[Path],
    *,
    ratio: float | None = None,
    max_new_tokens: int = 64,
    stream: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Generate greedily through ONNX Runtime.

    Args:
        bundle: with its `onnx` folder as it was built.
        question: of the user's turn.
        images: shown before the question.
        ratio: of visual tokens removed, in place of the bundle's.
        max_new_tokens: longest answer.
        stream: told each new piece of the answer.

    Raises:
        CapaError: a file of the bundle was changed, or a picture does not load or is too large.
    """
    import json

    import transformers

    transformers.utils.logging.set_verbosity_error()
    bundle.verify("export")
    recipe = recipe_of(bundle.manifest, bundle.folder).with_options(ratio=ratio, prune_layer=None)
    pictures = [open_picture(path) for path in images]
    folder = bundle.folder / ONNX
    family = load_family(recipe.family)
    config = json.loads((folder / "llm" / "config.json").read_text(encoding="utf-8"))
    prompter = Prompter(folder / "llm", folder / "visual", family, family.model_dims(config))
    prompt = prompter(question, pictures)
    model = OnnxModel(folder)
    model.load()
    num_keep = [kept_tokens(prompt.num_visual, stage.ratio) for stage in recipe.prune.schedule]

    tokens: list[int] = []
    text = ""
    with _runtime_errors(prompt.num_visual):
        started = time.perf_counter()
        embeds = model.embed(prompt)
        seen = time.perf_counter()
        prefill = model.prefill(prompt, num_keep, embeds)
        filled = time.perf_counter()
        for token in greedy(model, prompt, prefill, eos_token_ids(folder / "llm"), max_new_tokens):
            tokens.append(token)
            longer = prompter.decode(tokens)
            # A character may need several tokens: wait until it is whole.
            if stream and not longer.endswith("\ufffd"):
                stream(longer[len(text) :])
                text = longer
        ended = time.perf_counter()
    whole = prompter.decode(tokens)
    if stream:
        stream(whole[len(text) :])
    # Prefill gives the first token, and each step one more; the one that ends an answer is not among the tokens.
    steps = min(len(tokens), max_new_tokens - 1)
    return {
        "answer": whole,
        "prompt_tokens": len(prompt.input_ids),
        "new_tokens": len(tokens),
        "stages": [
            {"layer": stage.layer, "kept": kept, "visual": prompt.num_visual}
            for stage, kept in zip(recipe.prune.schedule, num_keep, strict=True)
        ],
        "vision_ms": _milliseconds(seen - started),
        "prefill_ms": _milliseconds(filled - seen),
        "decode_ms_per_token": _milliseconds((ended - filled) / steps) if steps else None,
    }


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)


@contextmanager
def _runtime_errors(num_visual: int) -> Generator[None]:
    """Turn a failure of ONNX Runtime, or a lack of memory, into one line."""
    try:
        yield
    except Exception as error:  # ONNX Runtime's exceptions share no public base class.
        if not isinstance(error, MemoryError) and not type(error).__module__.startswith("onnxruntime"):
            raise
        problem = next(iter(str(error).splitlines()), type(error).__name__)
        if wanted := re.search(r"Failed to allocate memory for requested buffer of size (\d+)", problem):
            problem = f"it needs {int(wanted[1]) / 1e9:.0f} GB at once, which this machine does not give"
        raise CapaError(
            f"ONNX Runtime failed on a prompt of {num_visual} visual tokens ({problem}); use a smaller picture"
        ) from error
