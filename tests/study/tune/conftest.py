"""A recipe and a calibration for the small random model, whose weights are linear nowhere near 0.96."""

import pytest

from capa_export.calibrate.sums import Calibration, LayerSums
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.model.source import Source
from capa_export.selectors.selector import selectors
from capa_export.study.tune.candidates import Candidates
from capa_export.study.tune.costs import Costs, PromptShape
from tests.calibrate.effects import harmless


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    data = load_recipe("qwen25vl").model_dump()
    data["prune"] = {"schedule": [{"layer": 1, "ratio": 0.75}]}
    return Recipe(**{**data, "ffn": {"eta": 0.5, "budget": 100}})


@pytest.fixture(scope="session")
def calibration(recipe: Recipe) -> Calibration:
    """Cosines of 0.2 to 0.96 in the five layers."""
    layers = [LayerSums.zeros(64) for _ in range(5)]
    for layer, cosine in zip(layers, (0.2, 0.55, 0.91, 0.94, 0.96), strict=True):
        layer.visual_tokens, layer.visual_cosine = 1, cosine
    return harmless(Calibration("digest", 1, layers, {}), recipe.ffn)


@pytest.fixture(scope="session")
def costs(source: Source) -> Costs:
    """Of one prompt with two pictures, and of one that comes twice."""
    shapes = [PromptShape((64, 32), 30), PromptShape((256,), 20), PromptShape((256,), 20)]
    return Costs(source.dims.decoder, 1, shapes)


@pytest.fixture
def candidates(recipe: Recipe, calibration: Calibration, costs: Costs) -> Candidates:
    return Candidates(recipe, selectors(), calibration, costs, 0.4)
