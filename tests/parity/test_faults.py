"""Every planted fault fails the gates, in a folder of graphs and in a bundle whose hashes agree."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capa_export.base.errors import CapaError
from capa_export.bundle.store import Bundle, file_digest
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.schedule import Prune, Stage
from capa_export.data.samples import Samples
from capa_export.export.graphs import write_onnx
from capa_export.model.prompt import Prompter, Turn
from capa_export.model.sidecars import copy_sidecars
from capa_export.model.source import Source
from capa_export.parity.oracle import Oracle
from capa_export.parity.records import Records, write_records
from capa_export.parity.validate import compare_onnx, compare_prompts
from capa_export.run.onnx import OnnxModel
from tests.building import Building
from tests.conftest import noise
from tests.parity.builds import asked
from tests.parity.faults import FAULTS, HARMLESS, KINDS, Fault

PRUNE = Prune(schedule=(Stage(layer=2, ratio=0.75),))
SCALES = {1: np.linspace(0.5, 1.5, 64), 3: np.linspace(1.5, 0.6, 64), 4: np.linspace(0.7, 1.2, 64)}
RECIPE = load_recipe("qwen25vl").model_copy(update={"prune": PRUNE})


@dataclass(frozen=True)
class Healthy:
    """An `onnx` folder as it should be, and what the oracle says."""

    folder: Path
    precision: str
    prompter: Prompter
    samples: Samples
    records: Records
    recipe: Recipe = RECIPE

    def failures(self, folder: Path) -> list[str]:
        """Of the gates, on a folder that stands in its place."""
        bundled = Prompter(folder / "llm", folder / "visual", self.prompter.family, self.prompter.dims)
        compared = (
            compare_prompts(self.prompter, bundled, self.samples),
            compare_onnx(folder, self.precision, self.records, self.recipe),
        )
        entries = [entry for one in compared for entry in (*one.export_error, *one.selection)]
        return [check.failure for entry in entries for check in entry.checks if check.failure]

    def outputs(self, folder: Path) -> Iterator[np.ndarray]:
        """All that a user gets to see."""
        model = OnnxModel(folder, threads=1)
        for record in self.records:
            run = model.prefill(record.prompt, PRUNE.num_keep(record.prompt.image_lengths))
            yield from (run.logits, *run.kept, *run.cache.tensors.values())
            yield model.step(run.cache, record.tokens[0], record.prompt.next_position)[0]


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def healthy(
    request: pytest.FixtureRequest,
    model: Any,
    source: Source,
    prompter: Prompter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Healthy:
    precision, folder = request.param, tmp_path_factory.mktemp("healthy")
    write_onnx(source, precision, folder / "onnx", prune_layers=(2,), scales=SCALES)
    copy_sidecars(source.checkpoint, folder / "onnx")
    oracle = Oracle(
        model=model,
        family=prompter.family,
        prompter=prompter,
        prune=PRUNE,
        scales=SCALES,
        precision=precision,
        onnx=folder / "onnx",
        fp32_onnx=folder / "onnx",
        eos_token_ids=(),
    )
    sizes = ((140, 196), (84, 336))
    samples = asked(
        [[Turn("user", [noise(*size, seed), "what color is the star ?"])] for seed, size in enumerate(sizes)]
    )
    (folder / "records").mkdir()
    records = write_records(folder / "records", oracle, samples, 3)
    return Healthy(folder / "onnx", precision, prompter, samples, records)


def test_there_are_twenty_kinds() -> None:
    assert len({fault.plant for fault in FAULTS}) >= 20


def test_a_healthy_export_passes(healthy: Healthy) -> None:
    assert healthy.failures(healthy.folder) == []


FIRST_OF_FILE = [*{fault.file: fault for fault in reversed(FAULTS)}.values()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("healthy", "fault"),
    [
        # Noise hides least in FP32, of which one fault of each file will do for `make test`.
        pytest.param(
            *(precision, fault),
            id=f"{precision}-{fault.name}",
            marks=() if fault in {"fp16": KINDS, "fp32": FIRST_OF_FILE}[precision] else pytest.mark.exhaustive,
        )
        for precision in ("fp32", "fp16")
        for fault in FAULTS
    ],
    indirect=["healthy"],
    scope="module",
)
def test_a_planted_fault_fails_the_gates(healthy: Healthy, tmp_path: Path, fault: Fault) -> None:
    folder = shutil.copytree(healthy.folder, tmp_path / "onnx")
    fault.into(folder)
    assert healthy.failures(folder)


@pytest.mark.parametrize("fault", HARMLESS, ids=lambda fault: fault.name)
def test_what_harms_nobody_is_seen_inside_alone(healthy: Healthy, tmp_path: Path, fault: Fault) -> None:
    folder = shutil.copytree(healthy.folder, tmp_path / "onnx")
    fault.into(folder)
    for own, wanted in zip(healthy.outputs(folder), healthy.outputs(healthy.folder), strict=True):
        np.testing.assert_array_equal(own, wanted)
    failures = healthy.failures(folder)
    assert failures
    assert all("hidden" in failure for failure in failures)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An exported bundle, and the pictures that it is validated on."""
    pictures = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate(((140, 196), (84, 336))):
        noise(*size, index).save(pictures / f"{index}.png")
    parity = RECIPE.parity.model_copy(update={"prompts": 2, "steps": 3, "accuracy_samples": 2})
    recipe = RECIPE.model_copy(update={"parity": parity})
    folder = tmp_path_factory.mktemp("bundle")
    building = Building.of(recipe, Bundle(folder), checkpoint, images=pictures)
    building.calibrate()
    building.export()
    return folder, pictures


IN_BUNDLES = [fault for fault in FAULTS if not fault.file.endswith(".onnx") or "positions" in fault.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        # A graph and a file beside them.
        pytest.param(fault, marks=() if fault.name.startswith(("decode", "tokenizer")) else pytest.mark.exhaustive)
        for fault in IN_BUNDLES
    ],
    ids=lambda fault: fault.name,
)
def test_a_bundle_is_refused_by_its_hashes_and_fails_where_they_agree(
    bundle: tuple[Path, Path], tmp_path: Path, fault: Fault
) -> None:
    folder = shutil.copytree(bundle[0], tmp_path / "bundle")
    faulty = Bundle(folder)
    building = Building.recorded(faulty, images=bundle[1])
    fault.into(folder / "onnx")
    with pytest.raises(CapaError, match=f"onnx/{fault.file}: missing or changed"):
        building.validate()
    stages = faulty.manifest["stages"]
    stages["export"]["files"][f"onnx/{fault.file}"] = file_digest(folder / "onnx" / fault.file)
    faulty.update(stages=stages)
    parity = building.validate()
    assert not parity.passed and parity.failures
