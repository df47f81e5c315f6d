"""Export and engine builds at true size: seconds and peak memory, beside a plain copy of the same bytes.

python benchmarks/random_checkpoint.py qwen25vl-7b /tmp/qwen25vl-7b
python benchmarks/real_size.py /tmp/qwen25vl-7b --out /tmp/real-size
"""

import argparse
import json
import os
import platform
import shutil
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from capa_export.checkpoint import open_checkpoint
from capa_export.engine import build_engine
from capa_export.export import Source, write_onnx
from capa_export.families import load_family
from capa_export.measure import measured
from capa_export.recipe import load_recipe
from capa_export.target import load_target


def _cold() -> bool:
    """Empty the page cache, where that is allowed."""
    os.sync()
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--model", default="qwen25vl")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written; emptied afterwards")
    parser.add_argument("--weights", choices=["embedded", "external"], default="external")
    arguments = parser.parse_args()

    recipe = load_recipe(arguments.model)
    source = Source.of(open_checkpoint(arguments.checkpoint), load_family(recipe.family))
    layers = tuple(stage.layer for stage in recipe.prune.schedule)
    arguments.out.mkdir(parents=True)
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, tensorrt-rtx {version('tensorrt-rtx')}",
        "checkpoint": {
            "parameters": source.checkpoint.num_parameters,
            "GB": round(source.checkpoint.nbytes / 1e9, 2),
            "page_cache_emptied": _cold(),
        },
    }
    with measured() as copy:
        for path in source.checkpoint.files:
            shutil.copyfile(path, arguments.out / path.name)
        os.sync()
    for path in source.checkpoint.files:
        (arguments.out / path.name).unlink()
    _cold()
    with measured() as export:
        write_onnx(source, "fp16", arguments.out / "onnx", prune_layers=layers, scales={})
        os.sync()
    result["copy"] = copy.as_dict()
    result["export_fp16"] = {**export.as_dict(), "over_copy": round(export.seconds / copy.seconds, 3)}
    target, engines = load_target("rtx"), {}
    for name in ("visual/model", "llm/prefill", "llm/decode"):
        values = target.require_engine().values["num_keep"].repeated(len(layers))
        built = build_engine(
            arguments.out / "onnx" / f"{name}.onnx",
            arguments.out / "engines" / f"{name}.engine",
            dims={},
            shape_inputs={"num_keep": values} if name == "llm/prefill" else {},
            target=target,
            weights=arguments.weights,
        )
        engines[name] = {
            "seconds": round(built.seconds, 1),
            "peak_memory_bytes": built.peak_rss_bytes,
            "plan_bytes": built.bytes,
            "layers": built.num_layers,
            "weight_copies": len(built.weight_copies),
        }
    result[f"engines_{arguments.weights}"] = engines
    shutil.rmtree(arguments.out)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
