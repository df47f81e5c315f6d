"""The sums of a calibration that is under way, kept on disk so that an interrupted one can go on."""

import os
from dataclasses import dataclass
from pathlib import Path

from capa_export.base.errors import CapaError
from capa_export.calibrate.sums import Calibration

__all__ = ["UnfinishedSums"]

_STATE = "sums.safetensors"


@dataclass(frozen=True, slots=True)
class UnfinishedSums:
    """The sums of a calibration so far, in a folder that outlives an interruption."""

    folder: Path

    def load(self) -> Calibration | None:
        """Read the sums, of as many steps as their `samples` say; None where no step was finished."""
        try:
            return Calibration.load(self.folder / _STATE)
        except CapaError:
            # There are none, or the machine went down before they were on the disk.
            return None

    def keep(self, sums: Calibration) -> None:
        """Replace the stored sums, whole or not at all.

        Raises:
            CapaError: the sums cannot be written.
        """
        fresh = self.folder / f"{_STATE}.new"
        sums.save(fresh)
        os.replace(fresh, self.folder / _STATE)
