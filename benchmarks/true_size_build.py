"""The whole `build` at true size, as a new user runs it: seconds, peak memory and disk of each stage, and the verdict.

python benchmarks/random_checkpoint.py qwen25vl-7b /tmp/qwen --tokenizer qwen3/package/models
python benchmarks/true_size_build.py /tmp/qwen --out /tmp/bundle > benchmarks/results/true-size-build-qwen25vl-7b.json
python benchmarks/true_size_build.py /tmp/qwen --out /tmp/int4 --quantize int4 > ...

What it does not know goes to `build`. Needs free disk for the bundle, which is as large as the checkpoint in FP16.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageDraw

CAPA_EXPORT = str(Path(sys.executable).with_name("capa-export"))
_COLORS = ("red", "green", "blue", "orange", "purple", "black")


def pictures(folder: Path, count: int) -> None:
    """Draw a few shapes on each, in the size of a small photo."""
    for index in range(count):
        picture = Image.new("RGB", (336, 252), "white")
        draw = ImageDraw.Draw(picture)
        for shape in range(4):
            left, top = 20 + 75 * shape, 30 + 40 * ((index + shape) % 4)
            draw.ellipse((left, top, left + 50, top + 50), fill=_COLORS[(index + shape) % len(_COLORS)])
        picture.save(folder / f"{index}.jpg")


class Watch:
    """Peak of what a command's process tree holds in memory, and of what it takes of the disk."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self.folder = pid, folder
        self.anonymous, self.disk = 0, 0
        self._free = shutil.disk_usage(folder).free
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, with the peaks complete."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.25):
            self.anonymous = max(self.anonymous, sum(map(_anonymous, _family(self.pid))))
            self.disk = max(self.disk, self._free - shutil.disk_usage(self.folder).free)


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in _family(int(child)))]


def _anonymous(pid: int) -> int:
    """Bytes that the process holds and that no file could give back."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def run(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a command to its end."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        watch = Watch(process.pid, folder)
        watch.start()
        out, err = process.communicate()
        watch.stop()
    return {
        "command": " ".join(["capa-export", *command[1:]]),
        "exit_code": process.returncode,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_anonymous_bytes": watch.anonymous,
        "peak_disk_bytes": watch.disk,
        "stdout": out.splitlines(),
        "stderr": err.splitlines(),
    }


def stages(bundle: Path) -> dict[str, Any]:
    """Each finished stage's entry in the manifest, and the bytes that it left."""
    if not (bundle / "capa_manifest.json").exists():
        return {}
    manifest = json.loads((bundle / "capa_manifest.json").read_text(encoding="utf-8"))
    return {
        name: {
            "seconds": record["seconds"],
            "peak_memory_bytes": record["peak_memory_bytes"],
            "bytes": sum(path.stat().st_size for file in record["files"] if (path := bundle / file).is_file()),
        }
        for name, record in manifest["stages"].items()
    }


def main() -> None:
    """Build, then ask the bundle one question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=2, help="Prompts of calibration and of validation.")
    arguments, options = parser.parse_known_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        pictures(Path(folder), 4)
        count = str(arguments.samples)
        build = [CAPA_EXPORT, "build", str(arguments.checkpoint), "--images", folder, "--ratio", "0.75"]
        build += ["--samples", count, "--validation-samples", count]
        # The weights are random, and keep no answer.
        build += ["--accept-method-loss", *options]
        built = run([*build, "--out", str(arguments.out)], arguments.out.parent)
        ask = [CAPA_EXPORT, "run", str(arguments.out), "--image", f"{folder}/0.jpg", "--prompt", "What is this?"]
        asked = run([*ask, "--max-new-tokens", "2"], arguments.out.parent)
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB of memory, "
        f"torch {version('torch')}, onnxruntime {version('onnxruntime')}, tensorrt-rtx {version('tensorrt-rtx')}",
        "command": " ".join(["benchmarks/true_size_build.py", arguments.checkpoint.name, *sys.argv[2:]]),
        "checkpoint_bytes": sum(path.stat().st_size for path in arguments.checkpoint.iterdir()),
        "build": built,
        "stages": stages(arguments.out),
        "run": asked,
    }
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
