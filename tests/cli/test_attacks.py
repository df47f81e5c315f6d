"""Whatever somebody else's file says, a command refuses it in one line, or does what it is for."""

import shutil
from collections import Counter
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
ROWS = {
    "sizes": "sizes in a config or an image processor",
    "types": "types in config, processor and tokenizer settings",
    "folders": "folders where files are expected, and files where folders are",
    "manifests": "what a manifest says",
    "processors": "what a bundle says of its image processor",
    "recipes": "recipes",
    "weights": "weights that are zero, huge, empty or too many",
    "pictures": "pictures and videos",
    "prompts": "templates, tokenizers, prompts, generation settings",
    "options": "options of the command line",
}
"""Kind -> its row in docs/security.md."""


@pytest.mark.slow
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
    }
    assert not wrong, wrong
    counts = Counter(outcome.verdict for outcome in found.values())
    docs = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    assert f"| {ROWS[kind]} | {len(found)} | {counts['refused']} | {counts['accepted']} | 0 | 0 |" in docs
