"""Which plugins an engine gets, and what is refused."""

import platform
from dataclasses import replace
from pathlib import Path

import pytest

from capa_export.base.errors import CapaError
from capa_export.config import plugins as choice
from capa_export.config.plugins import Plugins, choose_device_plugins, choose_plugins
from capa_export.model.families import load_family
from tests.models.qwen25vl import random_model

DECODER = replace(load_family("qwen25vl").model_dims(random_model().config.to_dict()).decoder, head_dim=128)


HERE = {"x86_64": 62, "aarch64": 183}[platform.machine()]


def elf(machine: int) -> bytes:
    """The first bytes of a library for a CPU."""
    return b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "libcapa_plugins.so"
    path.write_bytes(elf(HERE))
    return path


@pytest.fixture(params=[True, False], ids=["triton", "no triton"])
def has_triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(choice, "find_spec", lambda name: request.param or None)
    return request.param


def test_auto_takes_the_library_then_python_and_says_why_it_takes_none(*, has_triton: bool, library: Path) -> None:
    assert choose_plugins("auto", "fp16", DECODER, library) == Plugins("native", library)
    without = choose_plugins("auto", "bf16", DECODER, None)
    assert without.kind == ("python" if has_triton else "none")
    assert ("triton is not installed" in without.reason) != has_triton
    assert choose_plugins("auto", "fp32", DECODER, None) == Plugins(
        "none", reason="plugins are for graphs in fp16 and bf16"
    )
    odd = choose_plugins("auto", "fp16", replace(DECODER, head_dim=24), None)
    assert odd == Plugins("none", reason="the plugins have no kernels for head size 24")
    ragged = choose_plugins("auto", "fp16", replace(DECODER, hidden_size=72), None)
    assert ragged == Plugins("none", reason="the plugins need a hidden size in sixteens, not 72")
    assert choose_plugins("none", "fp16", DECODER, None) == Plugins("none")


@pytest.mark.parametrize(
    ("wish", "precision", "with_library", "message"),
    [
        ("native", "fp16", False, "needs --plugin-library FILE; `capa-export plugins build` makes it"),
        ("python", "fp16", True, "--plugin-library and --plugins python exclude each other"),
        ("none", "fp16", True, "--plugin-library and --plugins none exclude each other"),
        ("native", "fp32", True, "plugins are for graphs in fp16 and bf16"),
        ("auto", "fp32", True, "plugins are for graphs in fp16 and bf16: build these engines with --plugins none"),
    ],
)
def test_what_contradicts_itself_is_refused(
    wish: choice.PluginWish, precision: str, *, with_library: bool, message: str, library: Path
) -> None:
    with pytest.raises(CapaError, match=message):
        choose_plugins(wish, precision, DECODER, library if with_library else None)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CapaError, match=r"nowhere\.so: no such plugin library"):
        choose_plugins("auto", "fp16", DECODER, tmp_path / "nowhere.so")
    other = tmp_path / "other.so"
    other.write_bytes(b"not a library, but of some length")
    with pytest.raises(CapaError, match=r"other\.so: is no library"):
        choose_plugins("auto", "fp16", DECODER, other)
    other.write_bytes(elf(245 - HERE))
    with pytest.raises(CapaError, match=r"other\.so: is for (x86_64|aarch64), and this machine is"):
        choose_plugins("native", "fp16", DECODER, other)
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(CapaError, match=r'--plugins python needs triton: pip install "\.\[rtx\]" in a checkout'):
        choose_plugins("python", "fp16", DECODER, None)


def test_a_device_builds_with_native_plugins_or_none(*, has_triton: bool) -> None:
    assert choose_device_plugins("auto", "fp16", DECODER).kind == ("native" if has_triton else "none")
    assert choose_device_plugins("none", "fp16", DECODER) == Plugins("none")
    assert choose_device_plugins("auto", "fp32", DECODER).kind == "none"
    with pytest.raises(CapaError, match="a device builds with native plugins, or none"):
        choose_device_plugins("python", "fp16", DECODER)
    with pytest.raises(
        CapaError, match="are for graphs in fp16 and bf16" if has_triton else "--plugins native needs triton"
    ):
        choose_device_plugins("native", "fp32", DECODER)
