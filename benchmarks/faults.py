"""The faults that the parity gates catch, and the figures of healthy builds that they rest on.

The smallest fault of each kind that still fails a trained model, and the worst figures of healthy builds.

python -m benchmarks.faults --builds 100
"""

import argparse
import json
import platform
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from math import inf, isfinite, sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from capa_export.calibrate.measure import calibrate
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.data.samples import Samples, samples_from
from capa_export.export.graphs import PRECISIONS, write_onnx
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.generation import eos_token_ids
from capa_export.model.prompt import Prompter
from capa_export.model.sidecars import copy_sidecars
from capa_export.model.source import Source
from capa_export.parity.oracle import Oracle
from capa_export.parity.records import Records, write_records
from capa_export.parity.validate import Comparison, compare_onnx, compare_prompts
from capa_export.report.schema import Check
from tests.parity.builds import build
from tests.parity.faults import FAULTS, Fault

_RESULTS = Path(__file__).parent / "results"
_TRAINED = ("tiny-qwen25vl", "tiny-llava15", "tiny-internvl3")
_CALIBRATED_ON = 40
_SEEDS = (1, 2, 3, 5)
"""Seeds of more prompts on which the trained models are to pass, 8 of 16 steps each."""
_TO_A_FACTOR = 2
"""Factor within which the smallest size of a fault without steps is found."""
_LEAST = {"cosine", "features cosine", "hidden cosine"}
"""Figures of which the smallest is the worst; of all others it is the largest."""


@dataclass(frozen=True)
class TrainedModel:
    """A trained model's `onnx` folder, and what the oracle says."""

    folder: Path
    precision: str
    recipe: Recipe
    oracle: Oracle
    prompter: Prompter
    samples: Samples
    records: Records

    def compared(self, folder: Path) -> list[Comparison]:
        """A folder that stands in its place, by all gates."""
        bundled = Prompter(folder / "llm", folder / "visual", self.prompter.family, self.prompter.dims)
        return [
            compare_prompts(self.prompter, bundled, self.samples),
            compare_onnx(folder, self.precision, self.records, self.recipe),
        ]


def trained(name: str, folder: Path, prompts: int, steps: int) -> Iterator[TrainedModel]:
    """A shipped model in every precision."""
    import transformers

    recipe = load_recipe(name)
    family = load_family(recipe.family)
    source = Source.of(open_checkpoint(recipe.checkpoint), family)
    checkpoint = source.checkpoint.folder
    architecture = getattr(transformers, family.ARCHITECTURE)
    model = architecture.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
    prompter = Prompter(checkpoint, checkpoint, family, source.dims)
    pictures = samples_from(None, recipe, _CALIBRATED_ON, split="train")
    calibration = calibrate(model, family, prompter, pictures, checkpoint_digest="")
    linear = calibration.linear_layers(recipe.ffn.eta)
    scales = {layer: calibration.layers[layer].alpha for layer in linear}
    samples = samples_from(None, recipe, prompts, split="held_out")
    for precision in PRECISIONS:
        onnx, records = folder / precision, folder / f"{precision}-records"
        write_onnx(
            source,
            precision,
            onnx,
            prune_layers=[stage.layer for stage in recipe.prune.schedule],
            scales=scales,
            min_keep_per_image=recipe.prune.min_keep_per_image,
        )
        copy_sidecars(source.checkpoint, onnx)
        oracle = Oracle(
            model=model,
            family=family,
            prompter=prompter,
            prune=recipe.prune,
            scales=scales,
            precision=precision,
            onnx=onnx,
            fp32_onnx=onnx,
            eos_token_ids=eos_token_ids(checkpoint),
        )
        records.mkdir()
        held = write_records(records, oracle, samples, steps)
        yield TrainedModel(onnx, precision, recipe, oracle, prompter, samples, held)


def of_seed(model: TrainedModel, seed: int) -> Comparison:
    """The healthy model on other prompts, more of them and longer."""
    samples = samples_from(None, model.recipe, 8, split="held_out", seed=seed)
    with TemporaryDirectory() as folder:
        records = write_records(Path(folder), model.oracle, samples, 16)
        return compare_onnx(model.folder, model.precision, records, model.recipe)


def checks(compared: Iterable[Comparison]) -> list[Check]:
    """The checks of all artefacts."""
    return [check for one in compared for entry in (*one.export_error, *one.selection) for check in entry.checks]


class WorstFigures:
    """The worst figures of healthy builds, by precision."""

    def __init__(self) -> None:
        self.builds: dict[str, int] = defaultdict(int)
        self.figures: dict[str, dict[str, float]] = defaultdict(dict)
        self.alarms: list[str] = []

    def add(self, precision: str, about: str, compared: Iterable[Comparison]) -> None:
        self.builds[precision] += 1
        worst = self.figures[precision]
        compared = list(compared)
        for check in checks(compared):
            value = inf if check.value is None else check.value
            pick = min if check.name in _LEAST else max
            if check.name not in ("kept-set IoU", "kept-set IoU of a prompt", "same tokens"):
                worst[check.name] = pick(worst.get(check.name, value), value)
            if check.failure:
                self.alarms.append(f"{about}: {check.failure}")
        for stage in (stage for one in compared for entry in one.selection for stage in entry.stages):
            figures = {"1 - kept-set IoU": 1 - (stage.iou_min or 0.0), "score noise": stage.score_noise or 0.0}
            for name, value in figures.items():
                worst[name] = max(worst.get(name, 0.0), value)
        for one in compared:
            for entry in one.selection:
                flips = [check.value or 0.0 for check in entry.checks if check.name == "furthest flip"]
                for flip, stage in zip(flips, entry.stages, strict=True):
                    if stage.score_noise:
                        name = "furthest flip, times the score noise"
                        worst[name] = max(worst.get(name, 0.0), flip / stage.score_noise)

    def as_dict(self) -> dict[str, Any]:
        """The figures as entries of the result."""
        return {"builds": dict(self.builds), "worst": dict(self.figures), "alarms": self.alarms}


