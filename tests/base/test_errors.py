"""An error is one line, whatever it quotes."""

import pytest

from capa_export.base.errors import CapaError, ExitCode, NotFiniteError, how_to_install


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("x.toml: no such file", "x.toml: no such file"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x00", r"\x1b[31mred\x00"),
        ("line\u2028separator", r"line\u2028separator"),
        ("é 日本", "é 日本"),
    ],
)
def test_what_cannot_be_printed_is_escaped(message: str, line: str) -> None:
    assert str(CapaError(message)) == line


def test_codes() -> None:
    """CI relies on the numbers."""
    names = ("OK", "USAGE", "PREFLIGHT", "EXPORT", "ENGINE", "PARITY", "METHOD", "INTERRUPTED", "TERMINATED")
    assert {code.name: code.value for code in ExitCode} == dict(
        zip(names, (0, 2, 3, 4, 5, 6, 7, 130, 143), strict=True)
    )
    assert CapaError("x").code == NotFiniteError("x").code == ExitCode.PREFLIGHT
    assert CapaError("x", ExitCode.ENGINE).code == ExitCode.ENGINE
    assert how_to_install("rtx").startswith('pip install ".[rtx]"')
