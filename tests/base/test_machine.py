"""How much memory is left, as the kernel and control groups tell it."""

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
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


OPENED = """
import sys
from contextlib import nullcontext
from pathlib import Path

import onnxruntime
from capa_export.base.machine import freed_at_once

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

before = held()
with freed_at_once() if sys.argv[2] == "at once" else nullcontext():
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(1024 * (held() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone keeps what is freed")
def test_what_onnx_runtime_frees_of_a_file_is_given_back(tmp_path: Path) -> None:
    """Of weights in 4 bits it was left with more than twice their bytes."""
    rng, count, inner, outer, group = np.random.default_rng(0), 10, 1024, 8192, 128
    weights, scales, nodes, entered = [], [], [], "x"
    for layer in range(count):
        shape = (inner, outer) if layer % 2 == 0 else (outer, inner)
        packed = rng.bytes(inner * outer // 2)
        weights.append(onnx.TensorProto(name=f"w{layer}", data_type=onnx.TensorProto.INT4, dims=shape, raw_data=packed))
        scale = np.ones((shape[0] // group, shape[1]), np.float32)
        scales.append(onnx.numpy_helper.from_array(scale, f"s{layer}"))
        inputs = [f"w{layer}", f"s{layer}"]
        nodes.append(onnx.helper.make_node("DequantizeLinear", inputs, [f"d{layer}"], axis=0, block_size=group))
        nodes.append(onnx.helper.make_node("MatMul", [entered, f"d{layer}"], [entered := f"y{layer}"]))
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", inner]) for name in ("x", entered))
    graph = onnx.helper.make_graph(nodes, "products", [x], [y], [*weights, *scales])
    opset = onnx.helper.make_opsetid("", 21)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    file = tmp_path / "products.onnx"
    onnx.save(model, file, save_as_external_data=True, location="weights")
    script = [sys.executable, "-c", OPENED, str(file)]
    kept, freed = (
        int(subprocess.run([*script, how], capture_output=True, text=True, check=True).stdout)
        for how in ("as ever", "at once")
    )
    bytes_of_weights = count * inner * outer // 2
    assert bytes_of_weights < freed < min(kept, 1.6 * bytes_of_weights)
