"""Whatever somebody else's file says, a command refuses it in one line, or does what it is for."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.attacks.accepted import ACCEPTED
from tests.attacks.configs import SIZES, TYPES
from tests.attacks.files import FOLDERS, MANIFESTS, PROCESSORS, RECIPES, WEIGHTS
from tests.attacks.inputs import OPTIONS, PICTURES, PROMPTS
from tests.attacks.outcome import outcomes
from tests.attacks.victims import Attack, Victim


def every(step: int, attacks: Mapping[str, Attack]) -> dict[str, Attack]:
    """One in so many of a large table."""
    return dict(list(attacks.items())[::step])


KINDS: dict[str, Mapping[str, Attack]] = {
    "sizes": SIZES,
    "types": every(7, TYPES),
    "folders": FOLDERS,
    "manifests": every(23, MANIFESTS),
    "processors": PROCESSORS,
    "recipes": RECIPES,
    "weights": WEIGHTS,
    "pictures": PICTURES,
    "prompts": PROMPTS,
    "options": OPTIONS,
}
SAMPLED = ("types", "manifests")
"""Kinds whose values are right in some places: a name may be any text."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_attacks(
    kind: str,
    checkpoint: Path,
    recipe: Path,
    pictures: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    commands: list[list[object]] = []
    for number, attack in enumerate(KINDS[kind].values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        commands.append(attack(Victim(checkpoint, recipe, pictures, bundle, folder)))
    place = tmp_path / "streams"
    place.mkdir()
    found = dict(zip(KINDS[kind], outcomes(commands, place), strict=True))
    shutil.rmtree(tmp_path, ignore_errors=True)
    wrong = {
        name: (outcome.verdict, outcome.code, outcome.text[-600:])
        for name, outcome in found.items()
        if outcome.verdict != ("accepted" if name in ACCEPTED else "refused")
        and not (kind in SAMPLED and outcome.verdict == "accepted")
    }
    assert not wrong, wrong
