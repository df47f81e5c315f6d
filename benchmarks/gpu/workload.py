"""The workload of engines and peers: a checkpoint of random weights, and one prompt of embeddings."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from capa_export.model.prompt import Prompt

__all__ = ["MODEL", "NUM_VISUAL", "checkpoint", "embeddings", "prompt"]

MODEL = "qwen25vl-1024"
NUM_VISUAL, _NUM_TEXT = 1024, 48


def checkpoint(work: Path) -> Path:
    """The folder of the checkpoint; the first who asks writes it."""
    folder, partial = work / MODEL, work / f"{MODEL}.partial"
    if not folder.exists():
        script = Path(__file__).parents[1] / "random_checkpoint.py"
        subprocess.run([sys.executable, script, MODEL, partial], check=True, stdout=sys.stderr)
        partial.rename(folder)
    return folder


def prompt() -> Prompt:
    """A picture in the middle of text, as far as the decoder sees it."""
    is_visual = np.zeros(NUM_VISUAL + _NUM_TEXT, bool)
    is_visual[4 : 4 + NUM_VISUAL] = True
    positions = np.tile(np.arange(len(is_visual)), (3, 1))
    return Prompt(is_visual.astype(np.int64), is_visual, (), positions, len(is_visual))


def embeddings(hidden_size: int) -> np.ndarray:
    """[1, T, D] FP16."""
    shape = 1, NUM_VISUAL + _NUM_TEXT, hidden_size
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(np.float16)
