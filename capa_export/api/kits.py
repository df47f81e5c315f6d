"""The build of a kit's engines, on its device."""

from pathlib import Path
from typing import Any

from capa_export.api.bundle import AnyPath, path_of
from capa_export.api.signing import signer_of
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.progress import Report, silent
from capa_export.bundle.signature import check_signature, read_public_key
from capa_export.trt.kit_file import KIT

__all__ = ["build_kit"]


def build_kit(
    kit: AnyPath,
    *,
    tensorrt_include: AnyPath | None = None,
    sign: AnyPath | None = None,
    verify_key: AnyPath | None = None,
    progress: Report = silent,
) -> dict[str, Any]:
    """Build the engines of a kit on its device, and tell the bundle that it lies in, if it does.

    Args:
        kit: the folder.
        tensorrt_include: folder of TensorRT's headers; None looks where packages put them.
        sign: file of the Ed25519 private key that signs the bundle with its new engines.
        verify_key: file of the Ed25519 public key that must have signed the kit, and the bundle that it lies in.
        progress: told how far the work is.

    Raises:
        CapaError: this is not the device, the kit is not what was signed, or TensorRT refused.
    """
    from capa_export.trt.stage import build_kit as build
    from capa_export.trt.stage import home_of

    key, signer = path_of(verify_key), None
    if key is not None:
        check_signature(Path(kit) / KIT, read_public_key(key, Path(kit)), key)
    home = home_of(Path(kit), key)
    if sign is not None:
        if home is None:
            raise CapaError(f"--sign: {kit} lies in no bundle, whose manifest would be signed", ExitCode.USAGE)
        home, signer = signer_of(home, sign, key)
    result = build(Path(kit), tensorrt_include=path_of(tensorrt_include), home=home, report=progress)
    if signer is not None:
        signer.sign()
    return result
