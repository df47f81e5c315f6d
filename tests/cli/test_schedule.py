"""`--schedule`, and the options that it replaces."""

import json
from pathlib import Path
from typing import Any

import pytest

from capa_export.base.errors import ExitCode
from tests.cli.conftest import Cli


def planned(cli: Cli, *options: object) -> tuple[dict[str, Any], str]:
    code, out, err = cli("plan", "-m", "tiny-qwen25vl", *options, "--json")
    assert code == ExitCode.OK, err
    # The rest tells of this machine, which others use too.
    plan = json.loads(out)
    return {key: plan[key] for key in ("stages", "linear_layers_from", "prefill", "kv_cache", "decode")}, err


def places(plan: dict[str, Any]) -> list[tuple[str, int]]:
    return [(stage["selector"], stage["layer"]) for stage in plan["stages"]]


def test_a_plan_of_several_stages(cli: Cli) -> None:
    plan, err = planned(cli, "--schedule", "divprune:0.5+capa@2:0.9")
    assert places(plan) == [("divprune", -1), ("capa", 2)] and not err
    assert [round(stage["kept"] / stage["visual"], 1) for stage in plan["stages"]] == [0.5, 0.1]


REPLACED = {
    ("--prune-layer", "2"): "--prune-layer 2 is --schedule capa@2:0.75",
    ("--selector", "divprune"): "--selector divprune is --schedule divprune:0.75",
    ("--ratio", "0.5", "--selector", "fastv"): "--ratio 0.5 --selector fastv is --schedule fastv@2:0.5",
    ("--prune-layer", "1", "--no-ffn"): "--prune-layer 1 --no-ffn is --schedule capa@1:0.75/full",
}


@pytest.mark.parametrize(("options", "said"), REPLACED.items(), ids=map(" ".join, REPLACED))
def test_what_it_replaces_works_and_says_what_to_write(cli: Cli, options: tuple[str, ...], said: str) -> None:
    plan, err = planned(cli, *options)
    assert err == f"{said} from the next version on\n"
    schedule = said.rsplit(maxsplit=1)[-1]
    assert planned(cli, "--schedule", schedule) == (plan, "")


def test_a_ratio_alone_is_sugar(cli: Cli) -> None:
    assert planned(cli, "--ratio", "0.5") == planned(cli, "--schedule", "capa@2:0.5")


def test_a_bundle_is_built_with_it(cli: Cli, recipe: Path, pictures: Path, tmp_path: Path) -> None:
    """Several stages in place of the recipe's one, with every FFN as it is; `evaluate` calls it by the same words."""
    where = ("--checkpoint", json.loads(cli("plan", "-m", recipe, "--json")[1])["checkpoint"], "-m", recipe)
    out = tmp_path / "out"
    code, _, err = cli("export", *where, "--schedule", "capa@1:0.5+capa@3:0.75/full", "-o", out)
    assert code == ExitCode.OK, err
    manifest = json.loads((out / "capa_manifest.json").read_text())
    schedule = manifest["recipe"]["prune"]["schedule"]
    assert [(stage["layer"], stage["ratio"]) for stage in schedule] == [(1, 0.5), (3, 0.75)]
    assert manifest["stages"]["export"]["result"]["linear_layers"] == []
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": str(pictures / "0.png"), "question": "what ?", "answer": "red"}))
    ask = ("evaluate", out, "--data", rows, "-o", tmp_path / "answers", "--max-new-tokens", 2, "--json")
    code, shown, err = cli(*ask, "--method", "capa@1:0.5+capa@3:0.9")
    assert code == ExitCode.OK, err
    assert [one["method"] for one in json.loads(shown)["methods"]] == ["dense", "capa@1:0.5+capa@3:0.9"]
