"""Runs this project, in FP32 like its peers, pruning without FFN scales."""

from pathlib import Path
from typing import Any

import numpy as np
from onnx_graphs import session
from serve import THREADS, Ask, Feed, Prefills, main, now, questions
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


def ask(_: Path, out: Path, variant: str) -> Ask:  # noqa: ARG001 - the bundle says it.
    """A bundle, as `capa_export.open(...).load()` loads it."""
    from types import SimpleNamespace

    import capa_export
    from capa_export.data.picture_files import open_picture
    from capa_export.model.generation import GenerationOptions
    from capa_export.model.prompt import Turn
    from capa_export.run import answer as answering
    from capa_export.run.onnx import OnnxModel

    # Its parts by the clock of the others.
    answering.time = SimpleNamespace(perf_counter=now)
    model = capa_export.open(out).load()
    # Loaded when the first prompt is there, and then with as many threads as ONNX Runtime likes.
    model.runtime = OnnxModel(out / "onnx", threads=THREADS)

    def run(*, picture: str, question: str, tokens: int, exact: bool) -> dict[str, Any]:
        options = GenerationOptions(greedy=True, repetition_penalty=1.0, max_new_tokens=tokens)
        began = now()
        image = open_picture(Path(picture))
        opened = now()
        answers = model.answers([[Turn("user", [image, question])]], options=options)
        times: list[float] = []
        while True:
            try:
                next(answers)
            except StopIteration as end:
                [facts] = end.value
                break
            times.append(now())
        assert not exact or facts["new_tokens"] == tokens, f"ended after {facts['new_tokens']} tokens"
        return {
            "text": facts["answer"],
            "milliseconds": [1e3 * (at - began) for at in times[: max(facts["new_tokens"], 1)]],
            "file": 1e3 * (opened - began),
            "processor": facts["processor_ms"],
            "tower": facts["vision_ms"],
            "prefill": facts["prefill_ms"],
        }

    return run


if __name__ == "__main__":
    main(export=export, prefill=prefill, answer=answer, ask=ask)
