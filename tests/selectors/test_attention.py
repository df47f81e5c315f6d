"""The attention of the last prompt token, the mean over heads, by hand."""

from typing import Any

import numpy as np
import pytest

from capa_export.selectors.selector import load_selector
from tests.selectors.decoder_view import HEAD_SIZE, decoder_view
from tests.selectors.one_score import graph_scores, layout, reference_scores


@pytest.mark.parametrize("scores_of", [graph_scores, reference_scores])
@pytest.mark.parametrize("name", ["attention", "fastv"])
def test_scores_are_the_mean_over_heads(name: str, scores_of: Any) -> None:
    prompt = decoder_view(layout(3, 20, 4), 5)
    assert prompt.query is not None and prompt.key is not None
    expected = np.zeros(27)
    for head, query in enumerate(prompt.query.double().numpy()):
        weights = np.exp(prompt.key[head // 2].double().numpy() @ query / HEAD_SIZE**0.5)
        expected += weights / weights.sum() / 4
    np.testing.assert_allclose(scores_of(name, prompt)[3:23], expected[3:23], rtol=1e-5)


def test_fastv_drops_where_the_third_layer_begins() -> None:
    fastv, same_place = load_selector("fastv"), load_selector("attention")
    assert (fastv.place, fastv.layer, same_place.place) == ("entry", 2, "attention")
