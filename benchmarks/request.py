"""The whole answer as a user waits for it: picture file in, last token out, by parts, beside the peers.

python -m benchmarks.request --work /tmp/request --tokenizer qwen3/package/models --real out/bed-real \
    --out benchmarks/results/2026-11-30-request

Every system is loaded in a process of its own, with one thread, and they take turns: each answers the same question
about the same picture, one after the other, in another order each round. Times are the processor's, which other work on
the machine leaves alone. What a system exported stays under --work; --prepare exports, and asks nothing; --quick asks
once at the smallest size.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.peer.processes import Worker
from benchmarks.request_files import ADAPTERS, WHOLE, bundle, kept, llama_cpp, peer_export, write_whole
from benchmarks.request_table import markdown
from benchmarks.tiny.dataset import write_dataset
from capa_export.data.scenes import KINDS, samples

ROOT = Path(__file__).resolve().parents[1]
TOKENS = (1, 16, 64)
SIDES = {256: 448, 1024: 896, 4096: 1792}
"""Visual tokens of Qwen2.5-VL -> pixels of a square picture's side."""
_QUESTION = "What is in this picture?"
_ANSWER_TOKENS = 6
_SEED = 29
"""Of held-out scenes."""
REFERENCE = "HF eager"


@dataclass(frozen=True)
class System:
    """One way to an answer."""

    name: str
    adapter: str
    variant: str = "dense"
    files: str = ""
    """What it reads, under the name of the bed; nothing where it reads the checkpoint."""


SYSTEMS = (
    System(REFERENCE, "hf_eager", "sdpa"),
    System("HF, torch.compile", "hf_eager", "compiled"),
    System("capa-export, dense", "capa_export", files="dense"),
    System("capa-export, CAPA", "capa_export", files="capa"),
    System("capa-export, INT4, dense", "capa_export", files="dense-int4"),
    System("capa-export, INT4, CAPA", "capa_export", files="capa-int4"),
    System("OpenVINO GenAI", "openvino", "0", "openvino"),
    System("OpenVINO GenAI, CDPruner", "openvino", "75", "openvino"),
    System("OpenVINO GenAI, INT4", "openvino", "0", "openvino-int4"),
    System("OpenVINO GenAI, INT4, CDPruner", "openvino", "75", "openvino-int4"),
    System("mobius-onnx on ONNX Runtime", "mobius", files="mobius"),
    System("onnxruntime-genai", "genai", files="genai"),
    System("llama.cpp, mtmd", "llama_cpp", files="llama"),
)


@dataclass(frozen=True)
class Bed:
    """A checkpoint, what is asked of it, and how this project prunes it."""

    name: str
    checkpoint: Path
    recipe: str
    dense: str
    capa: str
    images: Path | None
    """What its calibration looks at; nothing for the recipe's own."""
    questions: Sequence[Mapping[str, str]] = ()
    """Picture, question and answer of each; without, pictures of every size are asked about."""


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="environments, exports and logs")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    parser.add_argument("--tokenizer", type=Path, help="folder of Qwen's, as published.py says")
    parser.add_argument("--real", type=Path, help="what `make bed-real` wrote; its questions lie beside it")
    parser.add_argument("--systems", nargs="+", choices=[system.name for system in SYSTEMS], help="default: all")
    parser.add_argument("--beds", nargs="+", choices=["whole", "tiny", "real"], default=["whole", "tiny", "real"])
    parser.add_argument("--visual-tokens", type=int, nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=3, help="at the two smaller sizes; one at the largest")
    parser.add_argument("--questions", type=int, default=25)
    parser.add_argument(
        "--timeout", type=float, default=240, help="seconds for an answer; three times that for an export"
    )
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        options.visual_tokens, options.rounds, options.questions = [min(SIDES)], 1, 2
    return options


def main() -> None:
    options = parsed()
    work = options.work.resolve()
    systems = [system for system in SYSTEMS if not options.systems or system.name in (REFERENCE, *options.systems)]
    beds = [bed for bed in _beds(work, options) if bed.name in options.beds]
    prepared = {
        bed.name: {system.name: _files(work, bed, system, options.timeout) for system in systems} for bed in beds
    }
    if options.prepare:
        return
    load_before = os.getloadavg()
    results = [_measured(work, bed, systems, prepared[bed.name], options) for bed in beds]
    report = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread each, Python {platform.python_version()}",
        "load": {"before": load_before, "after": os.getloadavg()},
        "versions": {name: version(name) for name in ("onnxruntime", "torch", "transformers")},
        "beds": results,
    }
    print(text := markdown(report))
    if options.out:
        options.out.with_name(options.out.name + ".json").write_text(
            json.dumps(report, indent=1) + "\n", encoding="utf-8"
        )
        options.out.with_name(options.out.name + ".md").write_text(text, encoding="utf-8")


