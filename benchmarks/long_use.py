"""Long use: memory and descriptors of a model that stays loaded, and evaluations that lose a worker or a node.

python benchmarks/long_use.py --prompts 1000
python benchmarks/long_use.py --prompts 1000 --seconds 3600 --pause 1
python benchmarks/long_use.py --prompts 0 --questions 200
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

import capa_export

CLI = (sys.executable, str(Path(__file__).parents[1] / "cli.py"))
QUESTIONS = ("How many shapes are blue?", "What color is the star?", "Is there a circle?", "Where is the red square?")
SIDES = (112, 140, 168, 196, 224, 280)
POINTS = 10


def picture(index: int) -> Image.Image:
    """Another size for each of 36 in turn, and other pixels each time."""
    height, width = SIDES[index % len(SIDES)], SIDES[index // len(SIDES) % len(SIDES)]
    return Image.fromarray(np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8))


def standing(pid: int) -> dict[str, int]:
    """What a process holds: resident bytes, open descriptors and threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines())
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - of names alone.
    return {
        "rss_bytes": int(status["VmRSS"].split()[0]) << 10,
        "descriptors": descriptors,
        "threads": int(status["Threads"]),
    }


def resident(bundle: Path, prompts: int, seconds: float, pause: float) -> list[dict[str, float]]:
    """Ask a loaded model so many prompts, and go on until the time is over; what the process held on the way."""
    vlm, started = capa_export.open(bundle).load(), time.monotonic()
    points: list[dict[str, float]] = []
    index, every = 0, max(1, prompts // POINTS)
    while index < prompts or time.monotonic() - started < seconds:
        if index % 7 == 6:
            vlm.answer(QUESTIONS[index % len(QUESTIONS)])
        else:
            vlm.answer(QUESTIONS[index % len(QUESTIONS)], [picture(index)], ratio=(0.5, 0.75, 0.9)[index % 3])
        index += 1
        if index % every == 0 or index == 1:
            point = {"prompts": index, "seconds": round(time.monotonic() - started, 1), **standing(os.getpid())}
            points.append(point)
            print(point, file=sys.stderr, flush=True)
        time.sleep(pause)
    return points


def children(pid: int) -> list[int]:
    """Processes that a process started and that hold a model: multiprocessing's, but for its tracker."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def lines(out: Path) -> list[str]:
    path = out / "answers.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def evaluated(command: list[str], out: Path, kill: Callable[[int], None] | None, after: int) -> dict[str, Any]:
    """Run an evaluation; `kill` is called once with its process when so many lines are written."""
    run = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    held: list[dict[str, int]] = []
    killed = False
    while run.poll() is None:
        count = len(lines(out))
        if kill is not None and not killed and count >= after:
            kill(run.pid)
            killed = True
        if count > 1:
            try:
                held.append(standing(run.pid))
            except (OSError, KeyError):
                break
        time.sleep(0.2)
    _, said = run.communicate()
    half = held[len(held) // 2 :]
    return {
        "exit_code": run.returncode,
        "said": [line for line in said.splitlines() if line.startswith("error: ")],
        "killed": killed,
        "lines": len(lines(out)),
        "driver_second_half": {
            name: [min(one[name] for one in half), max(one[name] for one in half)] for name in (half[0] if half else {})
        },
    }


def agreement(out: Path, undisturbed: Path) -> dict[str, Any]:
    """Whether nothing was lost, nothing counted twice, and every figure is the undisturbed run's."""
    keys = [json.loads(line)["key"] for line in lines(out)[1:]]
    return {
        "answers": len(keys),
        "twice": len(keys) - len(set(keys)),
        "lost": len(set(lines(undisturbed)) - set(lines(out))),
        "same_evaluation": (out / "evaluation.json").read_bytes() == (undisturbed / "evaluation.json").read_bytes(),
    }


@contextmanager
def ray_cluster() -> Iterator[tuple[str, Callable[[int], None]]]:
    """A cluster of two nodes on this machine: its address, and what kills the second."""
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    second = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    try:
        yield cluster.address, lambda _: cluster.remove_node(second, allow_graceful=False)
    finally:
        cluster.shutdown()


def losses(bundle: Path, folder: Path, count: int, *, ray: bool) -> dict[str, Any]:
    """Evaluations of a bundle, undisturbed, with a worker killed, and with a node of a cluster killed."""
    rows: list[dict[str, str]] = []
    for index in range(count):
        picture(index).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "question": QUESTIONS[index % len(QUESTIONS)], "answer": "blue"})
    data = folder / "questions.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    command = [*CLI, "evaluate", str(bundle), "--data", str(data), "--max-new-tokens", "4"]
    workers = [*command, "--workers", "2"]
    found: dict[str, Any] = {"questions": count}
    whole = folder / "whole"
    found["undisturbed"] = evaluated(command, whole, None, 0)

    def kill_worker(pid: int) -> None:
        os.kill(children(pid)[0], signal.SIGKILL)

    out = folder / "worker"
    found["worker_killed"] = [
        evaluated(workers, out, kill_worker, count // 4),
        evaluated(workers, out, kill_worker, count),
        evaluated(workers, out, None, 0),
        agreement(out, whole),
    ]
    if ray:
        out = folder / "node"
        with ray_cluster() as (address, kill_node):
            found["node_killed"] = [
                evaluated([*workers, "--ray", address], out, kill_node, count // 4),
                agreement(out, whole),
            ]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="[default: the tiny model, exported here]")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0, help="that the model stays loaded at least")
    parser.add_argument("--pause", type=float, default=0, help="seconds between prompts")
    parser.add_argument("--questions", type=int, default=0, help="of evaluations that lose a worker or a node")
    parser.add_argument("--no-ray", action="store_true")
    given = parser.parse_args()
    threads, load = os.environ.get("OMP_NUM_THREADS", os.cpu_count()), os.getloadavg()[0]
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{platform.machine()}, {threads} thread(s), load {load:.1f} on {os.cpu_count()} cores, "
        f"onnxruntime {version('onnxruntime')}, Python {platform.python_version()}",
        "command": f"python benchmarks/long_use.py {' '.join(sys.argv[1:])}",
    }
    with TemporaryDirectory() as scratch:
        bundle = given.bundle
        if bundle is None:
            bundle = Path(scratch) / "bundle"
            options = ["-m", "tiny-qwen25vl", "--schedule", "capa@2:0.75/full", "-o", str(bundle)]
            subprocess.run([*CLI, "export", *options], check=True)
        if given.prompts:
            result["resident"] = resident(bundle, given.prompts, given.seconds, given.pause)
        if given.questions:
            (Path(scratch) / "data").mkdir()
            result["losses"] = losses(bundle, Path(scratch) / "data", given.questions, ray=not given.no_ray)
    print(json.dumps(result, indent=2))
