"""Names and references that would lead a bundle out of its folder, in every file that can hold one."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from capa_export.base.errors import CapaError
from capa_export.bundle.confined import confined, is_name, references
from capa_export.bundle.manifest import encode_manifest
from capa_export.bundle.store import MANIFEST, Bundle
from tests.recorded import record

SECRET = b"not of the bundle"


NO_NAMES = [
    "",
    ".",
    "..",
    "/etc/passwd",
    "../x",
    "a/../../x",
    "a/./b",
    "a//b",
    "a/",
    "~/x/..",
    "C:x",
    "C:/x",
    "//host/x",
]
NO_NAMES += ["a\\b", "a\0b", "a\nb", "\x1b[2J", "\ud800", "a/" + "b" * 256, "\N{RIGHT-TO-LEFT OVERRIDE}"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    assert not is_name(name)
    with pytest.raises(CapaError, match="is no name of a file in it"):
        confined(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "onnx/llm/model.onnx.data", ".hidden", "a..b", "model 1.safetensors", "\u00e9"])
def test_names(name: str, tmp_path: Path) -> None:
    assert confined(tmp_path, name) == tmp_path / name


def test_links_are_followed_before_they_are_judged(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    (folder / "real").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(SECRET)
    (folder / "out").symlink_to("../secret")
    (folder / "up").symlink_to("..")
    (folder / "within").symlink_to("real")
    (folder / "loop").symlink_to("loop")
    for name in ("out", "up", "up/secret", "up/new"):
        with pytest.raises(CapaError, match="leads outside of"):
            confined(folder, name)
    for name in ("within", "within/new", "loop"):
        assert confined(folder, name) == folder / name
    (tmp_path / "alias").symlink_to("bundle")
    assert confined(tmp_path / "alias", "real/x") == tmp_path / "alias/real/x"


@pytest.mark.parametrize("name", ["onnx/y", MANIFEST])
def test_pipes_are_refused_before_they_are_opened(tmp_path: Path, name: str) -> None:
    bundle = bundled(tmp_path / "bundle", {"onnx/y": SECRET})
    (bundle.folder / name).unlink()
    os.mkfifo(bundle.folder / name)
    assert f"{name}: is a pipe, a socket or a device" in refusal(bundle)


def external(location: str | None, **numbers: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {**({} if location is None else {"location": location}), **numbers}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _graph(name: str, tensor: TensorProto | None = None) -> Any:
    value = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, [4])
    return helper.make_graph([], name, [], [value], [] if tensor is None else [tensor])


def in_initializer(tensor: TensorProto) -> onnx.ModelProto:
    return helper.make_model(_graph("main", tensor))


def in_constant(tensor: TensorProto) -> onnx.ModelProto:
    model = helper.make_model(_graph("main"))
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    return model


def in_nested_graph(tensor: TensorProto) -> onnx.ModelProto:
    model = helper.make_model(_graph("main"))
    branches = {"then_branch": _graph("then", tensor), "else_branch": _graph("else")}
    model.graph.node.append(helper.make_node("If", ["condition"], ["y"], **branches))
    return model


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    model = helper.make_model(_graph("main"))
    branches = {"then_branch": _graph("then", tensor), "else_branch": _graph("else")}
    body = [helper.make_node("If", ["condition"], ["y"], **branches)]
    opset = [helper.make_opsetid("", 23)]
    model.functions.append(helper.make_function("capa", "F", [], ["y"], body, opset))
    return model


def in_sparse(tensor: TensorProto) -> onnx.ModelProto:
    model = helper.make_model(_graph("main"))
    model.graph.sparse_initializer.add(values=tensor, dims=[4])
    return model


def in_training_info(tensor: TensorProto) -> onnx.ModelProto:
    model = helper.make_model(_graph("main"))
    model.training_info.add().initialization.CopyFrom(_graph("init", tensor))
    return model


def as_default_location(tensor: TensorProto) -> onnx.ModelProto:
    tensor.data_location = TensorProto.DEFAULT
    return in_initializer(tensor)


PLACES = [in_initializer, in_constant, in_nested_graph, in_function, in_sparse, in_training_info, as_default_location]
Place = Callable[[TensorProto], onnx.ModelProto]


def bundled(folder: Path, files: dict[str, bytes]) -> Bundle:
    """A bundle of these files, every digest in order."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return record(folder, "export", list(files))


def refusal(bundle: Bundle) -> str:
    with pytest.raises(CapaError) as raised:
        bundle.verify("export")
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ["ABSOLUTE", "../../secret", "data/../../../secret", "*/_ORT_MEM_ADDR_/*", "none"])
def test_data_of_a_graph_is_data_of_the_bundle(tmp_path: Path, place: Place, location: str) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    location = str(tmp_path / "secret") if location == "ABSOLUTE" else location
    graph = place(external(location)).SerializeToString()
    bundle = bundled(tmp_path / "bundle", {"onnx/m.onnx": graph, "onnx/data/x": bytes(16)})
    assert "onnx/m.onnx: reads" in refusal(bundle)