def _beds(work: Path, options: argparse.Namespace) -> list[Bed]:
    pictures = kept(work / "pictures", lambda folder: _noise(folder, 8, SIDES[256]))
    tiny = ROOT / "graphs" / "checkpoints" / "tiny-qwen25vl"
    scenes = kept(work / "scenes", lambda folder: write_dataset(folder, samples(200, seed=_SEED, kinds=KINDS)))
    beds = [
        Bed(
            "whole",
            kept(work / WHOLE, lambda folder: write_whole(folder, options.tokenizer)),
            "qwen25vl",
            "capa@2:0/full",
            "capa@2:0.75/eta=0.999",
            pictures,
        ),
        Bed("tiny", tiny, "tiny-qwen25vl", "capa@2:0/full", "capa@2:0.75", None, _asked(scenes, options.questions)),
    ]
    if options.real:
        folder = options.real.with_name("bed-real-questions") / "clutter"
        asked = _asked(folder if folder.exists() else options.real.with_name("clutter"), options.questions)
        recipe = str(ROOT / "benchmarks" / "real" / "real.toml")
        beds.append(Bed("real", options.real.resolve(), recipe, "capa@12:0/full", "capa@12:0.75/full", None, asked))
    return beds


def _noise(folder: Path, count: int, side: int, seed: int = 0) -> None:
    """Pictures of coarse noise: as large as asked for, and no two alike."""
    folder.mkdir()
    for index in range(count):
        pixels = np.random.default_rng((seed, index)).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{index}.png")


