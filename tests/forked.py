"""Processes that begin with the libraries imported: forks of a server that imported them and did nothing else."""

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

__all__ = ["FORKED", "commands"]

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "capa_export.calibrate.effect",
        "capa_export.calibrate.layerwise",
        "capa_export.cli.stages",
        "capa_export.parity.stage",
        "capa_export.study.compare.bundles",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
    ]
)
_COMMAND = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [json.dumps([os.getcwd(), sys.argv[1:]]).encode()], [0, 1, 2])
    sys.exit(int(server.recv(16)))
"""


@contextmanager
def commands(folder: Path) -> Generator[None]:
    """Write a `capa-export` into a folder that stands before others in `PATH`: a command is then a fork."""
    # In Linux's abstract namespace: a path would be too long.
    address, ready = f"\0{folder}"[:100], FORKED.Event()
    script = folder / "capa-export"
    script.write_text(_COMMAND.format(python=sys.executable, address=address), encoding="utf-8")
    script.chmod(0o755)
    server = FORKED.Process(target=_serve, args=(address, ready))
    server.start()
    try:
        assert ready.wait(60)
        yield
    finally:
        server.terminate()
        server.join()


def _serve(address: str, ready: Event) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        ready.set()
        while True:
            connection, _ = listener.accept()
            request, streams, *_ = socket.recv_fds(connection, 1 << 16, 3)
            command = multiprocessing.get_context("fork").Process(target=_run, args=(streams, *json.loads(request)))
            command.start()
            for stream in streams:
                os.close(stream)
            command.join()
            connection.sendall(str(command.exitcode).encode())
            connection.close()


def _run(streams: Sequence[int], folder: str, arguments: list[str]) -> None:
    from capa_export.cli import main

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    # Those of the server may be files, at their end.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    os.chdir(folder)
    sys.argv = ["capa-export", *arguments]
    raise SystemExit(main(arguments))
