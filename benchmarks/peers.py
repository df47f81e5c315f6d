"""Side by side with the peers: what they export, what it costs, whether TensorRT-RTX parses it, speed and accuracy.

python benchmarks/peers.py --checkpoint graphs/checkpoints/tiny-qwen25vl --work /tmp/peers \
    --out benchmarks/results/2026-11-21-peers

Each peer gets a virtual environment under --work, made once. Every step leaves its result there, so that an interrupted
run goes on where it stopped; --fresh measures again. Prefills take turns, one at a time, on one thread each.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from capa_export.bundle.store import file_digest

sys.path.insert(0, str(Path(__file__).parent / "peer"))

from processes import Worker, environment, measured_run
from subject import opened, write_feed, write_questions
from table import markdown

_ADAPTERS = Path(__file__).parent / "peer"
_MOST_ROUNDS = 25


@dataclass(frozen=True)
class Peer:
    """One exporter or runtime."""

    name: str
    adapter: str
    packages: tuple[str, ...]
    """Whose versions count; the first is the peer itself."""
    requirements: tuple[str, ...] = ()
    """Requirements of the peer's environment; it runs in this one where there are none."""
    exports: bool = True
    weights: str = ""
    """`int4` or `fp16`; FP32 where there is nothing."""
    scope: str = "yes"
    """The table's entry on what it exports."""


def _same(*packages: str) -> tuple[str, ...]:
    """The versions that this project itself runs on: what is compared is not the libraries below."""
    return tuple(f"{package}=={version(package).partition('+')[0]}" for package in packages)


_OURS = ("with_capa_export.py", ("capa-export", "onnxruntime"))
_MOBIUS = (
    "with_mobius.py",
    ("mobius-onnx", "onnxruntime"),
    ("mobius-onnx==0.1.0", *_same("torch", "transformers", "onnxruntime")),
)
_GENAI = (
    "with_genai.py",
    ("onnxruntime-genai", "onnxruntime"),
    ("onnxruntime-genai==0.18.0", *_same("torch", "transformers", "onnxruntime", "onnx-ir")),
)
_OPENVINO = (
    "with_openvino.py",
    ("openvino-genai", "optimum-intel", "transformers"),
    # transformers: optimum-intel 2.2 takes Qwen2.5-VL from no later one.
    ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0", "transformers==4.57.6", *_same("torch")),
)
PEERS = (
    Peer("capa-export", *_OURS),
    Peer("capa-export, FP16", *_OURS, weights="fp16"),
    Peer("capa-export, INT4", *_OURS, weights="int4"),
    Peer("HF eager", "with_hf_eager.py", ("transformers", "torch"), exports=False),
    Peer("mobius-onnx", *_MOBIUS),
    Peer("mobius-onnx, INT4", *_MOBIUS, weights="int4"),
    Peer("onnxruntime-genai builder", *_GENAI, scope="decoder only"),
    Peer("onnxruntime-genai builder, INT4", *_GENAI, weights="int4", scope="decoder only"),
    Peer(
        "optimum-onnx",
        "with_optimum.py",
        ("optimum-onnx", "transformers"),
        ("optimum-onnx[onnxruntime]==0.1.0", *_same("torch")),
    ),
    Peer("OpenVINO GenAI", *_OPENVINO),
    Peer("OpenVINO GenAI, INT4", *_OPENVINO, weights="int4"),
)


