"""Numbers as people write them on the command line: `8GB`, `50%`."""

import re
from math import inf

from capa_export.base.errors import CapaError, ExitCode

__all__ = ["parse_budget", "parse_bytes"]

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_bytes(text: str) -> int:
    """Parse a size such as `8GB`, `7.5GB`, `8GiB` or `8000MB` into bytes.

    Raises:
        CapaError: the text is no size, or has no unit.
    """
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) *([a-z]+)", text.strip().lower())
    size = float(found[1]) * units[found[2]] if found and found[2] in units else 0
    if not 1 <= size < inf:
        raise CapaError(
            f"--memory {text}: must be a size above 0 with its unit, as 8GB, 7.5GB, 8GiB or 8000MB", ExitCode.USAGE
        )
    return int(size)


def parse_budget(text: str) -> float:
    """Parse a budget of FLOPs: a fraction of dense, as `0.25` or `25%`, or a number of FLOPs, as `2.5e12`.

    Raises:
        CapaError: the text is no number, or a percentage that saves nothing.
    """
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = float("nan")
    if not value > 0 or value == float("inf") or (percent and value >= 1):
        raise CapaError(
            f"--budget {text}: must be a fraction of dense, as 0.25 or 25%, or FLOPs a prompt, as 2.5e12",
            ExitCode.USAGE,
        )
    return value
