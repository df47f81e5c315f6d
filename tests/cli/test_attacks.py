"""Whatever somebody else's file says, a command refuses it in one line, or does what it is for."""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.attacks.accepted import ACCEPTED
from tests.attacks.configs import KEYS, SIZES, TYPES, TYPES_OF_VALUES
from tests.attacks.files import FOLDERS, MANIFESTS, PLACES, PROCESSORS, RECIPES, STRANGE, WEIGHTS
from tests.attacks.inputs import OPTIONS, PICTURES, PROMPTS
from tests.attacks.others import KEYS as WRONG_KEYS
from tests.attacks.others import KITS, PIPES, QUANTIZED, TARGETS
from tests.attacks.outcome import outcome_of, outcomes
from tests.attacks.victims import Attack, Victim

KINDS: dict[str, Mapping[str, Attack]] = {
    "sizes": SIZES,
    "types": TYPES,
    "folders": FOLDERS,
    "manifests": MANIFESTS,
    "processors": PROCESSORS,
    "recipes": RECIPES,
    "weights": WEIGHTS,
    "pictures": PICTURES,
    "prompts": PROMPTS,
    "options": OPTIONS,
    "pipes": PIPES,
    "keys": WRONG_KEYS,
    "targets": TARGETS,
    "kits": KITS,
    "quantized": QUANTIZED,
}
SAMPLED = ("types", "manifests")
"""Kinds whose values are right in some places: a name may be any text."""


def test_every_place_is_attacked() -> None:
    """By every command; and every value stands somewhere."""
    for attacks, places, kinds, commands in (
        (MANIFESTS, PLACES, STRANGE, ("inspect", "run", "validate", "doctor", "compare")),
        (TYPES, KEYS, TYPES_OF_VALUES, ("export", "calibrate")),
    ):
        for place in places:
            assert all(any(name.startswith(f"{command}: {place} ") for name in attacks) for command in commands)
        assert all(any(name.endswith(f" {kind}") for name in attacks) for kind in kinds)


def test_a_limit_of_memory_is_no_refusal(tmp_path: Path) -> None:
    """Of this test's own: what only it ends would have taken what there is."""
    for text in ("error: x.json: Unable to allocate 4 GiB", "error: std::bad_alloc", "MemoryError"):
        (tmp_path / "0.text").write_text(text)
        (tmp_path / "0.code").write_text("3")
        assert outcome_of(tmp_path, 0).verdict == "memory"


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
    record_property: Callable[[str, object], None],
) -> None:
    """With `--junitxml` the counts of docs/security.md are among the properties."""
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
    record_property(kind, dict(Counter(outcome.verdict for outcome in found.values())))
    assert not wrong, "\n".join(f"{name}: {ended}" for name, ended in wrong.items())