def _asked(folder: Path, count: int) -> list[dict[str, str]]:
    lines = (folder / "scenes.jsonl").read_text(encoding="utf-8").splitlines()
    asked: list[dict[str, str]] = []
    for line in lines[:: max(len(lines) // count, 1)][:count]:
        entry = json.loads(line)
        picture, question = entry["messages"][0]["content"]
        asked.append(
            {"picture": str(folder / picture["path"]), "question": question["text"], "answer": entry["answer"]}
        )
    return asked


def _files(work: Path, bed: Bed, system: System, timeout: float) -> tuple[Path, str | None]:
    """The folder that a system reads of a bed, and why it has none."""
    name = f"{bed.name}-{system.files}"
    if system.adapter == "hf_eager":
        return bed.checkpoint, None
    if system.adapter == "llama_cpp":
        return llama_cpp(work, bed.checkpoint, name)
    if system.adapter != "capa_export":
        return peer_export(work, system.adapter, bed.checkpoint, name, 3 * timeout)
    kind, _, quantize = system.files.partition("-")
    schedule = {"dense": bed.dense, "capa": bed.capa}[kind]
    options = {"recipe": bed.recipe, "quantize": quantize or None, "images": bed.images}
    return kept(work / name, lambda out: bundle(bed.checkpoint, schedule, out=out, **options)), None


def _measured(
    work: Path,
    bed: Bed,
    systems: Sequence[System],
    files: Mapping[str, tuple[Path, str | None]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Every system on one bed."""
    rows: dict[str, dict[str, Any]] = {system.name: {"error": files[system.name][1]} for system in systems}
    workers: dict[str, Worker] = {}
    try:
        for system in systems:
            if rows[system.name]["error"] is None:
                print(f"{bed.name}: loading {system.name}", file=sys.stderr, flush=True)
                worker = Worker(*_command(work, bed, system, files[system.name][0]), options.timeout)
                workers[system.name] = worker
                rows[system.name] = {"error": worker.error, **worker.first}
        ask = _ask_about_pictures if not bed.questions else _ask_questions
        ask(work, bed, workers, rows, options)
        for name, worker in workers.items():
            rows[name]["error"] = worker.error
    finally:
        for worker in workers.values():
            with suppress(OSError):
                worker.close()
    return {"bed": bed.name, "questions": len(bed.questions), "systems": rows}


def _command(work: Path, bed: Bed, system: System, out: Path) -> tuple[list[str], Path]:
    python, suffix = sys.executable, "py"
    if system.adapter == "llama_cpp":
        python, suffix = "node", "js"
    elif system.adapter == "openvino":
        python = str(work / "venvs" / system.adapter / "bin" / "python")
    adapter = str(ADAPTERS / f"with_{system.adapter}.{suffix}")
    log = work / f"{bed.name} {system.name}.log"
    return [python, adapter, "ask", str(bed.checkpoint), str(out), system.variant], log


def _turns(
    workers: Mapping[str, Worker], turn: int, picture: str, question: str, tokens: int, *, exact: bool
) -> dict[str, dict[str, Any]]:
    """The same question to every system that still answers, beginning with another each time."""
    line = json.dumps({"picture": picture, "question": question, "tokens": tokens, "exact": exact})
    names = list(workers)
    begin = turn % max(len(names), 1)
    replies = {name: workers[name].run(line) for name in [*names[begin:], *names[:begin]]}
    return {name: replies[name] for name in names if replies[name] is not None}


def _ask_about_pictures(
    work: Path, bed: Bed, workers: Mapping[str, Worker], rows: Mapping[str, dict[str, Any]], options: argparse.Namespace
) -> None:
    """Answers of as many tokens as wished, at each size; the first of a size is not counted."""
    for visual in sorted(options.visual_tokens):
        rounds = options.rounds if visual < max(SIDES) else 1
        folder = kept(work / f"pictures-{visual}", lambda path, n=visual: _noise(path, 9, SIDES[n], seed=n))
        replies: list[dict[str, Any]] = []
        for turn in range(-1, rounds):
            print(f"{bed.name}: {visual} visual tokens, round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
            # Where an answer takes long, one token is enough to plan, allocate and compile.
            tokens = max(TOKENS) if turn >= 0 else 2
            asked = _turns(workers, turn, str(folder / f"{turn + 1}.png"), _QUESTION, tokens, exact=True)
            replies += [asked] if turn >= 0 else []
        for name in workers:
            mine = [reply[name] for reply in replies if name in reply]
            if len(mine) == rounds:
                row = _times(mine, TOKENS)
                reference = [reply[REFERENCE]["milliseconds"] for reply in replies if REFERENCE in reply]
                if len(reference) == rounds:
                    row["hf_eager_over_this"] = {
                        str(count): _ratio([times[count - 1] for times in reference], mine, count) for count in TOKENS
                    }
                rows[name].setdefault("visual_tokens", {})[str(visual)] = row


def _ask_questions(
    work: Path,  # noqa: ARG001
    bed: Bed,
    workers: Mapping[str, Worker],
    rows: Mapping[str, dict[str, Any]],
    options: argparse.Namespace,  # noqa: ARG001
) -> None:
    """Short answers to questions whose answers are known; the first warms up, and is asked again."""
    said: dict[str, list[tuple[dict[str, Any], str]]] = {name: [] for name in workers}
    print(f"{bed.name}: {len(bed.questions)} questions", file=sys.stderr, flush=True)
    for turn, entry in enumerate([bed.questions[0], *bed.questions]):
        asked = _turns(workers, turn, entry["picture"], entry["question"], _ANSWER_TOKENS, exact=False)
        for name, reply in asked.items() if turn else ():
            said[name].append((reply, entry["answer"]))
    for name, replies in said.items():
        if len(replies) == len(bed.questions):
            right = sum(reply["text"].strip() == answer for reply, answer in replies)
            rows[name] |= {"accuracy": right / len(replies), **_times([reply for reply, _ in replies], ())}
            rows[name]["texts"] = [reply["text"] for reply, _ in replies]


def _times(replies: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, Any]:
    """Medians in milliseconds: to the first token and to the last, by answer's length and by part."""
    row: dict[str, Any] = {
        "answer_ms": round(median(reply["milliseconds"][-1] for reply in replies), 1),
        "peak_MB": max(reply["peak_memory_bytes"] for reply in replies) >> 20,
        "parts_ms": {
            part: round(median(reply[part] for reply in replies), 1)
            for part in ("file", "processor", "tower", "prefill")
            if part in replies[0]
        },
    }
    for count in counts:
        row[f"ms_to_token_{count}"] = round(median(reply["milliseconds"][count - 1] for reply in replies), 1)
    if len(counts) > 1:
        per_token = [
            (reply["milliseconds"][-1] - reply["milliseconds"][0]) / (len(reply["milliseconds"]) - 1)
            for reply in replies
        ]
        row["ms_a_token"] = round(median(per_token), 2)
    if "prompt_tokens" in replies[0]:
        row["prompt_tokens"] = replies[0]["prompt_tokens"]
    return row


def _ratio(reference: Sequence[float], replies: Sequence[Mapping[str, Any]], count: int) -> float:
    """How many times longer HF eager takes, round by round."""
    mine = [reply["milliseconds"][count - 1] for reply in replies]
    return round(median(theirs / ours for theirs, ours in zip(reference, mine, strict=True)), 2)


if __name__ == "__main__":
    main()
