"""The benchmark of selectors: figures worked out by hand."""

from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch

from benchmarks.selection.figures import SinkDefinition, SinkFigures
from benchmarks.selection.measure import sinks, stability
from benchmarks.selection.measure.statistics import bimodality, hellinger, overlap, spearman, split, spread_of
from benchmarks.selection.pages import sinks as sinks_page
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.model.families import qwen25vl
from capa_export.selectors.selector import SelectorChoice
from tests.conftest import noise

# Statistics.


def test_hellinger_of_known_distributions() -> None:
    assert hellinger([0.0, 0.0], [0.0, 0.0]) == 0
    assert hellinger([0.0, -1000.0], [-1000.0, 0.0]) == 1
    # (1/2, 1/2) against (1, 0).
    assert hellinger([3.0, 3.0], [0.0, -1000.0]) == pytest.approx(np.sqrt(1 - np.sqrt(0.5)))
    # (1/4, 3/4) against (3/4, 1/4).
    logits = np.log([0.25, 0.75])
    assert hellinger(logits, logits[::-1]) == pytest.approx(np.sqrt(1 - np.sqrt(3) / 2))
    # What 1 - sum sqrt(p q) would lose.
    assert hellinger([0.0, 0.0], [0.0, 1e-9]) == pytest.approx(1e-9 / np.sqrt(32), rel=1e-3)


def test_percentiles_over_tokens() -> None:
    found = spread_of(np.arange(101) / 100, 0.96)
    assert (found.mean, found.p05, found.p25, found.p50, found.p75, found.p95) == pytest.approx(
        (0.5, 0.05, 0.25, 0.5, 0.75, 0.95)
    )
    # 0.00 to 0.96.
    assert found.below == pytest.approx(97 / 101)


def test_two_groups_are_told_from_one() -> None:
    rng = np.random.default_rng(0)
    two = np.concatenate([rng.normal(-3, 0.5, 4000), rng.normal(3, 0.5, 4000)])
    one, flat, skewed = rng.normal(size=8000), np.linspace(0, 1, 8000), rng.gamma(0.3, size=8000)
    assert bimodality(two) > 0.9 and split(two) > 0.95
    assert bimodality(one) == pytest.approx(1 / 3, abs=0.03)
    assert split(one) == pytest.approx(2 / np.pi, abs=0.02)
    assert bimodality(flat) == pytest.approx(5 / 9, abs=1e-3)
    assert split(flat) == pytest.approx(0.75, abs=1e-3)
    # Skewness alone deceives the one, and not the other.
    assert bimodality(skewed) > 5 / 9 and split(skewed) < 0.75


def test_rankings_compare() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # d = 0, 1, -1: 1 - 6 * 2 / (3 * 8).
    assert spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    # Ranks 1.5, 1.5, 3 against 1, 2, 3.
    assert spearman([5, 5, 9], [1, 2, 3]) == pytest.approx(np.sqrt(3) / 2)
    assert spearman([1, 1], [1, 2]) == 0
    assert overlap([9, 8, 1, 0], [0, 9, 8, 1], 2) == 0.5


def test_the_groups_of_sinks_are_those_planted() -> None:
    """Layer 0: dumps and anchors. Layer 1: anchors. Layer 2: too few to tell. Layer 3: none."""
    rng = np.random.default_rng(0)
    level_LN = rng.normal(0, 0.1, (4, 200))
    is_LN = np.zeros((4, 200), bool)
    is_LN[:2, :40], is_LN[2, :3] = True, True
    level_LN[0, :20] -= 2
    level_LN[0, 20:40] += 1
    level_LN[1, :40] += 1
    level_LN[2, :3] -= 1
    found = sinks.of_definition("planted", "planted", is_LN, level_LN)
    assert [one.sinks for one in found.layers] == [40, 40, 3, 0]
    both, anchors, few, none = found.layers
    assert both.split is not None and both.split > 0.95
    assert anchors.contribution == pytest.approx(10, rel=0.2)
    assert few.coefficient is None and few.contribution == pytest.approx(0.1, rel=0.3)
    assert none.contribution is None
    assert sum(found.histogram[0]) == pytest.approx(1) and sum(found.histogram[1]) == pytest.approx(1)
    (said,) = sinks_page.findings(_sinks(found, hidden_size=4096))
    assert said.startswith("Sinks by planted: in layers 0-2; their contribution falls into two groups in 1 of the 2")
    assert said.endswith("layers that have enough of them to tell (0).")


def _sinks(definition: SinkDefinition, hidden_size: int) -> SinkFigures:
    return SinkFigures(
        hidden_size=hidden_size,
        visual_tokens=200,
        max_phi=(5.0,) * 4,
        channels=(),
        edges=sinks.EDGES,
        definitions=(definition,),
    )


def test_it_is_said_where_there_are_no_sinks() -> None:
    nothing = sinks.of_definition("phi", "phi > 20", np.zeros((4, 200), bool), np.zeros((4, 200)))
    first, second = sinks_page.findings(_sinks(nothing, hidden_size=192))
    assert first.startswith("phi cannot pass 20 here: of 192 channels it is at most 13.9, and 5.0 is the most")
    assert second == "Sinks by phi: none among 200 visual tokens in any layer."
    # A wide model's could.
    assert list(sinks_page.findings(_sinks(nothing, hidden_size=4096))) == [second]
    assert ET.fromstring(sinks_page.plots(_sinks(nothing, 192))).tag.endswith("svg")  # noqa: S314 - our own.


# Scores of generated tokens.


def test_each_query_scores_as_if_it_ended_the_prompt(model: Any, prompter: Any) -> None:
    """Against the eager model that prunes, which shares no code with it."""
    prompt = prompter("what is it ?", [noise(84, 56)])
    is_visual = torch.from_numpy(prompt.is_visual)
    text = model.model.language_model
    answer = [7, 11]
    with torch.inference_mode():
        inputs = EagerInputs.of(qwen25vl.eager_inputs(model, prompt))
        found = stability.by_query(text, inputs, is_visual, answer)
    layers = len(text.layers)
    keep = dict.fromkeys(range(layers), int(is_visual.sum()))
    for count in range(3):
        tokens = torch.tensor([answer[:count]], dtype=torch.long)
        further = prompt.next_position + torch.arange(count)
        longer = EagerInputs(
            torch.cat([inputs.embeds, text.embed_tokens(tokens)], 1).detach(),
            torch.cat([inputs.position_ids, further.expand(3, 1, -1)], -1),
        )
        visual = torch.cat([is_visual, torch.zeros(count, dtype=torch.bool)])
        for score in ("capa", "attention"):
            plan = EagerPlan(keep=keep, selectors=dict.fromkeys(range(layers), SelectorChoice(score)))
            scores = Eager(model).prefill(longer, visual, plan).scores
            for layer in range(layers):
                expected = scores[layer][visual].numpy()
                np.testing.assert_allclose(found[score][layer, count], expected, rtol=2e-4, atol=1e-7)
