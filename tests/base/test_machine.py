"""How much memory is left, as the kernel and control groups tell it."""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from capa_export.base.machine import available_memory, measured

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


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used"),
    [
        ("0::/jobs/one", "sys/fs/cgroup/jobs/one", "memory.max", "memory.current"),
        ("0::/jobs/one", "sys/fs/cgroup/jobs", "memory.max", "memory.current"),
        ("7:cpu,memory:/jobs", "sys/fs/cgroup/memory/jobs", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_a_group_within_a_group_leaves_less(tmp_path: Path, line: str, folder: str, limit: str, used: str) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"1:name=systemd:/\n{line}\n")
    (tmp_path / folder).mkdir(parents=True)
    for name, text in ((limit, "2000"), (used, "1500"), ("memory.stat", "active_file 300\ninactive_file 200\n")):
        (tmp_path / folder / name).write_text(text)
    assert available_memory(tmp_path) == 1000


def test_where_the_system_is_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def status(pointer: Any) -> int:
        assert pointer._obj.length == ctypes.sizeof(pointer._obj) == 64
        pointer._obj.available = 8_000_000_000
        return 1

    kernel = SimpleNamespace(GlobalMemoryStatusEx=status)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr("os.sysconf")
    assert available_memory(tmp_path) == 8_000_000_000
    with measured() as cost:
        pass
    assert cost.seconds >= 0
