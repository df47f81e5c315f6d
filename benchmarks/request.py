"""The whole answer as a user waits for it: picture file in, last token out, by parts, beside the peers.

python -m benchmarks.request --work /tmp/request --tokenizer qwen3/package/models --real out/bed-real \
    --out benchmarks/results/2026-12-01-request

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
import time
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
_WARM_UP = 4
"""Tokens of the answer that is not counted; what compiles does so until its third step."""
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
    System("HF, decoder compiled", "hf_eager", "compiled"),
    System("capa-export, dense", "capa_export", files="dense"),
    System("capa-export, CAPA", "capa_export", files="capa"),
    System("capa-export, INT4, dense", "capa_export", files="dense-int4"),
    System("capa-export, INT4, CAPA", "capa_export", files="capa-int4"),
    System("capa-export, INT4 and its head, dense", "capa_export", files="dense-int4-head4"),
    System("capa-export, INT4 and its head, CAPA", "capa_export", files="capa-int4-head4"),
    System("capa-export, INT4, the rest INT8, dense", "capa_export", files="dense-int4-int8"),
    System("capa-export, INT4, the rest INT8, CAPA", "capa_export", files="capa-int4-int8"),
    System("OpenVINO GenAI", "openvino", "0", "openvino"),
    System("OpenVINO GenAI, CDPruner", "openvino", "75", "openvino"),
    System("OpenVINO GenAI, INT4", "openvino", "0", "openvino-int4"),
    System("OpenVINO GenAI, INT4, CDPruner", "openvino", "75", "openvino-int4"),
    System("mobius-onnx on ONNX Runtime", "mobius", files="mobius"),
    System("onnxruntime-genai", "genai", files="genai"),
    System("onnxruntime-genai, INT4", "genai", files="genai-int4"),
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
    about: str
    int4: str = "int4"
    """With groups that divide its sizes."""
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
    parser.add_argument("--rounds", type=int, default=2, help="at the smaller sizes; one at the largest")
    parser.add_argument("--seconds", type=float, default=600, help="after which no further round of sizes is begun")
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
            "Qwen2.5-VL's architecture with 12 layers of hidden size 512 and random weights; behind layer 2",
        ),
        Bed(
            "tiny",
            tiny,
            "tiny-qwen25vl",
            "capa@2:0/full",
            "capa@2:0.75",
            None,
            "trained on drawn scenes",
            "int4:64",
            _asked(scenes, options.questions),
        ),
    ]
    if options.real:
        folder = options.real.with_name("bed-real-questions") / "clutter"
        folder = folder if folder.exists() else options.real.with_name("clutter")
        asked = _asked(folder, options.questions)
        recipe = str(ROOT / "benchmarks" / "real" / "real.toml")
        beds.append(
            Bed(
                "real",
                options.real.resolve(),
                recipe,
                "capa@12:0/full",
                "capa@12:0.75/full",
                folder.with_name("clutter-calibration") / "scenes.jsonl",
                "a published decoder taught to see",
                "int4:64",
                asked,
            )
        )
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
    kind, *weights = system.files.split("-")
    schedule = {"dense": bed.dense, "capa": bed.capa}[kind]
    quantized = {
        "int4": {"quantize": bed.int4},
        "head4": {"quantize_head": bed.int4},
        "int8": {"quantize_head": "int8", "quantize_vision": "int8"},
    }
    options: dict[str, Any] = {"recipe": bed.recipe, "images": bed.images}
    for word in weights:
        options |= quantized[word]
    return kept(work / name, lambda out: bundle(bed.checkpoint, schedule, out=out, **options)), None


def _measured(
    work: Path,
    bed: Bed,
    systems: Sequence[System],
    files: Mapping[str, tuple[Path, str | None]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Every system on one bed, in turns; beginning with another each round."""
    rows: dict[str, dict[str, Any]] = {system.name: {"error": files[system.name][1]} for system in systems}
    said: dict[str, list[list[dict[str, Any]]]] = {system.name: [] for system in systems}
    ends = time.monotonic() + options.seconds
    for turn in range(1 if bed.questions else options.rounds):
        lines = _questions_of(bed) if bed.questions else _pictures_of(work, options, turn)
        begin = turn * len(systems) // max(options.rounds, 1)
        for system in [*systems[begin:], *systems[:begin]]:
            row = rows[system.name]
            if row["error"] is None and (not turn or time.monotonic() < ends):
                print(f"{bed.name}, round {turn + 1}: {system.name}", file=sys.stderr, flush=True)
                command, log = _command(work, bed, system, files[system.name][0])
                replies, row["error"] = _session(command, log, lines, options.timeout)
                said[system.name].append(replies)
    for name, row in rows.items():
        if not bed.questions:
            row.update(_sizes(options, said[name], said.get(REFERENCE, [])))
        elif row["error"] is None:
            row.update(_scored(bed, said[name][0]))
    return {"bed": bed.name, "about": bed.about, "questions": len(bed.questions), "systems": rows}


