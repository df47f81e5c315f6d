"""Finds the pictures that conversations name: paths, file: URLs, and data: URLs that hold the picture itself."""

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from capa_export.base.errors import CapaError
from capa_export.base.files import is_special
from capa_export.data.picture_files import MOST_BYTES

__all__ = ["EncodedPicture", "picture_bytes", "picture_path", "read_picture_file"]

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_SHOWN = 60
"""Characters of a name that an error message repeats."""


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """A picture file's bytes, so that a question travels to where it is asked."""

    name: str
    data: bytes


def picture_path(source: str, folder: Path) -> Path | None:
    """The path of a picture, relative to `folder`; None where a data: URL holds it.

    Raises:
        CapaError: it lies elsewhere than on this machine.
    """
    if source[:5].lower() == "data:":
        return None
    scheme = _SCHEME.match(source)
    if scheme is None:
        return folder / source
    try:
        url = urlsplit(source)
    except ValueError as error:
        raise CapaError(f"{source[:_SHOWN]}: is no URL ({error}); save the picture and give its path") from error
    if scheme[1].lower() != "file" or url.netloc not in ("", "localhost"):
        raise CapaError(f"{source[:_SHOWN]}: nothing is downloaded; save the picture and give its path")
    return Path(url2pathname(url.path))


def picture_bytes(source: str, folder: Path) -> EncodedPicture:
    """Read a picture's file without decoding it.

    Raises:
        CapaError: there is none, or it lies elsewhere than on this machine.
    """
    path = picture_path(source, folder)
    return _read_data_url(source) if path is None else EncodedPicture(str(path), read_picture_file(path))


def read_picture_file(path: Path) -> bytes:
    """The contents of a picture's file.

    Raises:
        CapaError: it cannot be read.
    """
    if is_special(path):
        raise CapaError(f"{path}: is no file; replace or remove it")
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise CapaError(f"{path}: {size} bytes, and at most {MOST_BYTES} are read; resize the picture")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CapaError(f"{path}: no such picture") from error
    except (OSError, ValueError) as error:
        raise CapaError(f"{str(path)!r}: {getattr(error, 'strerror', None) or error}") from error


def _read_data_url(source: str) -> EncodedPicture:
    """The picture in a data: URL."""
    kind, comma, body = source[5:].partition(",")
    name = f"data:{kind[:_SHOWN]}"
    if not comma:
        raise CapaError(f"{name}: has no comma, behind which the picture is; write data:image/png;base64,...")
    data = unquote_to_bytes(body)
    if kind.lower().endswith(";base64"):
        try:
            data = base64.b64decode(b"".join(data.split()), validate=True)
        except binascii.Error as error:
            raise CapaError(f"{name}: is no base64 ({error})") from error
    if not data:
        raise CapaError(f"{name}: holds no picture")
    return EncodedPicture(name, data)
