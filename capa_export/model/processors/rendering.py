"""Renders chat templates, which come with a checkpoint, in a process that the system ends where they do not.

Jinja's sandbox keeps a template from the files and from Python itself, but bounds neither its time nor its memory.
"""

import json
import sys
from collections.abc import Mapping
from subprocess import DEVNULL, PIPE, Popen
from threading import Lock
from typing import Any

from capa_export.base.errors import CapaError, first_line
from capa_export.base.workers import module_arguments

__all__ = ["render", "start"]

_PROBLEM = "the chat template does not take this conversation"


class _Renderer:
    """The process, which lasts as long as this one, and is started anew where a template made it end."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.process: Popen[bytes] | None = None

    def start(self) -> "Popen[bytes]":
        if self.process is None or self.process.poll() is not None:
            self.process = Popen(
                [sys.executable, *module_arguments("capa_export.model.processors.template")],
                stdin=PIPE,
                stdout=PIPE,
                stderr=DEVNULL,
            )
        return self.process

    def answer(self, request: bytes) -> bytes:
        """The line that the process writes for this one; an empty one where it ends instead."""
        process = self.start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            if line := process.stdout.readline():
                return line
        except BrokenPipeError:
            pass
        except BaseException:
            # Whoever asks next must not get this answer.
            process.kill()
            raise
        # It is gone when somebody asks next.
        process.wait()
        return b""


_RENDERER = _Renderer()


def start() -> None:
    """Start the process, which takes a tenth of a second, beside other work."""
    with _RENDERER.lock:
        _RENDERER.start()


def render(template: str, messages: list[dict[str, Any]], special_tokens: Mapping[str, str]) -> str:
    """The text of a conversation, up to where the assistant's next turn begins.

    Raises:
        CapaError: the template is malformed, refuses the conversation, or takes too much time, memory or text for it.
    """
    request = {"template": template, "messages": messages, "special_tokens": dict(special_tokens)}
    with _RENDERER.lock:
        line = _RENDERER.answer(json.dumps(request).encode() + b"\n")
    try:
        answer = json.loads(line)
    except ValueError as error:
        raise CapaError(f"{_PROBLEM}: it takes more than the time or the memory that there is for it") from error
    if "error" in answer:
        raise CapaError(f"{_PROBLEM}: {first_line(answer['error'])}")
    return answer["text"]