@dataclass(frozen=True)
class PeerSteps:
    """The steps of one checkpoint, and the folder of their results."""

    checkpoint: Path
    folder: Path
    timeout: float

    def step(self, name: str, make: Callable[[], Any]) -> Any:
        """The step's result; made now if it is not there."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            print(f"{self.checkpoint.name}: {name}", file=sys.stderr, flush=True)
            content = json.dumps(make(), indent=1)
            path.write_text(content, encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def exported(self, peer: Peer) -> Path:
        name = Path(peer.adapter).stem.removeprefix("with_")
        return self.folder / (f"{name}-{peer.weights}" if peer.weights else name)

    def command(self, python: str, peer: Peer, verb: str, *paths: Path) -> list[str]:
        """An adapter's command line."""
        adapter = str(_ADAPTERS / peer.adapter)
        return [python, adapter, verb, str(self.checkpoint), str(self.exported(peer)), *map(str, paths)]

    @property
    def feed(self) -> Path:
        return self.folder / "feed.npz"

    @property
    def questions(self) -> Path:
        return self.folder / "questions"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True, help="environments, exports and logs")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.json and OUT.md")
    parser.add_argument("--peers", nargs="+", choices=[peer.name for peer in PEERS], help="default: all of them")
    parser.add_argument("--visual-tokens", type=int, default=1024, help="of the prompt whose prefill is timed")
    parser.add_argument("--ratio", type=float, default=0.75, help="fraction of visual tokens removed")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--timeout", type=float, default=300, help="seconds for an export, or for the answers")
    parser.add_argument("--prefill-seconds", type=float, default=60, help="to spend on a checkpoint's prefills")
    parser.add_argument("--rounds", type=int, default=3, help="prefills of each variant, however long they take")
    parser.add_argument("--fresh", action="store_true", help="measure again; environments stay")
    arguments = parser.parse_args()

    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    peers = [peer for peer in PEERS if not arguments.peers or peer.name in (PEERS[0].name, *arguments.peers)]
    pythons = {peer.name: _environment(peer, work) for peer in peers}
    results = []
    for checkpoint in arguments.checkpoint:
        folder = work / "runs" / f"{checkpoint.name}-{_digest(checkpoint, arguments)}"
        if arguments.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        results.append(_measure(PeerSteps(checkpoint.resolve(), folder, arguments.timeout), peers, pythons, arguments))
    report = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"tensorrt-rtx {version('tensorrt-rtx')}",
        "command": _command(arguments),
        "ratio": arguments.ratio,
        "checkpoints": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_name(arguments.out.name + ".json").write_text(
        json.dumps(report, indent=1) + "\n", encoding="utf-8"
    )
    text = markdown(report)
    arguments.out.with_name(arguments.out.name + ".md").write_text(text, encoding="utf-8")
    print(text)


def _command(arguments: argparse.Namespace) -> str:
    """The command line, without this machine's folders."""
    words = ["python benchmarks/peers.py --checkpoint", *(path.name for path in arguments.checkpoint)]
    if arguments.peers:
        words += ["--peers", *(json.dumps(name) for name in arguments.peers)]
    for option in ("visual_tokens", "ratio", "questions", "prefill_seconds", "rounds"):
        words += ["--" + option.replace("_", "-"), f"{getattr(arguments, option):g}"]
    return " ".join(words)


def _environment(peer: Peer, work: Path) -> tuple[str, str | None]:
    """The peer's interpreter, and why it has none."""
    if not peer.requirements:
        return sys.executable, None
    name = Path(peer.adapter).stem.removeprefix("with_")
    (work / "venvs").mkdir(exist_ok=True)
    print(f"environment: {peer.name}", file=sys.stderr, flush=True)
    python, error = environment(
        work / "venvs" / name, sys.executable, peer.requirements, work / "venvs" / f"{name}.log"
    )
    return str(python), error


def _digest(checkpoint: Path, arguments: argparse.Namespace) -> str:
    """Digest of all that a result depends on, this project's own code apart."""
    digest = hashlib.sha256(repr((arguments.visual_tokens, arguments.ratio, arguments.questions)).encode())
    for path in sorted([*checkpoint.iterdir(), *_ADAPTERS.glob("*.py")]):
        if path.is_file() and path.name != "table.py":
            digest.update(file_digest(path).encode())
    return digest.hexdigest()[:8]


