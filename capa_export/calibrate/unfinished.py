"""The sums of a calibration that is under way, kept on disk so that an interrupted one goes on from there."""

import os
from dataclasses import dataclass
from pathlib import Path

from capa_export.base.errors import CapaError
from capa_export.calibrate.sums import Calibration

__all__ = ["UnfinishedSums"]

_STATE = "sums.safetensors"


@dataclass(frozen=True, slots=True)
class UnfinishedSums:
    """What a calibration has measured so far, in a folder that outlives an interruption."""

    folder: Path

    def load(self) -> Calibration | None:
        """The sums of as many steps as its `samples` say; None where no step was finished."""
        try:
            return Calibration.load(self.folder / _STATE)
        except CapaError:
            # There are none, or the machine went down before they were on the disk.
            return None

    def keep(self, sums: Calibration) -> None:
        """Put sums in the place of those before, whole or not at all.

        Raises:
            CapaError: they cannot be written.
        """
        fresh = self.folder / f"{_STATE}.new"
        sums.save(fresh)
        os.replace(fresh, self.folder / _STATE)
