"""What the `kit.json` of a kit says, data until it is checked; with the standard library alone, as in a kit."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = ["GOLDEN", "KIT", "VERSION", "KitError", "check_files", "check_graphs", "check_places", "read_kit"]

KIT = "kit.json"
GOLDEN = ("golden/golden.json", "golden/golden.safetensors")
"""Files of the golden: its runs, and their tensors."""
VERSION = 5
"""Of what `kit.json` says."""
_NUMBERS = r"\d{1,9}(\.\d{1,9}){0,3}"
"""Of a version."""
_TEXTS = ("tool", "target", "runtime", "install", "version_min", "version_below", "weights", "plugins")


class KitError(Exception):
    """Why there are no engines, in one line."""


def read_kit(kit: Path) -> dict[str, Any]:
    """What the `kit.json` of a kit says: names of files in it, and words that are fit to be printed.

    Raises:
        KitError: there is none, or it is damaged, or of another version, or says what no build writes.
    """
    if (kit / KIT).exists() and not (kit / KIT).is_file():
        # A pipe would be waited for.
        raise KitError(f"{kit}: no kit ({KIT}: is no file)")
    try:
        spec = json.loads((kit / KIT).read_text(encoding="utf-8"))
        digest = spec.pop("digest")
        if digest != hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest():
            raise ValueError("its digest differs from what it holds")
    except OSError as error:
        raise KitError(f"{kit}: no kit ({KIT}: {error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KitError(f"{kit / KIT}: damaged: copy the kit again") from error
    if spec.get("version") != VERSION:
        raise KitError(f"{kit}: written by {spec.get('tool')}, another version: build it with its own build.sh")
    try:
        _check_types(spec)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KitError(f"{kit / KIT}: says what no build writes ({error}): copy the kit again") from error
    check_places(kit, spec["files"])
    return spec


def _check_types(spec: Mapping[str, Any]) -> None:
    """Raise any error of a value where what a kit says is of another kind than what a build writes."""
    files = spec["files"]
    for text in [*(spec[key] for key in _TEXTS), spec.get("jetpack") or "", *files.values()]:
        if not text.isprintable():
            raise ValueError(f"{text!r:.80}")
    if spec["plugins"] not in ("none", "native", "python"):
        raise ValueError(f"plugins {spec['plugins']!r}")
    capabilities = spec["compute_capabilities"]
    if not capabilities or not all(re.fullmatch(r"\d+\.\d+", one) for one in capabilities):
        raise ValueError(f"compute capabilities {capabilities!r}")
    if spec["golden"] is not None:
        bounds = spec["golden"]
        _ = [bounds[part][of] + 0.0 for part in ("logits", "hidden") for of in ("cosine", "norm_ratio")]
        _ = bounds["share"] + 0.0
    # The last two are in kits that are sent.
    for key, pattern in (
        *(("version_min", _NUMBERS), ("version_below", _NUMBERS)),
        *(("lowered_below", _NUMBERS), ("cpu", r"\w*")),
    ):
        if spec.get(key) is not None and not re.fullmatch(pattern, spec[key]):
            raise ValueError(f"{key} {spec[key]!r:.80}")
    for name, engine in spec["engines"].items():
        if not all(isinstance(engine.get(key, ""), str) for key in ("onnx", "lowered", "source")):
            raise ValueError(f"graphs of {name!r:.80}")
        if not all(type(engine[key]) is int for key in ("capa_nodes", "plugins")):
            raise ValueError(f"nodes of {name!r:.80}")
        profiles = [engine["profiles"][graph] for graph in engine["profiles"]]
        if not profiles:
            raise ValueError(f"profiles of {name!r:.80}")
        for limits in (ends for one in profiles for key in ("shapes", "shape_inputs") for ends in one[key].values()):
            _, _, _ = limits
            if not all(type(size) is int for sizes in limits for size in sizes):
                raise ValueError(f"shapes of {name!r:.80}")


def check_graphs(kit: Path, spec: Mapping[str, Any], *, python: bool = False) -> None:
    """Hold graphs, plugins and golden to what is in a kit that was written to be sent.

    Args:
        kit: the folder.
        spec: what its `kit.json` says.
        python: whether it may have plugins of Python, since it was not.
    """
    if missing := [key for key in ("lowered_below", "cpu", "jetpack") if key not in spec]:
        raise KitError(f"{kit / KIT}: says nothing of {missing[0]}: copy the kit again")
    for name, engine in spec["engines"].items():
        if "source" in engine:
            raise KitError(f"{kit / KIT}: {name}: says where it came from, as no kit that is sent: copy the kit again")
        for graph in (engine.get("onnx"), engine.get("lowered")):
            if graph not in spec["files"]:
                raise KitError(f"{kit / KIT}: {graph!r} is none of the files that it lists: copy the kit again")
    if spec["golden"] is not None and not spec["files"].keys() >= set(GOLDEN):
        raise KitError(f"{kit / KIT}: the golden is none of the files that it lists: copy the kit again")
    if spec["plugins"] == "python" and not python:
        raise KitError(f"{kit / KIT}: python plugins, which no kit that is sent has: copy the kit again")


def check_places(folder: Path, names: Iterable[str]) -> None:
    """Raise where a name is none of a file in a folder, or what is there is no file; it need not exist."""
    for name in names:
        path = PurePosixPath(name)
        if (
            not name.isprintable()
            or "\\" in name
            or path.as_posix() != name
            or path.is_absolute()
            or {".", ".."} & {name, *path.parts}
        ):
            raise KitError(f"{folder}: {name!r} is no name of a file in it: copy the kit again")
        inside, real = (Path(os.path.realpath(one)) for one in (folder, folder / name))
        if not real.is_relative_to(inside):
            raise KitError(f"{folder / name}: is a link that leads outside of {folder}: put a file in its place")
        if real.exists() and not real.is_file() and not real.is_dir():
            raise KitError(f"{folder / name}: is a pipe, a socket or a device: put a file in its place")


def check_files(kit: Path, files: Mapping[str, str]) -> None:
    """Raise where a file of a kit is missing, or is another than when the kit was made."""
    for name, sha256 in files.items():
        path = kit / name
        if not path.is_file():
            raise KitError(f"{path}: missing: copy the kit again")
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != sha256:
            raise KitError(f"{path}: changed since the kit was made (sha256 differs): copy the kit again")
