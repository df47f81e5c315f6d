"""`capa-export compare`: what it prints, its exit codes, and its one line for every mistake."""

import json
from pathlib import Path

import pytest

from capa_export.base.errors import ExitCode
from capa_export.bundle.store import Bundle
from capa_export.cli import main
from capa_export.study.compare.schema import BundleComparison
from tests.study.compare.conftest import Exported, note_validation, rerecord


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gates.toml"


def test_the_table_says_what_changed_and_what_comes_of_it(
    reference: Bundle, exported: Exported, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    candidate = exported(ratio=0.5, precision="fp32")
    assert main(["compare", str(reference.folder), str(candidate.folder), "--images", str(pictures)]) == ExitCode.OK
    printed = capsys.readouterr().out
    assert printed.startswith("compare: passed\n")
    assert "recipe.prune.schedule.0.ratio: 0.75 -> 0.5" in printed
    assert "precision: fp16 -> fp32" in printed
    for row in (
        "visual tokens kept after layer 2",
        "same likeliest token",
        "prefill ms",
        "onnx/llm/model.onnx.data MB",
    ):
        assert row in printed
    assert max(map(len, printed.splitlines())) < 200


def test_code_that_came_with_a_checkpoint_runs_where_it_is_trusted(
    reference: Bundle,
    spare: Bundle,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Where transformers copies the code to, which is else below the user's home.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path))  # Undone behind the test, with what transformers adds.
    # As in a bundle whose processors transformers has to read.
    stages = spare.manifest["stages"]
    for file in [name for name in stages["export"]["files"] if name.startswith("onnx/processors/")]:
        del stages["export"]["files"][file]
        (spare.folder / file).unlink()
    spare.update(stages=stages)
    config = spare.folder / "onnx/visual/preprocessor_config.json"
    own = {"auto_map": {"AutoImageProcessor": "own.OwnImageProcessor"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **own}), encoding="utf-8")
    (config.parent / "own.py").write_text(
        "from transformers import Qwen2VLImageProcessor\nclass OwnImageProcessor(Qwen2VLImageProcessor): pass\n"
    )
    for file in ("preprocessor_config.json", "own.py"):
        rerecord(spare, f"onnx/visual/{file}")
    command = ["compare", str(reference.folder), str(spare.folder), "--images", str(pictures), "--json"]
    assert main(command) == ExitCode.PREFLIGHT
    assert "--trust-remote-code runs it" in capsys.readouterr().err
    assert main([*command, "--trust-remote-code"]) == ExitCode.OK


def test_a_regression_is_exit_code_6_with_the_first_sentence(
    reference: Bundle, spare: Bundle, pictures: Path, gate: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note_validation(spare, "fp16 ONNX: too far")
    gate.write_text("[compare]\nprefill_slowdown = 1e-6\n[fp16]\ncosine = 0.99\n", encoding="utf-8")
    options = ["compare", str(reference.folder), str(spare.folder), "--images", str(pictures), "--gate", str(gate)]
    assert main([*options, "--json"]) == ExitCode.PARITY
    captured = capsys.readouterr()
    found = BundleComparison.model_validate_json(captured.out)
    assert len(found.failures) == 2 and not found.passed
    assert captured.err.splitlines()[-1] == f"error: {found.failures[0]}"
    assert found.failures[0].endswith("fp16 ONNX: too far")
    failing = [check for check in found.checks if check.failure]
    assert [(check.name, check.at_least, check.at_most) for check in failing] == [
        ("passed its own validation", 1, None),
        ("prefill slowdown", None, 1e-6),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[compare]\nkl_max = 1\n", "unknown key compare.kl_max; known keys: accuracy_drop, decode_slowdown, kl,"),
        ("[compare]\nkl = -1\n", "compare.kl: Input should be greater than or equal to 0"),
        ("[compared]\nkl = 1\n", "unknown key compared"),
        ("kl = ", "Invalid value"),
        (None, "no such file"),
    ],
)
def test_a_gate_file_that_does_not_fit_is_a_usage_error(
    reference: Bundle, gate: Path, text: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        gate.write_text(text, encoding="utf-8")
    code = main(["compare", str(reference.folder), str(reference.folder), "--gate", str(gate)])
    assert code == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert str(gate) in line and said in line


def test_what_cannot_be_compared_is_one_line(
    reference: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(reference.folder), str(tmp_path)]) == ExitCode.PREFLIGHT
    (line,) = capsys.readouterr().err.splitlines()
    assert "not a bundle" in line
    assert main(["compare", str(reference.folder), str(reference.folder)]) == ExitCode.PREFLIGHT
    (line,) = capsys.readouterr().err.splitlines()
    assert "pass --images" in line