@pytest.mark.parametrize("place", PLACES)
def test_data_that_is_there_is_taken(tmp_path: Path, place: Place) -> None:
    graph = place(external("data/x", offset="0", length="16")).SerializeToString()
    bundle = bundled(tmp_path / "bundle", {"onnx/m.onnx": graph, "onnx/data/x": bytes(16)})
    bundle.verify("export")
    assert references(bundle.folder / "onnx/m.onnx") == ["data/x"]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (external("data", offset="8", length="16"), r"reads data up to byte 24, where it has ended"),
        (external("data", offset="-8"), r"bad offset or length in data"),
        (external("data", length="9" * 30), r"bad offset or length in data"),
        (external("data", length="1e3"), r"bad offset or length in data"),
        (external(None, offset="8"), r"names no file where it should"),
        (external(None), r"names no file where it should"),
        (external("a\0b"), r"names no file where it should"),
    ],
)
def test_ranges_that_no_data_has(tmp_path: Path, tensor: TensorProto, message: str) -> None:
    (tmp_path / "data").write_bytes(bytes(16))
    (tmp_path / "m.onnx").write_bytes(in_initializer(tensor).SerializeToString())
    with pytest.raises(CapaError, match=message):
        references(tmp_path / "m.onnx")


def test_a_location_that_is_said_twice(tmp_path: Path) -> None:
    tensor = external("data")
    tensor.external_data.add(key="location", value="/etc/passwd")
    (tmp_path / "m.onnx").write_bytes(in_initializer(tensor).SerializeToString())
    with pytest.raises(CapaError, match="says twice where tensor w lies"):
        references(tmp_path / "m.onnx")


@pytest.mark.parametrize("name", ["llm/embedding.json", "llm/prefill.weights.json"])
@pytest.mark.parametrize("file", ["/etc/passwd", "../../secret", "weights/none"])
def test_tables_and_pointers_stay_inside(tmp_path: Path, name: str, file: str) -> None:
    entry = {"file": file, "tensor": "w"} if name.endswith("embedding.json") else {"w": {"file": file, "length": 4}}
    assert "reads" in refusal(bundled(tmp_path / "bundle", {name: json.dumps(entry).encode()}))


@pytest.mark.parametrize("name", ["llm/embedding.json", "llm/prefill.weights.json", "llm/prefill.onnx"])
@pytest.mark.parametrize("data", [b"", b"[]", b"1", b'{"w": 3}', b"\xff", b"[" * 99999, b'{"w": {"file": 3}}'])
def test_tables_and_pointers_that_are_none(tmp_path: Path, name: str, data: bytes) -> None:
    message = refusal(bundled(tmp_path / "bundle", {name: data}))
    assert message.startswith(str(tmp_path / "bundle" / name))


@pytest.mark.parametrize("stage", [True, False], ids=["file", "stage"])
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "a\\b"])
def test_a_manifest_that_names_what_is_outside(tmp_path: Path, name: str, *, stage: bool) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    files = {} if stage else {name: "0" * 64}
    stages = {name if stage else "export": {"key": "", "files": files}}
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / MANIFEST).write_bytes(encode_manifest({"version": 2, "stages": stages}))
    with pytest.raises(
        CapaError, match=r"capa_manifest\.json: damaged manifest \(.*is no name of a file in the bundle"
    ):
        Bundle.open(tmp_path / "bundle")


def test_files_behind_links_are_not_read(tmp_path: Path) -> None:
    bundle = bundled(tmp_path / "bundle", {"onnx/llm/x": SECRET, "onnx/y": SECRET})
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/x").write_bytes(SECRET)
    (bundle.folder / "onnx/llm/x").unlink()
    (bundle.folder / "onnx/llm/x").symlink_to(tmp_path / "llm/x")
    assert "onnx/llm/x: is a link that leads outside" in refusal(bundle)
    (bundle.folder / "onnx/llm/x").unlink()
    (bundle.folder / "onnx/llm").rmdir()
    (bundle.folder / "onnx/llm").symlink_to(tmp_path / "llm")
    assert "onnx/llm/x: is a link that leads outside" in refusal(bundle)


def test_hard_links_are_files_like_any(tmp_path: Path) -> None:
    bundle = bundled(tmp_path / "bundle", {"onnx/x": SECRET})
    os.link(bundle.folder / "onnx/x", tmp_path / "again")
    bundle.verify("export")


def made(scratch: Path) -> dict[str, Any]:
    (scratch / "made").mkdir(parents=True)
    (scratch / "made/file").write_text("new")
    return {}


