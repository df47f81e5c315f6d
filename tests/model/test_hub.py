"""Where a checkpoint is looked for without a network, and what mends a folder that lacks something."""

from pathlib import Path

import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.model.hub import find_folder, full_source, refetch

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


def test_remedies_by_where_a_folder_came_from(tmp_path: Path) -> None:
    assert "`hf download Qwen/Qwen2.5-VL-7B --revision 0123abc`" in refetch(tmp_path / CACHED)
    assert refetch(tmp_path / CACHED.parents[1]).endswith("not a model: pass Qwen/Qwen2.5-VL-7B")
    (tmp_path / ".cache" / "huggingface" / "download").mkdir(parents=True)
    assert f"`hf download OWNER/NAME --local-dir {tmp_path}` again" in refetch(tmp_path)
    assert refetch(tmp_path / "other") == "copy it from where the weights were published"
