"""What a schedule may ask of a selector, refused in one line where it makes no sense."""

from types import SimpleNamespace
from typing import Any

import pytest

from capa_export.base.errors import CapaError
from capa_export.config.recipe import load_recipe
from capa_export.config.schedule import Prune, Stage
from capa_export.selectors.selector import Option, SelectorChoice, Size, load_selector, selectors

RECIPE = """family = "qwen25vl"
checkpoint = "x/y"
[prune]
schedule = [{schedule}]
"""

BAD = [
    ('{ selector = "vispruner", ratio = 0.5, options = { important = 1.5 } }', "from 0 to 1, not 1.5"),
    ('{ selector = "adafv-style", ratio = 0.5, options = { temperature = 0 } }', "of 1e-06 or more, not 0"),
    ('{ selector = "adafv-style", ratio = 0.5, options = { temperature = inf } }', "or more, not inf"),
    ('{ selector = "adafv-style", ratio = 0.5, options = { temperature = nan } }', "or more, not nan"),
    ('{ selector = "dart", ratio = 0.5, options = { visual_pivots = 0 } }', "a whole number from 1 to 64, not 0"),
    ('{ selector = "dart", ratio = 0.5, options = { text_pivots = 2.5 } }', "a whole number from 0 to 64, not 2.5"),
    ('{ selector = "feather", layer = 2, ratio = 0.5, options = { stride = 0 } }', "of 1 or more, not 0"),
    ('{ selector = "feather", layer = 2, ratio = 0.5, options = { grid = 2 } }', "from 0 to 1, not 2"),
    ('{ selector = "random", layer = 2, ratio = 0.5, options = { seed = -1 } }', "of 0 or more, not -1"),
    ('{ selector = "capa-mmr", layer = 2, ratio = 0.5, options = { chunks = 65 } }', "from 1 to 64, not 65"),
    ('{ selector = "iwp-style", layer = 2, ratio = 0.5, options = { balance = -0.1 } }', "from 0 to 1, not -0.1"),
    (
        '{ selector = "capa", layer = 2, ratio = 0.5, options = { seed = 1 } }',
        "has no option 'seed'; its options: none",
    ),
    ('{ selector = "nearest", layer = 2, ratio = 0.5 }', "unknown selector 'nearest'; known selectors: adafv-style"),
    ('{ selector = "divprune", layer = 2, ratio = 0.5 }', "divprune acts before the decoder and takes no layer"),
    ('{ selector = "fastv", layer = 0, ratio = 0.5 }', "fastv needs a layer of 1 or more"),
    ("{ ratio = 0.5 }", "selector capa needs a layer of 0 or more"),
    (
        '{ layer = 2, ratio = 0.5 }, { selector = "fastv", layer = 3, ratio = 0.7 }',
        "fastv at layer 3 reads the attention of layer 2",
    ),
    ('{ layer = 2, ratio = 0.5 }, { selector = "divprune", ratio = 0.7 }', "layers must rise"),
]


@pytest.mark.parametrize(("schedule", "reason"), BAD)
def test_a_recipe_is_refused_in_one_line(tmp_path: Any, schedule: str, reason: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE.format(schedule=schedule), encoding="utf-8")
    with pytest.raises(CapaError) as refusal:
        load_recipe(str(path))
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", selectors())
def test_defaults_are_within_their_own_limits(name: str) -> None:
    for setting in load_selector(name).options.values():
        assert setting.problem(setting.default) is None


def test_one_that_was_published_with_a_layer_acts_there() -> None:
    assert Stage(selector="fastv", ratio=0.5).layer == 2
    assert Stage(selector="fastv", ratio=0.5, layer=4).layer == 4
    assert Stage(selector="divprune", ratio=0.5).layer == -1


@pytest.mark.parametrize(
    ("given", "layer"),
    [
        ({"selector": "capa"}, 3),
        ({"selector": "attention"}, 3),
        ({"selector": "fastv"}, 2),
        ({"selector": "fastv", "prune_layer": 7}, 7),
        ({"selector": "divprune"}, -1),
    ],
)
def test_the_command_line_puts_another_in_its_place(given: dict[str, Any], layer: int) -> None:
    (stage,) = load_recipe("qwen25vl").with_options(**given).prune.schedule
    assert (stage.selector, stage.layer, stage.ratio) == (given["selector"], layer, 0.75)


def test_a_layer_for_one_that_has_none_is_refused() -> None:
    with pytest.raises(CapaError, match=r"divprune acts before the decoder and takes no layer; write selector@layer"):
        load_recipe("qwen25vl").with_options(selector="divprune", prune_layer=3)
    before = load_recipe("qwen25vl").with_options(selector="divprune")
    with pytest.raises(CapaError, match=r"selector capa needs a layer of 0 or more; write selector@layer:ratio, as"):
        before.with_options(selector="capa")


def test_fewer_tokens_than_a_method_needs_is_a_clear_line() -> None:
    cases: list[tuple[dict[str, Option], int]] = [({}, 4), ({"visual_pivots": 2}, 2)]
    for options, least in cases:
        prune = Prune(schedule=(Stage(selector="dart", ratio=0.9, options=options),))
        assert prune.num_keep([10 * least]) == [least]
        refusal = f"selector dart chooses {least} tokens or more, and ratio 0.9 leaves 1 of 10"
        with pytest.raises(CapaError, match=refusal):
            prune.num_keep([10])
        # Of no more than it needs, all stay.
        assert prune.num_keep([1]) == [1]


def cost(name: str, **options: Option) -> int:
    """Of scoring 1000 tokens, 900 of them visual, with 100 to keep."""
    dims: Any = SimpleNamespace(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
    values = SelectorChoice(name, options).values
    return load_selector(name).flops(Size(tokens=1000, visual=900, keep=100, dims=dims, options=values))


def test_costs_follow_the_options() -> None:
    pairs = 1000**2
    for name in ("capa-mmr", "iwp-style"):
        assert cost(name, chunks=20) - cost(name) == 2 * (20 - 8) * pairs
    assert cost("capa-mmr") - cost("capa-mmr", hidden=1) == cost("capa")
    assert cost("dart", visual_pivots=9) - cost("dart") == 5 * (4 * 64 * 1000 + pairs)
    # 800 go, 8 a round.
    assert cost("vispruner") == 2 * pairs * (64 + 100 + 2)


@pytest.mark.parametrize("name", ["adafv-style", "feather", "random", "vispruner"])
def test_options_that_move_a_threshold_cost_nothing(name: str) -> None:
    options = load_selector(name).options
    assert options
    for option, setting in options.items():
        assert cost(name, **{option: setting.default + 1}) == cost(name)
