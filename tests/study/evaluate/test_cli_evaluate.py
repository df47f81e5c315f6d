"""The command: rows that are skipped, a dataset from end to end, and wrong usage."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch

from capa_export.base.errors import ExitCode
from capa_export.cli import main
from capa_export.data.scenes import samples
from capa_export.study.evaluate.results import ANSWERS
from capa_export.study.evaluate.schema import Evaluation
from capa_export.study.evaluate.stage import EVALUATION


def test_rows_that_cannot_be_asked(
    checkpoint: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counted, named, and too many: the report is there, and the exit code is not 0."""
    data = shutil.copytree(questions.parent, tmp_path / "data") / "q.jsonl"
    (data.parent / "3.png").write_bytes(b"broken")
    (data.parent / "5.png").unlink()
    arguments = ["--checkpoint", str(checkpoint), "--method", "capa@2:0.75/full", "--data", str(data)]
    command = ["evaluate", "--model", "qwen25vl", *arguments, "--out", str(tmp_path / "out"), "--json"]
    assert main(command) == ExitCode.PREFLIGHT
    captured = capsys.readouterr()
    found = Evaluation.model_validate_json(captured.out)
    assert found.questions == 7
    assert [(entry.row, entry.reason.split(":")[0]) for entry in found.skipped] == [
        (3, "q3"),
        (5, found.skipped[1].reason.split(":")[0]),
    ]
    [line] = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert "2 of 9 rows were skipped: row 3: q3: " in line
    assert "5.png: no such picture" in line
    assert main(command[:-1]) == ExitCode.PREFLIGHT
    assert "dense" in capsys.readouterr().out


def test_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In POPE's layout, answered by the model that ships with the project."""
    drawn = samples(8, seed=5, kinds=["exists"])
    rows = [
        {
            "question_id": str(index),
            "image": sample.image,
            "question": sample.question,
            "answer": sample.answer,
            "image_source": "drawn",
            "category": "random",
        }
        for index, sample in enumerate(drawn)
    ]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    command = ["evaluate", "--model", "tiny-qwen25vl", "--data", str(tmp_path), "--instruction", ""]
    command += [
        "--selector",
        "capa",
        "--ratio",
        "0.5",
        "--ratio",
        "0.9",
        "--ffn",
        "full",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--json"]) == 0
    found = Evaluation.model_validate_json(capsys.readouterr().out)
    assert (found.benchmark, found.metric, found.questions) == ("pope", "pope", 8)
    assert [method.method for method in found.methods] == ["dense", "capa@2:0.5/full", "capa@2:0.9/full"]
    assert found.methods[0].figures == {
        "precision": 1,
        "recall": 1,
        "f1": 1,
        "yes_ratio": sum(row["answer"] == "yes" for row in rows) / 8,
    }
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "POPE accuracy on 8 questions" in printed
    assert "yes_ratio" in printed


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_interrupted_run_goes_on(
    checkpoint: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C reaches the workers as well as the command."""
    # With other threads, sums may be taken in another order.
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    data, rows = questions.with_name("twice.jsonl"), questions.read_text()
    # What is asked twice is answered once.
    data.write_text(rows + rows.replace("what is it ?", "what color is it ?"))
    arguments = ["evaluate", "--model", "qwen25vl", "--checkpoint", str(checkpoint), "--method", "capa@2:0.75/full"]
    arguments += ["--data", str(data), "--max-new-tokens", "8", "--json"]
    undisturbed, interrupted = tmp_path / "undisturbed", tmp_path / "interrupted"
    assert main([*arguments, "--out", str(undisturbed)]) == ExitCode.OK
    command = [*arguments, "--out", str(interrupted)]

    # Where the tests themselves run in a shell's background, SIGINT is ignored, and that is inherited.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from capa_export.cli import main; sys.exit(main({[*command, '--workers', '2']!r}))"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while run.poll() is None and len(lines_of(interrupted)) < 2:
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGINT)
        _, said = run.communicate(timeout=120)
        assert run.returncode == ExitCode.INTERRUPTED
        assert said.splitlines()[-1] == "interrupted; the same command goes on where it stopped"
        assert "Traceback" not in said
        deadline = time.monotonic() + 10
        while is_left(run.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_left(run.pid)
    finally:
        if is_left(run.pid):
            os.killpg(run.pid, signal.SIGKILL)
    before = lines_of(interrupted)
    assert 1 < len(before) < len(lines_of(undisturbed))

    capfd.readouterr()
    assert main(command) == ExitCode.OK
    assert capfd.readouterr().out.encode() == (undisturbed / EVALUATION).read_bytes()
    assert lines_of(interrupted)[: len(before)] == before
    assert sorted(lines_of(interrupted)) == sorted(lines_of(undisturbed))


def is_left(group: int) -> bool:
    """Whether any process of a group is."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def lines_of(out: Path) -> list[str]:
    path = out / ANSWERS
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "name a checkpoint, a folder or a hub id, or a recipe with --model"),
        (["x", "--model", "y"], "unknown model 'y'"),
        (["x", "--checkpoint", "y"], "the checkpoint is given twice: x, and --checkpoint y"),
        ([".", "--model", "y"], "a bundle runs as it is"),
        ([".", "--checkpoint", "y"], "a bundle runs as it is"),
        ([".", "--quantize", "none"], "--quantize-vision and --auto-precision are for a checkpoint"),
        ([".", "--quantize-head", "int8"], "--quantize-vision and --auto-precision are for a checkpoint"),
        ([".", "--quantize-vision", "int8"], "--quantize-vision and --auto-precision are for a checkpoint"),
        ([".", "--auto-precision"], "--quantize-vision and --auto-precision are for a checkpoint"),
        (["--model", "qwen25vl", "--quantize", "int2"], "--quantize int2: must be none, "),
        (["--model", "qwen25vl", "--auto-precision"], "--auto-precision says which layers --quantize leaves"),
        (["--model", "qwen25vl", "--method", "dense", "--ratio", "0.5"], "--method says it all"),
        (["--model", "qwen25vl", "--method", "dens"], "'dens' is no stage"),
        (["x"], "x: no such folder"),
        (["."], ".: not a bundle"),
        *(
            (
                ["--model", "qwen25vl", "--method", method, option, "1"],
                f"error: {option}: no method replaces visual FFNs;",
            )
            for option in ("--samples", "--images", "--calibration")
            for method in ("dense", "capa@2:0.75/full")
        ),
        (
            ["--model", "qwen25vl", "--method", "dense", "--quantize", "int4/rtn", "--samples", "1"],
            "error: --samples: no method replaces visual FFNs;",
        ),
    ],
)
def test_usage(arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["evaluate", *arguments, "--data", "q.jsonl", "--out", str(tmp_path / "out")])
    assert code == (ExitCode.PREFLIGHT if arguments in (["x"], ["."]) else ExitCode.USAGE)
    assert problem in capsys.readouterr().err
