"""Every selector in every family's graph: what it keeps and what the model says, against the eager model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capa_export.base.errors import CapaError
from capa_export.config.schedule import Stage, kept_tokens
from capa_export.export.graphs import write_onnx
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import Family, load_family
from capa_export.model.prompt import Prompt, Prompter
from capa_export.model.source import Source
from capa_export.run.onnx import OnnxModel
from capa_export.selectors.selector import SelectorChoice, load_selector, selectors
from tests.agreement import compare
from tests.conftest import noise
from tests.models import internvl3, llava15, qwen3vl, qwen25vl
from tests.products import once_each

ELIGIBLE: Mapping[str, Any] = {"qwen25vl": qwen25vl, "llava15": llava15, "internvl3": internvl3}
SCALES = {3: np.linspace(0.5, 1.5, 64)}
QUESTION = "what color is the star ?"


@lru_cache(maxsize=1)
def opened(folder: Path) -> OnnxModel:
    """Graphs for the next test too, which may ask them for another ratio."""
    return OnnxModel(folder, threads=1)


@dataclass(frozen=True)
class Subject:
    """A small random model, and its graphs with any schedule."""

    family: Family
    model: Any
    source: Source
    folder: Path

    def onnx(self, *stages: Stage) -> OnnxModel:
        chosen = {stage.layer: stage.chosen for stage in stages}
        folder = self.folder / "-".join(f"{stage.selector}{stage.layer}" for stage in stages)
        if not folder.exists():
            write_onnx(self.source, "fp32", folder, prune_layers=list(chosen), selectors=chosen, scales=SCALES)
        return opened(folder)

    @cached_property
    def prompter(self) -> Prompter:
        folder = self.source.checkpoint.folder
        return Prompter(folder, folder, self.family, self.source.dims)

    def prompt(self, *pictures: Any) -> Prompt:
        return self.prompter(QUESTION, pictures)

    def compare(self, prompt: Prompt, *stages: Stage) -> None:
        keep = {stage.layer: kept_tokens(prompt.num_visual, stage.ratio) for stage in stages}
        chosen = {stage.layer: stage.chosen for stage in stages}
        compare(self.family, self.model, self.onnx(*stages), prompt, keep, SCALES, 2e-5, selectors=chosen)


Make = Callable[[str], Subject]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Subject] = {}

    def subject(name: str) -> Subject:
        if name not in made:
            module, folder = ELIGIBLE[name], tmp_path_factory.mktemp(name)
            model = module.random_model()
            module.save_model(folder / "checkpoint", model)
            family = load_family(name)
            source = Source.of(open_checkpoint(str(folder / "checkpoint")), family)
            made[name] = Subject(family, model, source, folder)
        return made[name]

    return subject


def stage(name: str, ratio: float, layer: int = 2) -> Stage:
    """At a layer, unless the selector acts before the decoder."""
    given = {} if load_selector(name).place == "input" else {"layer": layer}
    return Stage(selector=name, ratio=ratio, **given)


@pytest.mark.parametrize(("family", "name", "ratio"), once_each(ELIGIBLE, selectors(), [0.5, 0.75]))
def test_the_graph_keeps_and_says_what_the_eager_model_does(make: Make, family: str, name: str, ratio: float) -> None:
    subject = make(family)
    subject.compare(subject.prompt(noise(112, 112)), stage(name, ratio))


SCHEDULES = {
    "before, at and inside": [stage("vispruner", 0.3), stage("fastv", 0.5, 2), stage("capa-mmr", 0.75, 3)],
    "feather in two stages": [
        Stage(layer=1, ratio=0.5, selector="feather"),
        Stage(layer=3, ratio=0.8, selector="feather", options={"stride": 2}),
    ],
    "the same twice": [stage("divprune", 0.5), stage("iwp-style", 0.7, 1)],
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("family", ELIGIBLE)
def test_a_schedule_takes_different_selectors(make: Make, family: str, schedule: list[Stage]) -> None:
    subject = make(family)
    subject.compare(subject.prompt(noise(112, 112), noise(84, 112, 1)), *schedule)


@pytest.mark.parametrize("name", selectors())
def test_a_prompt_without_a_picture_runs(make: Make, name: str) -> None:
    subject = make("qwen25vl")
    subject.compare(subject.prompt(), stage(name, 0.5))


def test_a_tower_that_does_not_say_what_it_attends_to_is_refused(tmp_path: Path) -> None:
    model, family = qwen3vl.random_model(), load_family("qwen3vl")
    source = Source.of(open_checkpoint(str(qwen3vl.save_model(tmp_path / "checkpoint", model))), family)
    with pytest.raises(CapaError, match="selector vispruner needs the vision tower's attention, which Qwen3VL"):
        write_onnx(
            source,
            "fp32",
            tmp_path / "onnx",
            prune_layers=(-1,),
            selectors={-1: SelectorChoice("vispruner")},
            scales={},
        )
    assert not (tmp_path / "onnx").exists()
    subject = Subject(family, model, source, tmp_path)
    subject.compare(subject.prompt(noise(128, 128)), stage("divprune", 0.4), stage("fastv", 0.75, 1))
