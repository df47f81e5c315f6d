"""Runs this project, in FP32 like its peers, pruning without FFN scales."""

from pathlib import Path
from typing import Any

import numpy as np
from onnx_graphs import session
from serve import Feed, Prefills, main, questions
from subject import opened

from capa_export.export.graphs import write_onnx
from capa_export.model.sidecars import copy_sidecars


def export(checkpoint: Path, out: Path) -> None:
    """Vision tower, prefill and decode."""
    recipe, source = opened(checkpoint)
    write_onnx(source, "fp32", out, prune_layers=[stage.layer for stage in recipe.prune.schedule], scales={})
    copy_sidecars(source.checkpoint, out)


def prefill(_: Path, out: Path, feed: Feed) -> Prefills:
    """The prefill graph with every visual token kept, and with those of the ratio."""
    opened_session = session(out / "llm" / "prefill.onnx")
    names = [entry.name for entry in opened_session.get_inputs()]

    def run(num_keep: np.ndarray) -> np.ndarray:
        values = {**feed, "num_keep": num_keep}
        every = [entry.name for entry in opened_session.get_outputs()]
        return opened_session.run(every, {name: values[name] for name in names})[0]

    return {"dense": lambda: run(feed["num_visual"]), "pruned": lambda: run(feed["num_keep"])}


def answer(checkpoint: Path, out: Path, folder: Path) -> dict[str, Any]:
    """Greedily, through the bundle's graphs."""
    from PIL import Image

    from capa_export.model.generation import eos_token_ids
    from capa_export.model.prompt import Prompter
    from capa_export.run.decoding import greedy
    from capa_export.run.onnx import OnnxModel

    recipe, source = opened(checkpoint)
    prompter = Prompter(checkpoint, checkpoint, source.family, source.dims)
    model, stop = OnnxModel(out, threads=1), eos_token_ids(checkpoint)
    said: dict[str, Any] = {"dense": {"tokens": []}, "pruned": {"tokens": []}}
    for question in questions(folder):
        prompt = prompter(question["question"], [Image.open(folder / question["image"])])
        embeds = model.embed(prompt)
        ratio = float(question["ratio"])
        for variant, removed in (("dense", 0.0), ("pruned", ratio)):
            num_keep = recipe.with_options(ratio=removed).prune.num_keep(prompt.image_lengths)
            run = model.prefill(prompt, num_keep, embeds)
            said[variant]["tokens"].append([token for [token] in greedy(model, [prompt], [run], stop, 4)])
    return said


if __name__ == "__main__":
    main(export=export, prefill=prefill, answer=answer)
