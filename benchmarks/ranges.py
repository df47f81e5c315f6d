"""How much further activations reach on other pictures than on those of a calibration: what the audit rests on.

python -m benchmarks.ranges tiny-qwen25vl --samples 120
python -m benchmarks.ranges llava15 --checkpoint CHECKPOINT --images DIR --samples 60
"""

import argparse
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from capa_export.calibrate.measure import measure
from capa_export.config.recipe import load_recipe
from capa_export.data.samples import samples_from
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.prompt import Prompter
from capa_export.model.source import Source

_RESULTS = Path(__file__).parent / "results"
_SEEN = (4, 8, 16, 32, 40)
"""Numbers of samples that a calibration may see."""
_SPLITS = 200
_LARGEST = 20
"""Number of the largest values that are looked at apart, since only they come near the end of FP16."""


def measured(model_name: str, checkpoint: str | None, images: Path | None, count: int) -> list[dict[str, float]]:
    """The largest magnitude of every value that a calibration watches, on each sample by itself."""
    recipe = load_recipe(model_name)
    family = load_family(recipe.family)
    source = Source.of(open_checkpoint(checkpoint or recipe.checkpoint), family)
    folder = source.checkpoint.folder
    architecture = getattr(transformers, family.ARCHITECTURE)
    model = architecture.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    prompter = Prompter(folder, folder, family, source.dims)
    samples = samples_from(images, recipe, count, split="train")
    return [measure(model, family, prompter, sample, "").absmax for sample in samples]


def reach(rows: Sequence[dict[str, float]], seen: int) -> dict[str, float]:
    """How many times further the rest of the samples reaches than so many of them, over random splits."""
    names = sorted(rows[0])
    largest_SN = np.array([[row[name] for name in names] for row in rows])
    top = np.argsort(-largest_SN.max(0))[:_LARGEST]
    rng = np.random.default_rng(0)
    ratios: list[np.ndarray] = []
    for _ in range(_SPLITS):
        order = rng.permutation(len(rows))
        ratios.append(largest_SN[order[seen:]].max(0) / np.maximum(largest_SN[order[:seen]].max(0), 1e-9))
    ratio = np.stack(ratios)
    return {
        "seen": seen,
        "median_of_worst": round(float(np.median(ratio.max(1))), 3),
        "worst": round(float(ratio.max()), 3),
        "worst_of_largest": round(float(ratio[:, top].max()), 3),
    }


def summary(name: str, rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """An entry of the result."""
    return {
        "model": name,
        "samples": len(rows),
        "values": len(rows[0]),
        "largest": max(max(row.values()) for row in rows),
        "reach": [reach(rows, seen) for seen in _SEEN if seen < len(rows)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a recipe's name")
    parser.add_argument("--checkpoint")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--date", default=datetime.now(timezone.utc).date().isoformat())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = _RESULTS / f"{arguments.date}-ranges.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["models"] if path.exists() else []
    rows = measured(arguments.model, arguments.checkpoint, arguments.images, arguments.samples)
    found.append(summary(arguments.checkpoint or arguments.model, rows))
    result = {"date": arguments.date, "versions": f"torch {version('torch')}, numpy {np.__version__}", "models": found}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
