"""Code that comes with a checkpoint is not run, nor asked for on stdin, unless it is trusted."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from capa_export.base.errors import CapaError, ExitCode
from capa_export.cli import main
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Prompter
from capa_export.model.source import Source
from tests.models import FAMILIES

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


def test_a_prompt_may_fill_the_context_and_not_exceed_it(checkpoint: Path, source: Source) -> None:
    def limited(limit: int | None) -> Prompter:
        decoder = replace(source.dims.decoder, rope_limit=limit)
        return Prompter(checkpoint, checkpoint, qwen25vl, replace(source.dims, decoder=decoder))

    question = "what color is the star ?"
    length = limited(None)(question, []).next_position
    assert limited(length)(question, []).next_position == length
    with pytest.raises(CapaError, match=f"has {length} tokens, more than the {length - 1} of this decoder's context"):
        limited(length - 1)(question, [])


Change = Callable[[Path], object]


def _edit(folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / file).read_text())
    change(data)
    (folder / file).write_text(json.dumps(data))


def _add_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<medicine>"])
    tokenizer.save_pretrained(folder)


def _forget(token: str) -> Change:
    """The tokenizer without a token of its own for this text."""

    def change(folder: Path) -> None:
        for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
            path.write_text(path.read_text().replace(token, f"{token[:-1]}_other{token[-1]}"))

    return change


def _listed_as_text(token: str) -> Change:
    """The tokenizer with the token in its vocabulary, and taken whole where it is a word by itself alone."""

    def change(data: dict[str, Any]) -> None:
        data["added_tokens"] = [entry for entry in data["added_tokens"] if entry["content"] != token]
        data["pre_tokenizer"] = {"type": "Whitespace"}

    return lambda folder: _edit(folder, "tokenizer.json", change)


def _template(old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        text = (folder / "chat_template.jinja").read_text()
        assert old in text
        (folder / "chat_template.jinja").write_text(text.replace(old, new))

    return change


UNFIT: dict[str, tuple[str, Change, str]] = {
    "an id the tokenizer lacks": (
        "llava15",
        lambda folder: _edit(folder, "config.json", lambda config: config.update(image_token_index=30)),
        "config.json has 30 stand for a picture, the tokenizer has no such token",
    ),
    "an id beyond the table": (
        "llava15",
        lambda folder: _edit(folder, "config.json", lambda config: config.update(image_token_index=3000)),
        "config.json has 3000 stand for a picture, the tokenizer has no such token",
    ),
    "the id of a word": (
        "qwen25vl",
        lambda folder: _edit(folder, "config.json", lambda config: config.update(image_token_id=20)),
        "for a picture, whose token by config.json that is",
    ),
    "the id of another mark": (
        "qwen3vl",
        lambda folder: _edit(
            folder, "config.json", lambda config: config.update(image_token_id=config["video_token_id"])
        ),
        "the chat template writes 0 <|video_pad|> for a picture",
    ),
    "another name": ("qwen25vl", _forget("<|image_pad|>"), "the chat template writes 0 <|image_pad|_other>"),
    "a token in pieces": ("qwen25vl", _listed_as_text("<|image_pad|>"), "the tokenizer has <|image_pad|> in pieces"),
    "no mark beside a picture": ("internvl3", _forget("</img>"), "the tokenizer has no token </img>"),
    "a token beyond the table": ("qwen25vl", _add_token, "token '<medicine>' of the tokenizer has id 71"),
    "a template without pictures": (
        "qwen25vl",
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}"),
        "the chat template writes 0 <|image_pad|> for a picture",
    ),
    "a template for text": (
        "qwen25vl",
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] + 'x' }}"),
        "the chat template does not take this conversation",
    ),
    "a template with two": (
        "qwen3vl",
        _template("<|image_pad|>", "<|image_pad|><|image_pad|>"),
        "the chat template writes 2 <|image_pad|> for a picture",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_files_that_do_not_belong_together_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    family, change, message = UNFIT[case]
    module = FAMILIES[family]
    folder, out = module.save_model(tmp_path / "checkpoint", module.random_model()), tmp_path / "bundle"
    change(folder)
    code = main(
        [
            "build",
            "--model",
            family,
            "--checkpoint",
            str(folder),
            "--target",
            "onnx",
            "--out",
            str(out),
            "--schedule",
            "capa@2:0.75",
        ]
    )
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert code == ExitCode.PREFLIGHT
    assert not out.exists()
