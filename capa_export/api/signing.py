"""Who signs what a command makes: the bundle's manifest, and every kit in it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capa_export.base.errors import CapaError
from capa_export.base.files import remove
from capa_export.base.progress import say
from capa_export.bundle import store
from capa_export.bundle.confined import confined
from capa_export.bundle.signature import check_signature, read_private_key, sign_file, signature_of
from capa_export.trt.kit_file import KIT

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from capa_export.api.bundle import AnyPath

__all__ = ["Signer", "signer_of"]


@dataclass(frozen=True)
class Signer:
    """A private key, and the bundle that is signed with it when the work is done."""

    path: Path
    key: "Ed25519PrivateKey"
    bundle: store.Bundle
    """Its signature goes with the first change, so that an interruption leaves none that does not fit."""

    def sign(self, *, fit: bool = True) -> None:
        """Sign the manifest and the kits, unless the bundle was found not to be fit to ship."""
        folder, stages = self.bundle.folder, self.bundle.manifest["stages"]
        kits = [confined(folder, f"{kit}/{KIT}") for kit in _kits(stages)]
        if not fit:
            with self.bundle.claimed():
                self.bundle.unsign()
                for kit in kits:
                    remove(signature_of(kit))
            say(f"{'signature':<14}none: the bundle is not fit to ship")
            return
        with self.bundle.claimed():
            for kit in kits:
                sign_file(kit, self.key)
            sign_file(confined(folder, store.MANIFEST), self.key)
        say(f"{'signature':<14}{signature_of(folder / store.MANIFEST)}")


def _kits(stages: Mapping[str, Any]) -> list[str]:
    """The folders of a bundle's kits."""
    return [kit for record in stages.values() if (kit := record.get("result", {}).get("kit"))]


def signer_of(
    bundle: store.Bundle, sign: "AnyPath | None", verify_key: Path | None = None, *, exports: bool = False
) -> tuple[store.Bundle, Signer | None]:
    """The bundle to work on, and who signs it, if anybody does.

    Args:
        bundle: that may be signed already.
        sign: file of a private key.
        verify_key: file of the public key whose signature the bundle was found to have.
        exports: whether the work writes the export stage, which reads what is to be signed.

    Raises:
        CapaError: there is no such key, or the bundle has a signature of neither key, or reads a file of which no
            digest is known.
    """
    if sign is None:
        return bundle, None
    path = Path(sign)
    key = read_private_key(path, bundle.folder)
    manifest = confined(bundle.folder, store.MANIFEST)
    if verify_key is None and signature_of(manifest).exists():
        check_signature(manifest, key.public_key(), path)
    unread = [
        name
        for record in bundle.manifest["stages"].values()
        for name, link in record.get("linked", {}).items()
        if link["sha256"] is None
    ]
    if unread and not exports:
        raise CapaError(
            f"{bundle.folder}: cannot be signed, since {unread[0]} stays in the checkpoint and was never read; export "
            "it again, with --sign"
        )
    signing = replace(bundle, signing=True)
    return signing, Signer(path, key, signing)
