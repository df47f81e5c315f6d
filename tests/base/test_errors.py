"""An error is one line, whatever it quotes."""

import pytest

from capa_export.base.errors import CapaError, ExitCode, NotFiniteError, harmless, how_to_install, refusing


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


def test_texts_of_several_lines_steer_no_terminal() -> None:
    text = "a\tb\nc \x1b[2J\x9b\r\u202e\ud800 é \U0001f469\u200d\U0001f680"
    assert harmless(text) == r"a	b" + "\n" + r"c \x1b[2J\x9b\r\u202e\ud800 é " + "\U0001f469\u200d\U0001f680"


class PanicException(BaseException):
    """As pyo3 raises it."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n\n first: \nmore"), "x.json: does not load: first; copy it again"),
        (MemoryError(), "x.json: does not load: MemoryError; copy it again"),
        (PanicException("oh"), "x.json: does not load: oh; copy it again"),
        (RuntimeError("y" * 10_000), f"x.json: does not load: {'y' * 400}...; copy it again"),
        (CapaError("its own", ExitCode.USAGE), "its own"),
    ],
)
def test_what_a_library_raises_is_one_line(error: BaseException, line: str) -> None:
    with pytest.raises(CapaError) as raised, refusing("x.json: does not load", "copy it again"):
        raise error
    assert str(raised.value) == line
    with pytest.raises(KeyboardInterrupt), refusing("x"):
        raise KeyboardInterrupt
