"""Where a checkpoint is looked for without a network, and what mends a folder that lacks something."""

import os
from pathlib import Path

import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.model.hub import find_folder, full_source, refetch
from capa_export.model.sidecars import sidecars

CACHED = Path("hub") / "models--Qwen--Qwen2.5-VL-7B" / "snapshots" / "0123abc"


def test_a_folder_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert full_source("model") == full_source("~/model") == str(tmp_path / "model")
    assert full_source("owner/name") == "owner/name"
    assert find_folder("~/model", None, ["*.json"]) == tmp_path / "model"


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for source, problem in (
        (tmp_path / "file", "no such folder, it is a file"),
        (tmp_path / "none", "no such folder; pass a folder that holds config.json, or a hub id"),
        ("a/b/c", "no such folder; pass"),
    ):
        with pytest.raises(CapaError, match=problem):
            find_folder(str(source), None, [])
    with pytest.raises(CapaError, match="--revision only applies to hub ids") as error:
        find_folder(str(tmp_path), "main", [])
    assert error.value.code == ExitCode.USAGE


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    """Only of the files that are asked for."""
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert find_folder(str(tmp_path), None, ["*.json"]) == tmp_path
    with pytest.raises(CapaError, match=r"model.safetensors: is a link to a file that is not there; copy it from"):
        find_folder(str(tmp_path), None, ["*.json", "*.safetensors"])


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("root:x")
    return path


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    folder = tmp_path / CACHED
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", ["config.json", "merges.txt", "model.safetensors", "tokenizer.model"])
def test_no_file_of_the_host_is_one_of_a_checkpoint(tmp_path: Path, secret: Path, name: str) -> None:
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / name).symlink_to(secret)
    with pytest.raises(CapaError, match=rf"{name}: is a link that leads outside of .*/ck"):
        find_folder(str(tmp_path / "ck"), None, ["*.json", "merges.txt", "*.safetensors", "*.model"])
    (tmp_path / "ck" / name).unlink()
    os.mkfifo(tmp_path / "ck" / name)
    with pytest.raises(CapaError, match=rf"{name}: is a pipe, a socket or a device"):
        find_folder(str(tmp_path / "ck"), None, ["*.json", "merges.txt", "*.safetensors", "*.model"])


@pytest.mark.parametrize("name", ["merges.txt", "modeling.py", "additional_chat_templates/x.jinja"])
def test_none_is_copied_beside_the_graphs(tmp_path: Path, secret: Path, name: str) -> None:
    place = tmp_path / "ck" / name
    place.parent.mkdir(parents=True)
    place.symlink_to(secret)
    with pytest.raises(CapaError, match="leads outside"):
        sidecars(tmp_path / "ck", code=True)
    place.unlink()
    if place.parent.name != "ck":
        place.parent.rmdir()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / place.name).write_text("x")
        place.parent.symlink_to(tmp_path / "folder")
        with pytest.raises(CapaError, match="leads outside"):
            sidecars(tmp_path / "ck", code=True)


def test_a_snapshot_of_the_hub_links_to_its_blobs_and_nowhere_else(snapshot: Path, secret: Path) -> None:
    blobs, link = snapshot.parents[1] / "blobs", snapshot / "config.json"
    blobs.mkdir()
    (blobs / "0123").write_text("{}")
    link.symlink_to("../../blobs/0123")
    assert find_folder(str(snapshot), None, ["*.json"]) == snapshot
    (blobs / "0123").unlink()
    (blobs / "0123").symlink_to(secret)
    with pytest.raises(CapaError, match="leads outside"):
        find_folder(str(snapshot), None, ["*.json"])
    (blobs / "0123").unlink()
    blobs.rmdir()
    (secret.parent / "elsewhere").mkdir()
    (secret.parent / "elsewhere/0123").write_text("{}")
    blobs.symlink_to(secret.parent / "elsewhere")
    with pytest.raises(CapaError, match="leads outside"):
        find_folder(str(snapshot), None, ["*.json"])


def test_remedies_by_where_a_folder_came_from(tmp_path: Path) -> None:
    assert "`hf download Qwen/Qwen2.5-VL-7B --revision 0123abc`" in refetch(tmp_path / CACHED)
    assert refetch(tmp_path / CACHED.parents[1]).endswith("not a model: pass Qwen/Qwen2.5-VL-7B")
    (tmp_path / ".cache" / "huggingface" / "download").mkdir(parents=True)
    assert f"`hf download OWNER/NAME --local-dir {tmp_path}` again" in refetch(tmp_path)
    assert refetch(tmp_path / "other") == "copy it from where the weights were published"
