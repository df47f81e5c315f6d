"""How much memory is left, as the kernel and control groups tell it."""

from pathlib import Path

import pytest

from capa_export.measure import available_memory

MEMINFO = "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\nHugePages_Total:       0\n"
STAT = "anon 5\nactive_file 300\ninactive_file 200\nfile 900\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_what_the_kernel_says(tmp_path: Path) -> None:
    everything = available_memory(tmp_path)
    assert everything > 0
    write(tmp_path, {"proc/meminfo": MEMINFO})
    assert available_memory(tmp_path) == min(8_000_000 * 1024, everything)
    assert 0 < available_memory() <= everything


@pytest.mark.parametrize(
    ("limit", "used"),
    [
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ],
)
def test_a_control_group_leaves_less(tmp_path: Path, limit: str, used: str) -> None:
    groups = "sys/fs/cgroup/"
    stat = str(Path(groups + limit).with_name("memory.stat"))
    write(tmp_path, {"proc/meminfo": MEMINFO, groups + limit: "5000\n", groups + used: "4000\n", stat: STAT})
    # What was read from files is given back when it is needed.
    assert available_memory(tmp_path) == 1500
    write(tmp_path, {groups + used: "9000\n"})
    assert available_memory(tmp_path) == 0
    write(tmp_path, {groups + limit: "max\n"})
    assert available_memory(tmp_path) > 5000