def smallest(fault: Fault, caught: Callable[[float], list[str]]) -> tuple[float | None, list[str]]:
    """The smallest size that is caught, and by which checks; None where not even the whole fault is."""
    steps = isinstance(fault.least, int)
    passed, size = 0.0, fault.least
    while not (by := caught(size)):
        if size >= fault.whole:
            return None, []
        passed, size = size, size * (2 if steps else 10)
        if size > min(fault.whole, 4096):
            size = fault.whole
    if not isfinite(size):
        return size, by
    while (size - passed > 1) if steps else (passed > 0 and size / passed > _TO_A_FACTOR):
        middle = (passed + size) // 2 if steps else sqrt(passed * size)
        if found := caught(middle):
            size, by = middle, found
        else:
            passed = middle
    return size, by


def smallest_caught(model: TrainedModel, fault: Fault) -> dict[str, Any]:
    """Find the smallest size of a fault on a trained model that is still caught."""

    def caught(size: float) -> list[str]:
        with TemporaryDirectory() as scratch:
            folder = shutil.copytree(model.folder, Path(scratch) / "onnx")
            fault.into(folder, size)
            return list(dict.fromkeys(check.name for check in checks(model.compared(folder)) if check.failure))

    size, by = smallest(fault, caught)
    return {
        "fault": fault.name,
        "precision": model.precision,
        "unit": fault.unit,
        "smallest": None if size is None else "all" if not isfinite(size) else size,
        "is_least": size == fault.least,
        "caught_by": by,
    }


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _number(value: float | str | None) -> str:
    return value if isinstance(value, str) else "not caught" if value is None else f"{value:.3g}"


def _figure(name: str, value: float | None) -> str:
    """A cosine as what it lacks of 1."""
    if value is None:
        return ""
    return f"1 - {1 - value:.2g}" if name in _LEAST else f"{value:.2g}"


def report(result: Mapping[str, Any]) -> str:
    """The tables."""
    rows: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in result["faults"]:
        rows[row["fault"]][row["precision"]] = row
    precisions = list(dict.fromkeys(row["precision"] for row in result["faults"]))
    faults = [
        [
            name.replace("-", ": ", 1).replace("_", " "),
            next(iter(by.values()))["unit"],
            *(_number(by[precision]["smallest"]) + "*" * by[precision]["is_least"] for precision in precisions),
            ", ".join(by[precisions[-1]]["caught_by"]),
        ]
        for name, by in rows.items()
    ]
    healthy: list[str] = []
    for group, title in (("random", "Random builds"), ("trained", "Trained models")):
        worst = result["healthy"][group]["worst"]
        names = list(dict.fromkeys(name for figures in worst.values() for name in figures))
        table = [[name, *(_figure(name, worst[p].get(name)) for p in worst)] for name in names]
        counts = ", ".join(f"{count} in {p}" for p, count in result["healthy"][group]["builds"].items())
        alarms = result["healthy"][group]["alarms"]
        healthy.append(f"{title}: {counts}; {len(alarms)} false alarms.\n\n{_table(['worst', *worst], table)}")
    joined = "\n\n".join(healthy)
    return f"""# What the parity gates catch, {result["date"]}

`{result["command"]}`, {result["versions"]}. No GPU was used.

## The smallest fault of each kind that still fails

Planted in tiny-qwen25vl, on {result["prompts"]} prompts of {result["steps"]} steps. An asterisk marks the smallest
there is to plant. The last column says which gates failed at that size in {precisions[-1]}.

{_table(["fault", "counted in", *precisions, "caught by"], faults)}

## Healthy builds

A random build is one of four families with its own dimensions, schedule, scales and pictures, on 2 prompts of 3 steps;
the trained models are the shipped ones on {result["prompts"]} prompts of {result["steps"]} steps, and in half
precision on four times 8 of 16. Against eager CAPA
in FP32 and in the build's precision, whichever is further.

{joined}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builds", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--date", default=datetime.now(timezone.utc).date().isoformat())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    random, shipped = WorstFigures(), WorstFigures()
    faults: list[dict[str, Any]] = []
    for name in _TRAINED:
        with TemporaryDirectory() as folder:
            for model in trained(name, Path(folder), arguments.prompts, arguments.steps):
                shipped.add(model.precision, name, model.compared(model.folder))
                for seed in _SEEDS if model.precision != "fp32" else ():
                    shipped.add(model.precision, f"{name}, seed {seed}", [of_seed(model, seed)])
                if name == _TRAINED[0]:
                    faults += [
                        smallest_caught(model, fault) for fault in track(FAULTS, model.precision, console=console)
                    ]
    for seed in track(range(arguments.builds), "healthy builds", console=console):
        with TemporaryDirectory() as folder:
            made = build(seed, Path(folder))
            compared = compare_onnx(made.folder, made.precision, made.records, made.recipe)
            random.add(made.precision, made.about, [compared])
    result = {
        "date": arguments.date,
        "command": f"python -m benchmarks.faults --builds {arguments.builds}",
        "versions": f"onnxruntime {version('onnxruntime')}, torch {version('torch')}, numpy {np.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}",
        "prompts": arguments.prompts,
        "steps": arguments.steps,
        "faults": faults,
        "healthy": {"random": random.as_dict(), "trained": shipped.as_dict()},
    }
    path = _RESULTS / f"{arguments.date}-faults.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(report(result), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
