"""Fuzzes one reader with coverage as the guide: `python tests/fuzz/fuzz.py READER [FOLDER] [-max_total_time=SECONDS]`.

It needs atheris (`pip install atheris`), which is not among the requirements. FOLDER keeps what reached new code.
"""

import sys
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

with atheris.instrument_imports(include=["capa_export", "json", "tomllib"]):
    from capa_export.base.errors import CapaError
    from tests.fuzz.readers import READERS


def main() -> None:
    """Start from the good file, and stop at the first exception that is no CapaError."""
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"{__doc__}\nREADER is one of: {', '.join(READERS)}")
    reader = READERS[sys.argv.pop(1)]
    folder = Path(mkdtemp(prefix="capa-fuzz-"))
    seeds = folder / "seeds"
    seeds.mkdir()
    (seeds / "good").write_bytes(reader.good)

    def one(data: bytes) -> None:
        with suppress(CapaError):
            reader(folder, data)

    atheris.Setup([*sys.argv, str(seeds)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
