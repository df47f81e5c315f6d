"""The lessons that test beds are taught, in phases."""

from dataclasses import dataclass

from benchmarks.tiny.batches import Lesson

__all__ = ["BASIC", "FURTHER", "Phase"]

_EASY = {"color_of": 6, "shape_of": 4}
_ALL = {"color_of": 3, "shape_of": 2, "exists": 3, "same": 2}
_LOOK = Lesson(asked={}, heavy=0.3)
_READ = Lesson(asked={"number": 6, "count": 3}, clutter=0.6, heavy=0.3)
_PAIRS = Lesson(asked={"pictures": 6}, heavy=0.3)
_TWINS_ALONE = Lesson(asked={"relation": 8}, num_sprites=(6, 7), clutter=0.0)
_TWINS = Lesson(asked={"relation": 6}, heavy=0.3)
_REHEARSED = Lesson(asked=_ALL, heavy=0.3)


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a curriculum."""

    until: float
    """Share of the run at which it ends."""
    lessons: tuple[Lesson, ...]
    """Taken in turn, a batch each."""


# All kinds at once from the start never leave "some colour that is in the picture".
BASIC = (
    Phase(0.12, (Lesson(asked=_EASY, num_sprites=(2, 3), clutter=0.0),)),
    Phase(0.20, (Lesson(asked=_EASY, num_sprites=(3, 5), clutter=0.0),)),
    Phase(0.50, (Lesson(asked=_ALL, clutter=0.3),)),
    Phase(1.00, (Lesson(asked=_ALL),)),
)
FURTHER = (
    Phase(0.3, (_READ, *4 * (_LOOK,), _PAIRS, *4 * (_LOOK,), _REHEARSED, *4 * (_LOOK,))),
    Phase(0.5, (_READ, _LOOK, _PAIRS, _READ, _LOOK, _REHEARSED)),
    Phase(0.7, (*3 * (_TWINS_ALONE,), _REHEARSED, *3 * (_TWINS_ALONE,), _READ, *3 * (_TWINS_ALONE,), _PAIRS)),
    Phase(1.0, (_READ, _REHEARSED, _PAIRS, _TWINS)),
)
"""Phases for a bed that knows the basic kinds: small digits are first learnt by the tower alone.

With mRoPE the two alike stayed at chance for 500 steps. Once the change that they had made to another bed's decoder was
added to this one's, 100 steps were enough.
"""
