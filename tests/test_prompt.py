"""Code that comes with a checkpoint is not run, nor asked for on stdin, unless it is trusted."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capa_export.errors import CapaError
from capa_export.export import Source
from capa_export.families import qwen25vl
from capa_export.prompt import Prompter

MARKER = "ran.txt"
CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor
Path({marker!r}).touch()
class OwnTokenizer(PreTrainedTokenizerFast): pass
class OwnImageProcessor(Qwen2VLImageProcessor): pass
"""
PLACES: dict[str, dict[str, Any]] = {
    "tokenizer_config.json": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
    "preprocessor_config.json": {"AutoImageProcessor": "own.OwnImageProcessor"},
    "config.json": {"AutoImageProcessor": "own.OwnImageProcessor"},
}


@pytest.fixture
def planted(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes checkpoints whose `auto_map`, in a file, names code that leaves a marker when it is imported."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks on stdin"))
    # Where transformers copies the code to, which is else below the user's home.
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def plant(file: str) -> Path:
        folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
        (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / MARKER)))
        path = folder / file
        data = json.loads(path.read_text())
        path.write_text(json.dumps({**data, "auto_map": PLACES[file]}))
        return folder

    return plant


@pytest.mark.parametrize("file", PLACES)
def test_code_of_a_checkpoint_is_not_run(
    planted: Callable[[str], Path], source: Source, tmp_path: Path, file: str
) -> None:
    folder = planted(file)
    with pytest.raises(CapaError) as raised:
        Prompter(folder, folder, qwen25vl, source.dims)
    assert f"{folder / file}: auto_map names code of the checkpoint's own, which is not run" in str(raised.value)
    assert "--trust-remote-code" in str(raised.value)
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "preprocessor_config.json"])
def test_code_that_is_trusted_is_run(planted: Callable[[str], Path], source: Source, tmp_path: Path, file: str) -> None:
    folder = planted(file)
    prompter = Prompter(folder, folder, qwen25vl, source.dims, trust_remote_code=True)
    assert (tmp_path / MARKER).exists()
    used = prompter.tokenizer if file == "tokenizer_config.json" else prompter.image_processor
    assert type(used).__name__ in ("OwnTokenizer", "OwnImageProcessor")


def test_models_that_config_json_names_are_never_its_own(
    planted: Callable[[str], Path], source: Source, tmp_path: Path
) -> None:
    folder = planted("config.json")
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "auto_map": {"AutoModel": "own.OwnModel"}}))
    Prompter(folder, folder, qwen25vl, source.dims)
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("text", ["{}", "[]", '{"model": 3}', '{"added_tokens": 1}', "[" * 50_000])
def test_a_tokenizer_that_is_none(checkpoint: Path, source: Source, tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(CapaError, match="the tokenizer does not load"):
        Prompter(folder, folder, qwen25vl, source.dims)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 50_000, '{"chat_template": 3}', '"x"'])
def test_a_chat_template_that_is_none(checkpoint: Path, source: Source, tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(text)
    with pytest.raises(CapaError, match=r"chat_template\.json: holds no chat template"):
        Prompter(folder, folder, qwen25vl, source.dims)
