"""The commands at true size: seconds, CPU seconds and peak memory of each, beside a plain copy of the same bytes.

python benchmarks/random_checkpoint.py llava15-7b /tmp/llava15-7b
python benchmarks/real_size.py /tmp/llava15-7b --model llava15 > benchmarks/results/real-size-llava15-7b.json

Needs three times the checkpoint's size of free disk where engines with embedded weights fit the memory, else once.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PREFLIGHT = 3
CAPA_EXPORT = str(Path(sys.executable).with_name("capa-export"))

# Each reads an ONNX file by its path; weights stay mapped, since ONNX Runtime's optimizer would make FP32 copies.
_READERS = {
    "onnx.checker": "import onnx, sys; onnx.checker.check_model(sys.argv[1])",
    "onnxruntime": """
import sys, onnxruntime as ort
options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
options.add_session_config_entry("session.disable_prepacking", "1")
ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
""",
    "tensorrt_rtx parser": """
import sys, tensorrt_rtx as trt
log = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(log)
network = builder.create_network(0)
parser = trt.OnnxParser(network, log)
sys.exit(not parser.parse_from_file(sys.argv[1]))
""",
}
# In a process of its own, as all that imports much: see `measured`.
_SCHEDULE = """
import sys
from capa_export.config.recipe import load_recipe
from capa_export.config.schedule import schedule_text
print(schedule_text(load_recipe(sys.argv[1]).prune.schedule), end="")
"""


def _cold() -> bool:
    """Empty the page cache, where that is allowed."""
    os.sync()
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
        return True
    return False


def measured(command: Sequence[str | Path], *, refusal: int | None = None) -> dict[str, Any]:
    """Run a command to its end, and all of its bytes to the disk; `refusal` is an exit code that is a result too.

    Linux counts into a child's peak what this process had when it began, so this process imports next to nothing.
    """
    load, started = os.getloadavg()[0], time.perf_counter()
    child = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    said = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    os.sync()
    if child.returncode and child.returncode != refusal:
        raise SystemExit(f"{' '.join(map(str, command))}\n{said}")
    return {
        **({"refused": said.strip().splitlines()[-1]} if child.returncode else {}),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        "load_before": round(load, 1),
    }


def machine() -> str:
    """A line on the machine and the libraries that the figures were measured on."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    versions = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "tensorrt-rtx", "triton"))
    return f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB of memory, no GPU, {versions}"


def export(model: str, checkpoint: Path, out: Path, *options: str) -> dict[str, Any]:
    """Export with the recipe's schedule and whole visual FFNs, which need no calibration."""
    schedule = subprocess.check_output([sys.executable, "-c", _SCHEDULE, model], text=True)
    where = ["--model", model, "--checkpoint", checkpoint, "--out", out]
    return measured([CAPA_EXPORT, "export", *where, "--schedule", f"{schedule}/full", *options])


def _engines(bundle: Path, weights: str) -> dict[str, Any]:
    """The whole command, and each engine as the manifest records it."""
    cost = measured([CAPA_EXPORT, "engine", bundle, "--weights", weights], refusal=PREFLIGHT)
    if "refused" in cost:
        return cost
    manifest = json.loads((bundle / "capa_manifest.json").read_text(encoding="utf-8"))
    kept = ("seconds", "peak_memory_bytes", "bytes", "layers", "weight_copies")
    engines = manifest["stages"]["engine/rtx"]["result"]["engines"]
    return {**cost, "engines": {name: {key: row[key] for key in kept} for name, row in engines.items()}}


def _own_bytes(bundle: Path) -> int:
    """Bytes of files that are not links to others."""
    status = [path.stat() for path in bundle.rglob("*") if path.is_file()]
    return sum(one.st_size for one in status if one.st_nlink == 1)


def _sizes(model: str, checkpoint: Path, out: Path) -> dict[str, Any]:
    bundle, linked, shards = out / "bundle", out / "in-place", sorted(checkpoint.glob("*.safetensors"))
    result: dict[str, Any] = {}
    _cold()
    result["copy"] = measured(["cp", *shards, out])
    for path in shards:
        (out / path.name).unlink()
    _cold()
    exported = export(model, checkpoint, bundle)
    result["export fp16"] = {**exported, "over_copy": round(exported["seconds"] / result["copy"]["seconds"], 2)}
    files = {name: bundle / "onnx" / name for name in ("llm/prefill.onnx", "llm/decode.onnx", "visual/model.onnx")}
    result["bytes of llm/model.onnx.data"] = (bundle / "onnx/llm/model.onnx.data").stat().st_size
    result["read by path"] = {
        reader: {name: measured([sys.executable, "-c", code, path]) for name, path in files.items()}
        for reader, code in _READERS.items()
    }
    result["engine --weights external"] = _engines(bundle, "external")
    result["engine --weights embedded"] = _engines(bundle, "embedded")
    _cold()
    result["export bf16 --weights in-place"] = export(
        model, checkpoint, linked, "--precision", "bf16", "--weights", "in-place"
    )
    result["export bf16 --weights in-place"]["bytes_written"] = _own_bytes(linked)
    result["engine --weights external, in place"] = _engines(linked, "external")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="as random_checkpoint.py writes it, in bf16")
    parser.add_argument("--model", default="qwen25vl", help="recipe")
    arguments = parser.parse_args()

    checkpoint = arguments.checkpoint.resolve()
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(),
        "command": f"benchmarks/real_size.py {checkpoint.name} --model {arguments.model}",
        "checkpoint": {
            "architecture": config["architectures"][0],
            "GB": round(sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) / 1e9, 2),
            "page_cache_emptied": _cold(),
        },
    }
    # Beside the checkpoint: hard links need the same disk.
    with TemporaryDirectory(dir=checkpoint.parent, prefix="real-size-") as folder:
        sizes = _sizes(arguments.model, checkpoint, Path(folder))
    print(json.dumps({**result, **sizes}, indent=2))


if __name__ == "__main__":
    main()
