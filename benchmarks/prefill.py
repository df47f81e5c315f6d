"""Prefill latency of the decoder on ONNX Runtime: dense, pruned, and with FFN scales, side by side in one run.

python benchmarks/random_checkpoint.py qwen25vl-1024 /tmp/qwen25vl-1024
python benchmarks/prefill.py /tmp/qwen25vl-1024 --visual-tokens 1024
"""

import argparse
import json
import platform
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime

from capa_export.config.recipe import load_recipe
from capa_export.config.schedule import kept_tokens
from capa_export.export.graphs import DENSE, write_onnx
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import qwen25vl
from capa_export.model.source import Source
from capa_export.plan.flops import flops

_TEXT = 48


def _pruning_seconds(profile: Path) -> float:
    """Time in the nodes that prune; ONNX Runtime names those of an inlined function anew, without a path."""
    events = json.loads(profile.read_text(encoding="utf-8"))
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    named = ("model/", "lm_head/")
    ours = [event for event in nodes if "/prune/" in event["name"] or not event["name"].startswith(named)]
    assert {"Gemm", "Softmax", "CumSum"} <= {event["args"]["op_name"] for event in ours}, "some nodes are missing"
    return sum(event["dur"] for event in ours) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--visual-tokens", type=int, default=1024)
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    recipe = load_recipe("qwen25vl")
    layer = recipe.prune.schedule[0].layer
    source = Source.of(open_checkpoint(arguments.checkpoint), qwen25vl)
    dims = source.dims.decoder
    linear = [index for index in recipe.ffn.paper_layers if index < dims.num_layers]
    visual, kept = arguments.visual_tokens, kept_tokens(arguments.visual_tokens, arguments.ratio)
    rng = np.random.default_rng(0)
    total = visual + _TEXT
    feed = {
        "inputs_embeds": rng.standard_normal((1, total, dims.hidden_size), dtype=np.float32),
        "position_ids": np.tile(np.arange(total), (3, 1)),
        "text_positions": np.r_[0:4, visual + 4 : total],
    }
    with TemporaryDirectory() as folder:
        scales = {index: np.ones(dims.hidden_size) for index in linear}
        write_onnx(source, "fp32", Path(folder), prune_layers=(layer,), scales=scales, dense=True)

        def session(file: str, *, profile: bool = False) -> onnxruntime.InferenceSession:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = arguments.threads
            options.enable_profiling = profile
            options.profile_file_prefix = f"{folder}/profile"
            return onnxruntime.InferenceSession(f"{folder}/llm/{file}", options, providers=["CPUExecutionProvider"])

        plain, capa = session(DENSE), session("prefill.onnx")
        variants = {
            "dense": (plain, visual, flops(dims, num_visual=visual, num_text=_TEXT, schedule=[], linear_layers=[])),
            "pruned": (
                plain,
                kept,
                flops(dims, num_visual=visual, num_text=_TEXT, schedule=[(layer, kept)], linear_layers=[]),
            ),
            "pruned + FFN scales": (
                capa,
                kept,
                flops(dims, num_visual=visual, num_text=_TEXT, schedule=[(layer, kept)], linear_layers=linear),
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for round_ in range(arguments.rounds + 1):
            for name, (run, num_keep, _) in variants.items():
                inputs = {
                    entry.name: ({**feed, "num_keep": np.array([num_keep])})[entry.name] for entry in run.get_inputs()
                }
                started = time.perf_counter()
                run.run(["logits"], inputs)
                if round_:
                    seconds[name].append(time.perf_counter() - started)
        # Without FFN scales, the functions that prune are the only ones.
        profiled = session(DENSE, profile=True)
        profiled.run(["logits"], {**feed, "num_keep": np.array([kept])})
        pruning = _pruning_seconds(Path(profiled.end_profiling()))
    dense = median(seconds["dense"])
    rows = {
        name: {
            "milliseconds": round(median(times) * 1e3, 1),
            "speedup": round(dense / median(times), 3),
            "flops_ratio": round(variants[name][2].ratio, 3),
            "gflops": round(variants[name][2].capa.total / 1e9, 1),
        }
        for name, times in seconds.items()
    }
    print(
        json.dumps(
            {
                "date": datetime.now(timezone.utc).date().isoformat(),
                "machine": f"{platform.machine()}, {arguments.threads} thread(s), "
                f"onnxruntime {onnxruntime.__version__}",
                "decoder": f"hidden {dims.hidden_size}, {dims.num_layers} layers, FFN {dims.intermediate_size}",
                "tokens": {"visual": visual, "kept": kept, "text": _TEXT},
                "prefill": rows,
                "scoring_and_gathering": {
                    "milliseconds": round(pruning * 1e3, 1),
                    "of_dense": f"{pruning / dense:.2%}",
                },
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
