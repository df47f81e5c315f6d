"""The command: a page and JSON, and one line for what cannot be done."""

import subprocess
import sys
from pathlib import Path

import pytest

from capa_export.base.errors import ExitCode
from capa_export.cli import main
from capa_export.study.explain.schema import Explanation
from tests.study.explain.conftest import QUESTION
from tests.study.explain.test_page import Wellformed, text_of


def asked(bundle: Path, *more: str) -> list[str]:
    return ["explain", str(bundle), "--prompt", QUESTION, "--max-new-tokens", "2", *more]


def test_a_page_in_the_bundle_and_json(bundle: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = asked(bundle, "--image", str(pictures / "one" / "wide.png"), "--image", str(pictures / "tall.png"))
    assert main([*given, "--method", "random@1:0.5/full", "--json"]) == ExitCode.OK
    found = Explanation.model_validate_json(capsys.readouterr().out)
    assert [method.method for method in found.methods] == ["dense", "capa@2:0.75", "random@1:0.5/full"]
    assert found.pictures == ("wide.png", "tall.png")
    page = (bundle / "explain.html").read_text(encoding="utf-8")
    assert len(Wellformed(page).alts) == 2 * 2 + 3 * 3 + 3 * 2
    assert f"(IoU {found.methods[-1].iou:.2f})" in text_of(page)
    assert main(["inspect", str(bundle), "--json"]) == ExitCode.OK, "the bundle is still what was built"


def test_the_path_of_the_page_is_the_result(
    bundle: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.html"
    given = asked(bundle, "--image", str(pictures / "tall.png"), "--method", "dense", "--layer", "1")
    assert main([*given, "--out", str(out)]) == ExitCode.OK
    assert capsys.readouterr().out.strip() == str(out)
    assert "What layer 1 makes of every visual token" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image", "none.png"], "error: none.png: no such picture"),
        (["--image", "P", "--out", "nowhere/a.html"], "error: --out nowhere/a.html: there is no folder nowhere"),
        (["--image", "P", "--out", "."], "error: --out .: is a folder"),
        (["--image", "P", "--method", "capa"], "error: method 'capa': 'capa' is no stage"),
        (["--image", "P", "--method", "capa@9:0.5"], "error: method capa@9:0.5: "),
        (["--image", "P", "--checkpoint", "C"], "is not the checkpoint this bundle was made from"),
        ([], "Missing option '--image'"),
    ],
)
def test_one_line_for_what_cannot_be_done(
    bundle: Path,
    sink_bundle: Path,
    pictures: Path,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"P": str(pictures / "tall.png"), "C": str(sink_bundle.parent / "checkpoint")}
    assert main(asked(bundle, *(places.get(word, word) for word in more))) != ExitCode.OK
    said = capsys.readouterr()
    assert not said.out
    assert message in said.err
    assert "Traceback" not in said.err
    assert not list(tmp_path.iterdir())


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from capa_export.cli import main; main(['explain', '--help']); "
        "sys.exit('torch' in sys.modules or 'jinja2' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--max-new-tokens" in shown
