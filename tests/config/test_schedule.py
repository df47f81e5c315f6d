"""The grammar of methods and schedules: what it reads, and what it says of what it does not."""

import subprocess
import sys

import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.config.recipe import load_recipe
from capa_export.config.schedule import Prune, Stage, parse_method, parse_schedule, schedule_text

READ = {
    "capa@3:0.75": (Stage(layer=3, ratio=0.75),),
    "fastv:0.5": (Stage(selector="fastv", layer=2, ratio=0.5),),
    "divprune:0.5+capa-mmr@4:0.9{balance=0.7,hidden=1}": (
        Stage(selector="divprune", ratio=0.5),
        Stage(selector="capa-mmr", layer=4, ratio=0.9, options={"balance": 0.7, "hidden": 1}),
    ),
    "capa@2:1e-1": (Stage(layer=2, ratio=0.1),),
    "capa@2:0": (Stage(layer=2, ratio=0),),
}


@pytest.mark.parametrize(("text", "stages"), READ.items())
def test_what_is_written_is_read_and_written_again(text: str, stages: tuple[Stage, ...]) -> None:
    assert parse_schedule(text).stages == stages
    assert parse_schedule(schedule_text(stages)).stages == stages


@pytest.mark.parametrize(
    ("text", "ffn", "eta"),
    [
        ("capa@3:0.75", "scale", None),
        ("capa@3:0.75/scale", "scale", None),
        ("capa@3:0.75/full", "full", None),
        ("capa@3:0.75/eta=0.9", "scale", 0.9),
    ],
)
def test_behind_a_slash_stands_what_becomes_of_visual_ffns(text: str, ffn: str, eta: float | None) -> None:
    method = parse_schedule(text)
    assert (method.ffn, method.eta) == (ffn, eta)


BAD = {
    "capa@3": "'capa@3' is no stage",
    "capa@-1:0.5": "'capa@-1:0.5' is no stage",
    f"capa@{'9' * 5000}:0.5": "is no stage",
    "capa@3:0.5+": "ratio '0.5+' is no number",
    "capa@3:1": "ratio: Input should be less than 1",
    "capa@3:0.5+divprune:0.6": "layers must rise and ratios must not fall",
    "capa:0.5": "selector capa needs a layer of 0 or more",
    "divprune@3:0.5": "divprune acts before the decoder and takes no layer",
    "nearest@3:0.5": "unknown selector 'nearest'; known selectors: ",
    "capa-mmr@3:0.5{balance}": "option 'balance': write name=value",
    "capa-mmr@3:0.5{balance=x}": "balance 'x' is no number",
    "capa@3:0.5/half": "unknown 'half'; known: scale, full, skip, per-image, eta=NUMBER",
    "capa@3:0.5/eta=2": "eta must be between 0 and 1",
    "": "'' is no stage",
}


@pytest.mark.parametrize(("text", "problem"), BAD.items(), ids=[str(index) for index in range(len(BAD))])
def test_a_mistake_is_one_line_with_an_example(text: str, problem: str) -> None:
    for parse, what in ((parse_method, "method"), (parse_schedule, "--schedule")):
        with pytest.raises(CapaError) as refusal:
            parse(text)
        said = str(refusal.value)
        assert said.startswith(f"{what} {text!r}: ") and problem in said and "\n" not in said
        assert said.endswith("; write selector@layer:ratio, as capa@2:0.75 or divprune:0.9/full, stages joined with +")
        assert refusal.value.code == ExitCode.USAGE


@pytest.mark.parametrize("text", ["dense", "dense/scale", "capa@3:0.5/skip", "capa@3:0.5/per-image"])
def test_a_schedule_is_what_a_graph_holds(text: str) -> None:
    assert parse_method(text).name == text
    with pytest.raises(CapaError, match=r"^--schedule .*; write ") as refusal:
        parse_schedule(text)
    assert refusal.value.code == ExitCode.USAGE


def test_a_schedule_goes_in_place_of_the_recipes() -> None:
    recipe = load_recipe("qwen25vl")
    staged = recipe.with_options(schedule=parse_schedule("capa@1:0.5+capa@4:0.9/eta=0.9"))
    assert schedule_text(staged.prune.schedule) == "capa@1:0.5+capa@4:0.9"
    assert staged.ffn == recipe.ffn.model_copy(update={"eta": 0.9})
    assert staged.model_copy(update={"prune": recipe.prune, "ffn": recipe.ffn}) == recipe
    with pytest.raises(CapaError, match=r"2 stages, .* as --schedule capa@1:0.5\+capa@4:0.9$"):
        staged.with_options(ratio=0.5)
    one = staged.with_options(schedule=parse_schedule("fastv:0.5/full"))
    assert one.prune == recipe.prune.model_copy(update={"schedule": (Stage(selector="fastv", ratio=0.5),)})
    assert isinstance(one.prune, Prune) and one.ffn == staged.ffn


def test_the_grammar_needs_no_recipe() -> None:
    script = "import sys, capa_export.config.schedule; sys.exit('capa_export.config.recipe' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