def _command(work: Path, bed: Bed, system: System, out: Path) -> tuple[list[str], Path]:
    start, suffix = [sys.executable], "py"
    if system.adapter == "llama_cpp":
        start, suffix = ["sh", "-c", 'exec node "$@" 3>&1 1>&2', "sh"], "js"
    elif system.adapter == "openvino":
        start = [str(work / "venvs" / system.adapter / "bin" / "python")]
    adapter = str(ADAPTERS / f"with_{system.adapter}.{suffix}")
    log = work / f"{bed.name} {system.name}.log"
    return [*start, adapter, "ask", str(bed.checkpoint), str(out), system.variant], log


def _session(
    command: Sequence[str], log: Path, lines: Sequence[Mapping[str, Any]], timeout: float
) -> tuple[list[dict[str, Any]], str | None]:
    """What a system says until it fails, to each line but the first, which warms it up; and why it failed, and when."""
    worker = Worker(command, log, timeout)
    try:
        replies = [reply for line in lines if (reply := worker.run(json.dumps(line))) is not None]
    finally:
        with suppress(OSError):
            worker.close()
    when = f" (answer {len(replies)} of {len(lines) - 1})" if replies else ""
    return replies[1:], None if worker.error is None else worker.error + when


def _pictures_of(work: Path, options: argparse.Namespace, turn: int) -> list[dict[str, Any]]:
    """A picture of every size; of the largest in the first round alone. No picture comes twice: some keep a prompt."""
    sizes = [visual for visual in sorted(options.visual_tokens) if turn == 0 or visual < max(SIDES)]
    asked = [(min(sizes), 0, _WARM_UP), *((visual, turn + 1, max(TOKENS)) for visual in sizes)]
    return [
        {
            "picture": str(
                kept(work / f"pictures-{visual}", lambda path, n=visual: _noise(path, 9, SIDES[n], seed=n))
                / f"{index}.png"
            ),
            "question": _QUESTION,
            "tokens": tokens,
            "exact": True,
        }
        for visual, index, tokens in asked
    ]


def _questions_of(bed: Bed) -> list[dict[str, Any]]:
    return [
        {"picture": entry["picture"], "question": entry["question"], "tokens": _ANSWER_TOKENS, "exact": False}
        for entry in [bed.questions[0], *bed.questions]
    ]


def _sizes(
    options: argparse.Namespace,
    rounds: Sequence[Sequence[dict[str, Any]]],
    reference: Sequence[Sequence[dict[str, Any]]],
) -> dict[str, Any]:
    """The times of a system at each size that it answered, and how many times longer HF eager takes."""
    found: dict[str, Any] = {}
    for place, visual in enumerate(sorted(options.visual_tokens)):
        mine = [replies[place] for replies in rounds if place < len(replies)]
        theirs = [replies[place] for replies in reference if place < len(replies)]
        if not mine:
            break
        found[str(visual)] = _times(mine, TOKENS)
        if theirs:
            found[str(visual)]["hf_eager_over_this"] = {str(count): _ratio(theirs, mine, count) for count in TOKENS}
    return {"visual_tokens": found}


def _scored(bed: Bed, replies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The share of right answers, and the times of them all."""
    right = sum(reply["text"].strip() == entry["answer"] for reply, entry in zip(replies, bed.questions, strict=True))
    texts = [reply["text"] for reply in replies]
    return {"accuracy": right / len(replies), **_times(replies, ()), "texts": texts}


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


def _ratio(reference: Sequence[Mapping[str, Any]], replies: Sequence[Mapping[str, Any]], count: int) -> float:
    """How many times longer the reference takes to a token, round by round."""
    pairs = zip(reference, replies, strict=False)
    return round(
        median(theirs["milliseconds"][count - 1] / mine["milliseconds"][count - 1] for theirs, mine in pairs), 2
    )


if __name__ == "__main__":
    main()
