"""Measures how prefill grows with the visual tokens: latency, memory and KV cache, dense and with CAPA.

python benchmarks/random_checkpoint.py qwen25vl-512 /tmp/qwen25vl-512
python benchmarks/growth.py /tmp/qwen25vl-512
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from capa_export.base.dims import DecoderDims
from capa_export.base.machine import measured
from capa_export.config.recipe import load_recipe
from capa_export.export.graphs import DENSE, write_onnx
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Prompt
from capa_export.model.source import Source
from capa_export.plan.flops import flops, kv_cache
from capa_export.run.onnx import OnnxModel

_TEXT = 48
_RECIPE = load_recipe("qwen25vl")


def _prompt(num_visual: int) -> Prompt:
    is_visual = np.zeros(num_visual + _TEXT, bool)
    is_visual[4 : 4 + num_visual] = True
    positions = np.tile(np.arange(len(is_visual)), (3, 1))
    return Prompt(is_visual.astype(np.int64), is_visual, (), positions, len(is_visual))


def _one(folder: Path, variant: str, num_visual: int, hidden_size: int, rounds: int) -> dict[str, Any]:
    """Runs in a process of its own, whose peak memory is then the variant's."""
    prompt = _prompt(num_visual)
    shape = (1, len(prompt.input_ids), hidden_size)
    embeds = {"inputs_embeds": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
    model = OnnxModel(folder, prefill="prefill.onnx" if variant == "capa" else DENSE, threads=0)
    keep = _RECIPE.prune.num_keep([num_visual]) if variant == "capa" else [num_visual]
    seconds: list[float] = []
    with measured() as cost:
        for _ in range(rounds + 1):
            started = time.perf_counter()
            run = model.prefill(prompt, keep, embeds)
            seconds.append(time.perf_counter() - started)
    cache = sum(tensor.nbytes for tensor in run.cache.tensors.values())
    # The first run opens the session, unless it is the only one.
    return {
        "ms": round(min(seconds[1:] or seconds) * 1e3, 1),
        "peak_MB": cost.peak_memory_bytes >> 20,
        "kv_MB": round(cache / 2**20, 1),
    }


def _row(dims: DecoderDims, num_visual: int, linear: list[int]) -> dict[str, Any]:
    [kept] = _RECIPE.prune.num_keep([num_visual])
    schedule = [(_RECIPE.prune.schedule[0].layer, kept)]
    sizes: dict[str, Any] = {"num_visual": num_visual, "num_text": _TEXT, "schedule": schedule}
    cache = kv_cache(dims, **sizes)
    return {
        "flops_ratio": round(flops(dims, **sizes, linear_layers=linear).ratio, 2),
        "kv_ratio": round(cache.dense_bytes / cache.capa_bytes, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--visual-tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        folder, variant, *numbers = arguments.one
        print(json.dumps(_one(Path(folder), variant, *map(int, numbers))))
        return
    source = Source.of(open_checkpoint(arguments.checkpoint), qwen25vl)
    dims = source.dims.decoder
    linear = [layer for layer in _RECIPE.ffn.paper_layers if layer < dims.num_layers]
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        scales = {layer: np.ones(dims.hidden_size) for layer in linear}
        layers = [stage.layer for stage in _RECIPE.prune.schedule]
        write_onnx(source, "fp32", Path(folder), prune_layers=layers, scales=scales, dense=True)
        for num_visual in arguments.visual_tokens:
            rounds = max(0, min(5, 4096 // num_visual))
            row: dict[str, Any] = {"visual_tokens": num_visual}
            for variant in ("dense", "capa"):
                sizes = [str(number) for number in (num_visual, dims.hidden_size, rounds)]
                command = [sys.executable, __file__, arguments.checkpoint, "--one", folder, variant, *sizes]
                row[variant] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            row["speedup"] = round(row["dense"]["ms"] / row["capa"]["ms"], 2)
            rows.append(row | _row(dims, num_visual, linear))
            print(json.dumps(rows[-1]), file=sys.stderr)
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, onnxruntime {version('onnxruntime')}, FP32",
        "decoder": f"hidden {dims.hidden_size}, {dims.num_layers} layers, FFN {dims.intermediate_size}",
        "text_tokens": _TEXT,
        "rows": rows,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