@pytest.mark.parametrize("planted", ["made", ".commit", ".partial", ".lock.partial", ".holder.partial", MANIFEST])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_written_through_a_link(tmp_path: Path, planted: str, kind: str) -> None:
    bundle = Bundle(tmp_path / "bundle")
    bundle.run_stage("make", 1, ["made"], made)
    victim = tmp_path / "victim"
    if kind == "folder":
        victim.mkdir()
    inner = victim / "file" if kind == "folder" else victim
    inner.write_bytes(SECRET)
    place = bundle.folder / planted
    if place.is_dir():
        (place / "file").unlink()
        place.rmdir()
    place.unlink(missing_ok=True)
    place.symlink_to(victim)
    refused = planted in ("made", MANIFEST)
    with pytest.raises(CapaError, match="leads outside") if refused else nullcontext():
        bundle.run_stage("make", 2, ["made"], made)
    assert refused or (bundle.folder / "made/file").read_text() == "new"
    assert inner.read_bytes() == SECRET
    assert sorted(path.name for path in tmp_path.rglob("*") if victim in path.parents) == ["file"] * (kind == "folder")


def test_nothing_is_deleted_behind_a_link(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path / "bundle")
    bundle.run_stage("make", 1, ["made"], made)
    (bundle.folder / "late").mkdir()
    (bundle.folder / "late/file").write_bytes(SECRET)
    record(bundle.folder, "late/x", ["late/file"])
    (bundle.folder / "late").rename(tmp_path / "elsewhere")
    (bundle.folder / "late").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CapaError, match="late/file: is a link that leads outside"):
        bundle.run_stage("make", 2, ["made"], made, outdates=["late/"])
    assert (tmp_path / "elsewhere/file").read_bytes() == SECRET


def test_outputs_stay_inside(tmp_path: Path) -> None:
    for output in ("..", "engines/..", "/srv/x"):
        with pytest.raises(CapaError, match="is no name of a file in it"):
            Bundle(tmp_path / "bundle").run_stage("make", 1, [output], made)
    assert not list(tmp_path.iterdir())


def test_what_is_added_beside_a_graph(tmp_path: Path) -> None:
    graph = in_initializer(external("data")).SerializeToString()
    bundle = bundled(tmp_path / "bundle", {"onnx/llm/m.onnx": graph, "onnx/llm/data": bytes(16)})
    (bundle.folder / "a.log").touch()
    (bundle.folder / "onnx/llm/.DS_Store").touch()
    bundle.verify("export")
    for name in ("llm/embedding.json", "llm/additional_chat_templates/x.jinja", "processors/processors.json"):
        added = bundle.folder / "onnx" / name
        added.parent.mkdir(exist_ok=True)
        added.touch()
        assert f"{name}: was added since the bundle was built" in refusal(bundle)
        added.unlink()
    (bundle.folder / "onnx/llm/templates").symlink_to(tmp_path)
    assert "templates: was added" in refusal(bundle)


def test_a_table_of_weights_that_is_added_beside_an_engine(tmp_path: Path) -> None:
    bundle = bundled(tmp_path / "bundle", {"engines/rtx/llm/prefill.engine": SECRET})
    (bundle.folder / "engines/rtx/llm/prefill.layers.txt").touch()
    bundle.verify("export")
    (bundle.folder / "engines/rtx/llm/prefill.weights.json").write_text("{}")
    assert "prefill.weights.json: was added since the bundle was built" in refusal(bundle)


def _endless() -> onnx.ModelProto:
    model = helper.make_model(_graph("main"))
    body = _graph("body")
    body.node.append(helper.make_node("Loop", ["", ""], ["y"], body=_graph("inner"), name="spin"))
    model.graph.node.append(helper.make_node("If", ["condition"], ["y"], then_branch=body, else_branch=_graph("else")))
    return model


def _search() -> onnx.ModelProto:
    model = helper.make_model(_graph("main"))
    model.graph.node.append(helper.make_node("GreedySearch", ["x"], ["y"], domain="com.microsoft", name="spin"))
    return model


@pytest.mark.parametrize("made", [_endless, _search])
def test_graphs_that_might_never_end(made: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    bundle = bundled(tmp_path / "bundle", {"onnx/m.onnx": made().SerializeToString()})
    message = refusal(bundle)
    assert "onnx/m.onnx: node 'spin' is a " in message and "might never end" in message


def test_weights_that_are_missing_are_seen_without_reading_any(tmp_path: Path) -> None:
    bundle = bundled(tmp_path / "bundle", {"onnx/x.data": bytes(16), "onnx/y.data": bytes(16)})
    bundle.verify("export", weights=False)
    (bundle.folder / "onnx/y.data").unlink()
    with pytest.raises(CapaError, match=r"onnx/y\.data: missing"):
        bundle.verify("export", weights=False)
