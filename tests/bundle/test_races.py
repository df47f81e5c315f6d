"""Several processes at once on one bundle: whatever is refused, nothing is ever broken."""

import json
import subprocess
import sys
from pathlib import Path

from capa_export.bundle.store import MANIFEST, Bundle
from tests.bundle.test_store import write

RACER = """
import json, sys, time
from pathlib import Path
from capa_export.base.errors import CapaError
from capa_export.bundle.store import Bundle
from tests.bundle.test_store import write

folder, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
counts, last = {"done": 0, "refused": 0}, ""
end = time.monotonic() + seconds
while time.monotonic() < end:
    try:
        if name == "reader":
            Bundle.open(folder, read_all=True).verify("make")
        else:
            Bundle(folder).run_stage("make", f"{name} {counts['done']}", ["made"], write(name * 1000))
        counts["done"] += 1
    except CapaError as error:
        if "is at work in it" not in str(error):
            raise
        counts["refused"] += 1
print(json.dumps(counts))
"""


def race(folder: Path, names: list[str], seconds: float) -> dict[str, dict[str, int]]:
    """Have processes write and read as fast as they can; how often each did, and how often it was refused."""
    commands = [[sys.executable, "-c", RACER, str(folder), name, str(seconds)] for name in names]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    said = [racer.communicate()[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * len(names)
    return {name: json.loads(line) for name, line in zip(names, said, strict=True)}


def test_writers_and_a_reader_at_once(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path / "bundle")
    bundle.run_stage("make", "first", ["made"], write("first"))
    counts = race(bundle.folder, ["a", "b", "reader"], 3)
    assert all(count["done"] for count in counts.values()), counts
    bundle.verify("make")
    assert sorted(path.name for path in bundle.folder.iterdir()) == [MANIFEST, "made"]
