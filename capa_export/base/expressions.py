"""Judges regular expressions that come with a checkpoint by the time that they might take."""

import re

__all__ = ["backtracks"]

_PIECE = re.compile(
    r"\\.|\[\^?\]?(?:\\.|\[[^\]]*\]|[^\]\\])*\]|(?P<open>\()|(?P<close>\))(?P<times>[*+]|\{\d*,?\d*\})?|"
    r"(?P<single>[*+]|\{\d*,\d*\})",
    re.DOTALL,
)
"""An escape, a class of characters, either end of a group, or how often something is found."""


def backtracks(expression: str) -> bool:
    """Whether a group that is repeated has something in it that is repeated any number of times, as in `(.+)+x`.

    Where such an expression fails, there are as many ways to fail as ways to divide what it finds, and every character
    doubles them.
    """
    repeats = [False]
    for piece in _PIECE.finditer(expression):
        if piece["open"]:
            repeats.append(False)
        elif piece["close"] and len(repeats) > 1:
            inner = repeats.pop()
            if inner and piece["times"]:
                return True
            repeats[-1] |= inner or bool(piece["times"])
        elif piece["single"]:
            repeats[-1] = True
    return False
