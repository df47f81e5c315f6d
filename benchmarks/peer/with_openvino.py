"""OpenVINO GenAI on what optimum-intel exports, with and without CDPruner."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from serve import DECODE, THREADS, Ask, Feed, Prefills, main, now, questions, weights_of
from transformers4 import downgraded

_PRUNES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families with CDPruner; the others' pipelines take its ratio and ignore it."""
_CPU = {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": "f32"}


def export(checkpoint: Path, out: Path) -> None:
    """Export as `optimum-cli export openvino` does."""
    import torch

    # The package index's torchvision is built for CUDA and looks for two operators that a CPU torch lacks.
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from optimum.commands.optimum_cli import main as optimum

    sys.argv = ["optimum-cli", "export", "openvino", "-m", str(downgraded(checkpoint, out))]
    sys.argv += ["--task", "image-text-to-text", "--weight-format", weights_of(out), str(out)]
    optimum()


def prefill(checkpoint: Path, out: Path, feed: Feed) -> Prefills:
    """The language model, on the whole prompt and on what CDPruner would leave of it."""
    import openvino

    compiled = openvino.Core().compile_model(out / "openvino_language_model.xml", "CPU", _CPU)
    request, filled = compiled.create_infer_request(), compiled.create_infer_request()
    names = {name for entry in compiled.inputs for name in entry.names}
    positions = feed["position_ids"]

    def inferred(request: openvino.InferRequest, rows: np.ndarray, positions: np.ndarray, num_past: int) -> np.ndarray:
        inputs = {
            "inputs_embeds": feed["inputs_embeds"][:, rows],
            "attention_mask": np.ones((1, num_past + len(rows)), np.int64),
            "position_ids": positions[:, None] if len(positions) > 1 else positions,
            "beam_idx": np.zeros(1, np.int32),
        }
        return request.infer({name: inputs[name] for name in inputs if name in names})["logits"][0, -1]

    def run(rows: np.ndarray) -> np.ndarray:
        request.reset_state()
        return inferred(request, rows, positions[:, rows], 0)

    def step() -> np.ndarray:
        return inferred(filled, every[-1:], positions[:, -1:] + 1, next(lengths))

    every = np.arange(feed["inputs_embeds"].shape[1])
    inferred(filled, every, positions, 0)
    # It keeps the tokens of steps.
    lengths = itertools.count(len(every))
    if json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["model_type"] not in _PRUNES:
        return {"dense": lambda: run(every), f"{DECODE}dense": step}
    text = feed["text_positions"]
    kept = np.sort(np.r_[text, np.setdiff1d(every, text)[: int(feed["num_keep"][0])]])
    return {"dense": lambda: run(every), "pruned": lambda: run(kept), f"{DECODE}dense": step}


def answer(_: Path, out: Path, folder: Path) -> dict[str, Any]:
    """`VLMPipeline`; CDPruner takes the percentage to remove."""
    import openvino
    import openvino_genai
    from PIL import Image

    pipeline = openvino_genai.VLMPipeline(out, "CPU", **_CPU)
    asked = questions(folder)
    said: dict[str, Any] = {}
    for variant, removed in (("dense", 0), ("pruned", round(100 * float(asked[0]["ratio"])))):
        config = openvino_genai.GenerationConfig(max_new_tokens=4, do_sample=False, pruning_ratio=removed)
        texts, prompt_tokens, first_token = [], [], []
        for question in asked:
            picture = openvino.Tensor(np.asarray(Image.open(folder / question["image"]))[None])
            result = pipeline.generate(question["question"], images=[picture], generation_config=config)
            texts.append(result.texts[0])
            prompt_tokens.append(result.perf_metrics.get_num_input_tokens())
            first_token.append(result.perf_metrics.get_ttft().mean)
        said[variant] = {
            "texts": texts,
            "prompt_tokens": float(np.median(prompt_tokens)),
            "first_token_ms": round(float(np.median(first_token)), 2),
        }
    return said


def ask(_: Path, out: Path, variant: str) -> Ask:
    """`VLMPipeline`; the variant is the percentage that CDPruner removes."""
    import openvino
    import openvino_genai
    from PIL import Image

    pipeline = openvino_genai.VLMPipeline(out, "CPU", **_CPU)

    class Clock(openvino_genai.StreamerBase):
        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def write(self, token: int | list[int]) -> openvino_genai.StreamingStatus:
            self.times += [now()] * (len(token) if isinstance(token, list) else 1)
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def run(*, picture: str, question: str, tokens: int, exact: bool) -> dict[str, Any]:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=tokens, do_sample=False, ignore_eos=exact, pruning_ratio=int(variant)
        )
        clock, began = Clock(), now()
        image = openvino.Tensor(np.asarray(Image.open(picture).convert("RGB"))[None])
        opened = now()
        result = pipeline.generate(question, images=[image], generation_config=config, streamer=clock)
        metrics, milliseconds = result.perf_metrics, [1e3 * (moment - began) for moment in clock.times]
        return {
            "text": result.texts[0],
            "milliseconds": milliseconds,
            "prompt_tokens": metrics.get_num_input_tokens(),
            "file": 1e3 * (opened - began),
            # With its processor; it tells its share of the time until the first token.
            "tower": milliseconds[0] * metrics.get_prepare_embeddings_duration().mean / metrics.get_ttft().mean,
        }

    return run


if __name__ == "__main__":
    main(export=export, prefill=prefill, answer=answer, ask=ask)
