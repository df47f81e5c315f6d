"""Kits that somebody else wrote: what they say is data until it is checked, and nothing that they bring is run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from capa_export.base.errors import CapaError
from capa_export.bundle.store import digest_of, file_digest
from capa_export.config.target import Target
from capa_export.trt import builder
from capa_export.trt.graphs import find_profiles, write_manifest
from capa_export.trt.kit_file import KIT, KitError
from capa_export.trt.stage import build_kit
from tests.targets import one_gpu
from tests.trt.test_builder import NUM_KEEP, tiny_graph

Lie = Callable[[dict[str, Any]], object]
TRIAL = {"runtime": "tensorrt_rtx", "compute_capability": "8.6"}


@pytest.fixture
def target() -> Target:
    return one_gpu(values=NUM_KEEP)


def write_kit(folder: Path, target: Target, *engines: str) -> Path:
    """Engines of a small graph, and what a kit carries to build them."""
    (folder / "onnx").mkdir(parents=True)
    graph = tiny_graph(folder / "onnx")
    shutil.copyfile(builder.__file__, folder / "builder.py")
    shutil.copyfile(Path(builder.__file__).with_name("worker.py"), folder / builder.WORKER)
    names = ["onnx/tiny.onnx", "onnx/tiny.onnx.data", "builder.py", builder.WORKER]
    profiles = find_profiles(graph.parent, [graph.name], target)
    entry = {"onnx": names[0], "lowered": names[0], "capa_nodes": 1, "plugins": 0, "profiles": profiles}
    write_manifest(
        folder,
        target,
        precision="fp16",
        weights="embedded",
        plugins="none",
        lowered_below="10.7",
        jetpack=None,
        cpu=None,
        engines=dict.fromkeys(engines, entry),
        files={name: file_digest(folder / name) for name in names},
        golden=None,
    )
    return folder


@pytest.fixture
def kit(tmp_path: Path, target: Target) -> Path:
    return write_kit(tmp_path / "there" / "kit", target, "llm/tiny")


def rewrite(kit: Path, lie: Lie) -> None:
    """Make a kit say something else, with every digest in order."""
    spec = json.loads((kit / KIT).read_text(encoding="utf-8"))
    del spec["digest"]
    lie(spec)
    spec["files"] = {
        name: file_digest(kit / name) if (kit / name).is_file() else sha256 for name, sha256 in spec["files"].items()
    }
    (kit / KIT).write_text(json.dumps({**spec, "digest": digest_of(spec)}), encoding="utf-8")


def rename_engine(name: str) -> Lie:
    return lambda spec: spec.update(engines={name: spec["engines"]["llm/tiny"]})


def refusal(kit: Path, tmp_path: Path) -> str:
    """The one line with which both ways into a kit refuse it; nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CapaError) as by_command:
        build_kit(kit, **TRIAL, out=tmp_path / "out")
    with pytest.raises(KitError) as by_script:
        list(builder.build(kit, **TRIAL, out=tmp_path / "out", say=lambda _: None))
    assert sorted(tmp_path.rglob("*")) == before
    assert str(by_command.value) == str(by_script.value)
    assert str(by_script.value).isprintable()
    return str(by_script.value)


@pytest.mark.parametrize("check", [True, False])
def test_a_runtime_is_one_of_two(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, check: bool) -> None:
    monkeypatch.setattr(builder, "check_device", lambda _: None)
    code = f"os;open({str(tmp_path / 'ran')!r},'w')#"
    rewrite(kit, lambda spec: spec.update(runtime=code))
    with pytest.raises(KitError, match=r"no runtime .os;open"):
        list(builder.build(kit, check=check, say=lambda _: None))
    assert not (tmp_path / "ran").exists()


def test_a_runtime_that_is_asked_for_is_one_of_two(kit: Path, tmp_path: Path) -> None:
    with pytest.raises(KitError, match="no runtime 'os'"):
        list(builder.build(kit, runtime="os", compute_capability="8.6", out=tmp_path / "out"))


@pytest.mark.parametrize("name", ["../../../evil", "/ABSOLUTE/evil", "llm/../../evil", "evil\x1b[2J", "a\nb", "", "."])
def test_engines_stay_in_their_folder(kit: Path, tmp_path: Path, name: str) -> None:
    rewrite(kit, rename_engine(name.replace("/ABSOLUTE", str(tmp_path))))
    assert "is no name of a file in it" in refusal(kit, tmp_path)


@pytest.mark.parametrize("name", ["../secret", "onnx/../../secret", "/etc/hostname"])
def test_files_outside_are_not_read(kit: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (kit.parent / "secret").write_text("not of the kit")
    rewrite(kit, lambda spec: spec["files"].update({name: "0" * 64}))
    opened: list[str] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *rest, **more: opened.append(str(path)) or real(path, *rest, **more))
    assert "is no name of a file in it" in refusal(kit, tmp_path)
    assert not [path for path in opened if "secret" in path or "hostname" in path]


@pytest.mark.parametrize("which", ["onnx", "lowered"])
@pytest.mark.parametrize("name", ["../secret.onnx", "onnx/unlisted.onnx"])
def test_graphs_are_files_that_were_checked(kit: Path, tmp_path: Path, which: str, name: str) -> None:
    shutil.copyfile(kit / "onnx/tiny.onnx", kit / name)
    rewrite(kit, lambda spec: spec["engines"]["llm/tiny"].update({which: name}))
    assert "is none of the files that it lists" in refusal(kit, tmp_path)


