"""The part that all adapters share: four verbs, and a channel that no library can write into.

python ADAPTER.py export CHECKPOINT OUT            writes the peer's files
python ADAPTER.py prefill CHECKPOINT OUT FEED.npz  runs one prefill for each line on stdin
python ADAPTER.py answer CHECKPOINT OUT QUESTIONS  answers a folder of questions
python ADAPTER.py ask CHECKPOINT OUT VARIANT       answers one question for each line on stdin, and times its parts

Runs in the peers' environments: the standard library and numpy only.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["DECODE", "THREADS", "Ask", "Feed", "Prefills", "main", "now", "peak_memory"]
__all__ += ["quantized", "questions", "weights_of"]

STEPS = 8
"""Of decode that are timed together."""
DECODE = "decode behind "
"""Begins the name of a step of decode, which goes on with that of a prefill."""
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
"""Of every runtime."""

Feed = Mapping[str, np.ndarray]
"""`inputs_embeds` [1, T, D] FP32, `position_ids` [axes, T], `text_positions` [X], and `num_keep` [1]."""
Prefills = Mapping[str, Callable[[], np.ndarray]]
"""Variant -> one prefill, or the step of decode behind it, which returns the logits [V] of the last position."""

Ask = Callable[..., dict[str, Any]]
"""`picture`, `question`, `tokens` and `exact`, whether an end counts as a token like others -> `text`, `milliseconds`
of the processor from the picture's file to each token, and those of each part that the runtime tells apart."""


now = time.process_time
"""The clock of answers: seconds of the processor, which on one thread are those on an idle core's clock."""


def peak_memory() -> int:
    """The largest resident set of this process since it was started, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def weights_of(out: Path) -> str:
    """What the folder's name says of the weights in it: `genai-int4` holds INT4, and `genai` FP32."""
    return out.name.rpartition("-")[2] if out.name.endswith(("-int4", "-fp16")) else "fp32"


def quantized(checkpoint: Path) -> bool:
    """Whether its weights are stored in few bits."""
    return "quantization_config" in json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))


def questions(folder: Path) -> list[dict[str, Any]]:
    """The questions in order, the arrays of each under their names."""
    listed = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return [{**entry, **np.load(folder / entry["arrays"])} for entry in listed]


def main(
    *,
    export: Callable[[Path, Path], None] | None = None,
    prefill: Callable[[Path, Path, Feed], Prefills] | None = None,
    answer: Callable[[Path, Path, Path], dict[str, Any]] | None = None,
    ask: Callable[[Path, Path, str], Ask] | None = None,
) -> None:
    """Run the verb that the command line names."""
    # Libraries print to stdout; what the caller reads goes to a copy of it.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    verb, *paths = sys.argv[1:]
    checkpoint, out = (Path(path) for path in paths[:2])
    if verb == "export" and export:
        export(checkpoint, out)
        send({"ok": True})
    elif verb == "answer" and answer:
        send(answer(checkpoint, out, Path(paths[2])))
    elif verb == "ask" and ask:
        began = time.perf_counter()
        asked = ask(checkpoint, out, paths[2])
        send({"load_seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory()})
        for line in sys.stdin:
            send(asked(**json.loads(line)) | {"peak_memory_bytes": peak_memory()})
    elif verb == "prefill" and prefill:
        runs = prefill(checkpoint, out, dict(np.load(paths[2])))
        # The first run of each plans and allocates; its logits are held against the others'.
        send({name: np.asarray(run(), np.float64).ravel().tolist() for name, run in runs.items()})
        for line in sys.stdin:
            name = line.strip()
            times = STEPS if name.startswith(DECODE) else 1
            wall, processor = time.perf_counter(), time.process_time()
            for _ in range(times):
                runs[name]()
            ended = time.perf_counter(), time.process_time()
            send([(ended[0] - wall) / times, (ended[1] - processor) / times])
    else:
        sys.exit(f"NotImplementedError: no {verb} for this peer")
