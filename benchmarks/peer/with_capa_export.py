"""Runs this project, in FP32 like its peers, in FP16, or with INT4 weights, pruning without FFN scales."""

from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from onnx_graphs import session
from serve import DECODE, THREADS, Ask, Feed, Prefills, main, now, quantized, questions, weights_of
from subject import opened

from capa_export.config.quantization import parse_quantization
from capa_export.export.graphs import write_onnx
from capa_export.graph.contract import INPUTS_EMBEDS, PAST_LENGTHS, POSITION_IDS, past_of
from capa_export.model.sidecars import copy_sidecars
from capa_export.run.onnx import NUMPY_TYPES

_EXACT = {"qdq_matmulnbits_accuracy_level": "1"}
"""As `validate` has it: what enters INT4 products is not rounded."""
_ROUNDED = {"qdq_matmulnbits_accuracy_level": "4"}
"""ONNX Runtime's own choice, as `run` has it, and the peers'."""


def export(checkpoint: Path, out: Path) -> None:
    """Vision tower, prefill and decode."""
    recipe, source = opened(checkpoint, "none")
    precision = "fp16" if weights_of(out) == "fp16" else "fp32"
    if weights_of(out) == "int4":
        dims = source.dims.decoder
        group = gcd(128, dims.hidden_size, dims.intermediate_size, dims.num_heads * dims.head_dim)
        # Rounded to nearest, as the peers do it; a checkpoint of four bits keeps them.
        recipe, source = opened(checkpoint, None if quantized(checkpoint) else parse_quantization(f"int4:{group}/rtn"))
    write_onnx(source, precision, out, prune_layers=[stage.layer for stage in recipe.prune.schedule], scales={})
    copy_sidecars(source.checkpoint, out)


def prefill(_: Path, out: Path, feed: Feed) -> Prefills:
    """The prefill graph with every visual token kept and with those of the ratio, and a step of decode behind each."""
    runs = _runs(out, feed, _EXACT)
    if weights_of(out) != "int4":
        return runs
    rounded = _runs(out, feed, _ROUNDED)
    return {**runs, **{f"{name}, inputs rounded": run for name, run in rounded.items()}}


def _runs(out: Path, feed: Feed, settings: Mapping[str, str]) -> Prefills:
    fill, step = (session(out / "llm" / f"{name}.onnx", **settings) for name in ("prefill", "decode"))

    def run(opened_session: Any, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {
            entry.name: values[entry.name].astype(NUMPY_TYPES[entry.type]) for entry in opened_session.get_inputs()
        }
        names = [entry.name for entry in opened_session.get_outputs()]
        return dict(zip(names, opened_session.run(names, given), strict=True))

    def filled(num_keep: np.ndarray) -> dict[str, np.ndarray]:
        return run(fill, {**feed, "num_keep": num_keep})

    def behind(num_keep: np.ndarray) -> dict[str, np.ndarray]:
        """Decode's inputs."""
        result = filled(num_keep)
        lengths = [len(feed["text_positions"]) + int(count) for count in (feed["num_visual"][0], num_keep[0])]
        return {
            **past_of(result),
            INPUTS_EMBEDS: feed[INPUTS_EMBEDS][:, -1:],
            POSITION_IDS: feed[POSITION_IDS][:, None, -1:] + 1,
            PAST_LENGTHS: np.array(lengths)[:, None],
        }

    dense, pruned = (behind(feed[name]) for name in ("num_visual", "num_keep"))
    return {
        "dense": lambda: filled(feed["num_visual"])["logits"][0],
        "pruned": lambda: filled(feed["num_keep"])["logits"][0],
        f"{DECODE}dense": lambda: run(step, dense)["logits"][0],
        f"{DECODE}pruned": lambda: run(step, pruned)["logits"][0],
    }


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
    # As `run` opens it, but now, and with as many threads as the peers have.
    model.runtime = OnnxModel(out / "onnx", threads=THREADS, exact=False)

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