def test_a_graph_says_where_its_weights_are_no_further_than_the_kit(kit: Path, tmp_path: Path) -> None:
    (kit.parent / "secret").write_bytes((kit / "onnx/tiny.onnx.data").read_bytes())
    model = onnx.load(kit / "onnx/tiny.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../secret"
    onnx.save(model, kit / "onnx/tiny.onnx")
    rewrite(kit, lambda _: None)
    with pytest.raises(CapaError, match=r"tiny\.onnx: reads \.\./\.\./secret, which is no file of this kit"):
        build_kit(kit, **TRIAL, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_does_not_lie_elsewhere_for_its_weights(kit: Path, tmp_path: Path) -> None:
    rewrite(kit, lambda spec: spec["engines"]["llm/tiny"].update(source="/etc/tiny.onnx"))
    assert "llm/tiny: says where it came from" in refusal(kit, tmp_path)


@pytest.mark.parametrize("name", ["onnx/tiny.onnx.data", "onnx"])
def test_links_that_leave_are_not_followed(kit: Path, tmp_path: Path, name: str) -> None:
    (kit / name).rename(kit.parent / "elsewhere")
    (kit / name).symlink_to(kit.parent / "elsewhere")
    assert "is a link that leads outside" in refusal(kit, tmp_path)


def test_a_pipe_is_not_waited_for(kit: Path, tmp_path: Path) -> None:
    (kit / "onnx/tiny.onnx.data").unlink()
    os.mkfifo(kit / "onnx/tiny.onnx.data")
    assert "tiny.onnx.data: is a pipe, a socket or a device" in refusal(kit, tmp_path)


@pytest.mark.parametrize("ending", [".engine", ".log", ".layers.txt", ".layers.json"])
def test_nothing_is_written_through_a_link(kit: Path, tmp_path: Path, ending: str) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    (out / "llm").mkdir(parents=True)
    (out / f"llm/tiny{ending}").symlink_to(victim)
    assert "is a link that leads outside" in refusal(kit, tmp_path)
    assert victim.read_text() == "mine"


_BOUND = {"cosine": 0.99, "norm_ratio": 0.1}
BOUNDS = {"logits": _BOUND, "hidden": _BOUND, "share": 0.01}
WRONG: dict[str, Lie] = {
    "files": lambda spec: spec.update(files=dict.fromkeys(spec["files"], 3)),
    "engines": lambda spec: spec.update(engines=["llm/tiny"]),
    "engine": lambda spec: spec["engines"].update({"llm/tiny": None}),
    "plugins": lambda spec: spec.update(plugins="python"),
    "capability": lambda spec: spec.update(compute_capabilities=["8.6; rm"]),
    "capabilities": lambda spec: spec.update(compute_capabilities=[]),
    "version": lambda spec: spec.update(version_min=None),
    "target": lambda spec: spec.update(target="orin\x1b]0;mine\x07"),
    "install": lambda spec: spec.update(install="pip install x\nok"),
    "golden": lambda spec: spec.update(golden={"logits": {"cosine": "none"}}),
    "golden's files": lambda spec: spec.update(golden=BOUNDS),
    "no word of the golden": lambda spec: spec.pop("golden"),
}


@pytest.mark.parametrize("lie", WRONG.values(), ids=list(WRONG))
def test_what_no_build_writes_is_refused(kit: Path, tmp_path: Path, lie: Lie) -> None:
    spec = json.loads((kit / KIT).read_text(encoding="utf-8"))
    del spec["digest"]
    lie(spec)
    (kit / KIT).write_text(json.dumps({**spec, "digest": digest_of(spec)}), encoding="utf-8")
    assert refusal(kit, tmp_path).startswith(str(kit / KIT))


def plant(kit: Path, mark: Path, *names: str) -> None:
    for name in names:
        (kit / name).parent.mkdir(exist_ok=True)
        (kit / name).write_text(f"open({str(mark)!r}, 'a').write({name!r})\nraise SystemExit(9)\n", encoding="utf-8")


@pytest.mark.trt
def test_the_command_runs_its_own_builder(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the kit's, nor modules that lie in a kit that is the current folder."""
    mark, out = tmp_path / "ran", tmp_path / "out"
    modules = ("json.py", "runpy.py", "tensorrt_rtx.py", "capa_export/__init__.py", "onnx/__init__.py")
    plant(kit, mark, builder.WORKER, "builder.py", *modules)
    rewrite(kit, lambda _: None)
    monkeypatch.chdir(kit)
    built = build_kit(Path(), **TRIAL, out=out)
    assert not mark.exists()
    assert (out / "llm/tiny.engine").stat().st_size == built["engines"]["llm/tiny"]["bytes"] > 10_000


def test_the_command_compiles_its_own_plugins(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, include = tmp_path / "ran", tmp_path / "include"
    include.mkdir()
    (include / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 10\n#define NV_TENSORRT_MINOR 7\n")
    (kit / "plugins").mkdir()
    (kit / "plugins/build.sh").write_text(f"echo theirs > '{mark}'\nexit 1\n")
    rewrite(kit, lambda spec: spec["files"].update({"plugins/build.sh": ""}) or spec.update(plugins="native"))

    def write_own(folder: Path, capabilities: list[str]) -> None:
        assert capabilities == ["8.6"]
        folder.mkdir()
        (folder / "build.sh").write_text("echo error: ours; exit 1")

    monkeypatch.setattr("capa_export.kernels.plugins.native.write_sources", write_own)
    with pytest.raises(CapaError, match="the plugins do not compile: error: ours"):
        build_kit(kit, **TRIAL, out=tmp_path / "out", tensorrt_include=include)
    assert not mark.exists()
