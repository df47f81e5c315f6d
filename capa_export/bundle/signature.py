"""Ed25519 signatures of the files that list all others by SHA-256: a bundle's manifest, and a kit's `kit.json`.

A signature lies beside its file, and is the 64 bytes that openssl makes of the file's bytes, and checks.
"""

from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar

from capa_export.base.errors import CapaError, how_to_install
from capa_export.base.files import refuse_special, replacing
from capa_export.bundle.confined import require_own

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["check_signature", "read_private_key", "read_public_key", "sign_file", "signature_of"]

AnyPath = TypeVar("AnyPath", bound=PurePath)

_LONGEST = 1 << 16
"""Bytes that are read of a file of a key."""


def signature_of(path: AnyPath) -> AnyPath:
    """Where the signature of a file lies."""
    return path.with_name(f"{path.name}.sig")


def read_private_key(path: Path, folder: Path) -> "Ed25519PrivateKey":
    """The key in a PEM file, which must not lie in the folder that is signed.

    Raises:
        CapaError: cryptography is not installed, or there is no such key, or it is encrypted, or in the folder.
    """
    return _read_key(path, folder, private=True)


def read_public_key(path: Path, folder: Path) -> "Ed25519PublicKey":
    """The key in a PEM file, which must not lie in the folder that it is to vouch for.

    Raises:
        CapaError: cryptography is not installed, or there is no such key, or it is in the folder.
    """
    return _read_key(path, folder, private=False)


def _read_key(path: Path, folder: Path, *, private: bool) -> Any:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise CapaError(f"{path}: signatures need cryptography: {how_to_install('sign')}") from error
    kind, make = "private", "openssl genpkey -algorithm ed25519 -out KEY"
    if not private:
        kind, make = "public", "openssl pkey -in KEY -pubout -out PUB"
    refuse_special(path)
    try:
        with path.open("rb") as file:
            pem = file.read(_LONGEST)
        inside = path.resolve().is_relative_to(folder.resolve())
        key = serialization.load_pem_private_key(pem, None) if private else serialization.load_pem_public_key(pem)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CapaError(f"{path}: {reason}; name the file of a {kind} key (`{make}`)") from error
    except TypeError as error:
        raise CapaError(f"{path}: is encrypted; `openssl pkey -in {path} -out KEY` writes it plain") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CapaError(f"{path}: no {kind} key in PEM; `{make}` writes one") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey):
        raise CapaError(f"{path}: a {kind} key, but not of Ed25519; `{make}` writes one")
    if inside:
        why = "whoever has the folder could sign in its name" if private else "whoever wrote the folder wrote the key"
        raise CapaError(f"{path}: lies in {folder}: {why}; keep it elsewhere")
    return key


def sign_file(path: Path, key: "Ed25519PrivateKey") -> None:
    """Write the signature of a file beside it, whole or not at all."""
    with replacing(signature_of(path)) as file:
        file.write(key.sign(path.read_bytes()))


def check_signature(path: Path, key: "Ed25519PublicKey", name: object) -> None:
    """Hold a file to the signature beside it, before anything in it is read.

    Args:
        path: of the file.
        key: whose signature is asked for.
        name: of the key, for people.

    Raises:
        CapaError: there is no signature, or it is of another key, or of other bytes.
    """
    from cryptography.exceptions import InvalidSignature

    signature = signature_of(path)
    for file in (path, signature):
        require_own(file, path.parent)
    try:
        with signature.open("rb") as file:
            signed = file.read(_LONGEST)
        data = path.read_bytes()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError) and path.is_file()
        reason = "there is none" if missing else f"{error.filename}: {error.strerror}"
        raise CapaError(f"{path}: not signed, and {name} is to have signed it ({reason}: {signature.name})") from error
    try:
        key.verify(signed, data)
    except InvalidSignature as error:
        raise CapaError(
            f"{path}: its signature is not one of {name}: another key signed it, or it was changed since"
        ) from error