def _measure(
    run: PeerSteps, peers: Sequence[Peer], pythons: dict[str, tuple[str, str | None]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Every step of every peer on one checkpoint."""
    recipe, source = opened(run.checkpoint)
    tokens = write_feed(source, run.feed, visual_tokens=arguments.visual_tokens, ratio=arguments.ratio)
    questions = run.step(
        "questions",
        lambda: write_questions(recipe, source, run.questions, count=arguments.questions, ratio=arguments.ratio),
    )
    rows = {peer.name: _row(run, peer, *pythons[peer.name], questions) for peer in peers}
    commands = {
        peer.name: run.command(pythons[peer.name][0], peer, "prefill", run.feed)
        for peer in peers
        if rows[peer.name].get("export", {}).get("error") is None
    }
    name = "prefill of " + ", ".join(commands)
    prefills = run.step(name, lambda: _prefills(run, commands, arguments.prefill_seconds, arguments.rounds))
    for name, prefill in prefills.items():
        rows[name]["prefill"] = prefill
    return {
        "checkpoint": run.checkpoint.name,
        "family": recipe.family,
        "decoder": f"hidden {source.dims.decoder.hidden_size}, {source.dims.decoder.num_layers} layers",
        "parameters": source.checkpoint.num_parameters,
        "prune_layer": recipe.prune.schedule[0].layer,
        "tokens": tokens,
        "questions": len(questions),
        "peers": rows,
    }


def _row(
    run: PeerSteps, peer: Peer, python: str, missing: str | None, questions: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """All steps of one peer but prefill."""
    row: dict[str, Any] = {"installs": missing is None, "scope": peer.scope}
    if missing is not None:
        return row | {"export": {"error": missing}}
    row["versions"] = run.step(f"{peer.name} versions", lambda: _versions(python, peer.packages))
    if peer.exports:
        row["export"] = run.step(f"{peer.name} export", lambda: _export(run, peer, python))
        if row["export"]["error"] is not None:
            return row
        row["tensorrt_rtx"] = run.step(f"{peer.name} parse", lambda: _parse(run, peer))
    if questions:
        row["answers"] = run.step(f"{peer.name} answers", lambda: _answers(run, peer, python, questions))
    return row


def _versions(python: str, packages: Sequence[str]) -> dict[str, str]:
    code = "import json, sys; from importlib.metadata import version; print(json.dumps([*map(version, sys.argv[1:])]))"
    found = subprocess.run([python, "-c", code, *packages], capture_output=True, check=True).stdout
    return dict(zip(packages, json.loads(found), strict=True))


def _export(run: PeerSteps, peer: Peer, python: str) -> dict[str, Any]:
    out = run.exported(peer)
    shutil.rmtree(out, ignore_errors=True)
    outcome = measured_run(run.command(python, peer, "export"), run.log(f"{peer.name} export"), run.timeout)
    outcome.pop("stdout")
    return outcome | {"bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file())}


def _parse(run: PeerSteps, peer: Peer) -> dict[str, str | None]:
    """ONNX file -> the parser's first error."""
    out, found = run.exported(peer), {}
    for path in sorted(out.rglob("*.onnx")):
        log = run.log(f"{peer.name} parse {path.parent.name}-{path.stem}")
        outcome = measured_run([sys.executable, str(_ADAPTERS / "parse_rtx.py"), str(path)], log, run.timeout)
        said = next(iter(outcome["stdout"].splitlines()), None)
        found[str(path.relative_to(out))] = said if outcome["error"] and said else outcome["error"]
    return found


def _answers(run: PeerSteps, peer: Peer, python: str, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share of right answers by variant."""
    from transformers import AutoTokenizer

    command = run.command(python, peer, "answer", run.questions)
    outcome = measured_run(command, run.log(f"{peer.name} answers"), run.timeout)
    if outcome["error"]:
        return {"error": outcome["error"]}
    tokenizer = AutoTokenizer.from_pretrained(run.checkpoint)
    variants = json.loads(outcome["stdout"].splitlines()[-1])
    for said in variants.values():
        texts = said.pop("texts", None) or tokenizer.batch_decode(said.pop("tokens"), skip_special_tokens=True)
        right = [text.strip() == question["answer"] for text, question in zip(texts, questions, strict=True)]
        said["accuracy"] = sum(right) / len(right)
    return {"error": None, "variants": variants}


def _prefills(run: PeerSteps, commands: dict[str, list[str]], seconds: float, rounds: int) -> dict[str, Any]:
    """Medians of prefills that took turns; logits held against Hugging Face's."""
    workers: dict[str, Worker] = {}
    try:
        for name, command in commands.items():
            workers[name] = Worker(command, run.log(f"{name} prefill"), run.timeout)
        turns = [(name, variant) for name, worker in workers.items() for variant in worker.first]
        times = {turn: [workers[turn[0]].run(turn[1])] for turn in turns}
        once = sum(first[0] for [first] in times.values() if first)
        for _ in range(max(min(int(seconds / max(once, 1e-3)), _MOST_ROUNDS), rounds) - 1):
            for name, variant in turns:
                times[name, variant].append(workers[name].run(variant))
    finally:
        for worker in workers.values():
            with suppress(OSError):
                worker.close()
    found: dict[str, Any] = {name: {"error": worker.error} for name, worker in workers.items()}
    logits = {name: worker.first for name, worker in workers.items() if worker.error is None}
    # Ours is held against Hugging Face's elsewhere, and its expanded weights against the formats' specifications.
    reference = logits.get("HF eager", {}).get("sdpa") or logits.get("capa-export", {}).get("dense")
    for name, variants in logits.items():
        rows = {}
        for variant, values in variants.items():
            wall, processor = zip(*times[name, variant], strict=True)
            rows[variant] = {
                "processor_ms": round(1e3 * median(processor), 2),
                "processor_ms_least_and_most": [round(1e3 * end(processor), 2) for end in (min, max)],
                "wall_ms": round(1e3 * median(wall), 2),
                "runs": len(wall),
            }
            if reference is not None and values is not reference and not re.search("pruned|behind", variant):
                difference = np.abs(np.subtract(values, reference)).max() / np.abs(reference).max()
                rows[variant]["logits_from_reference"] = float(f"{difference:.2g}")
        found[name] = {"error": None, "variants": rows}
    return found


if __name__ == "__main__":
    main()
