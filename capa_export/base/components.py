"""The software bill of materials of a process: the packages that it has loaded, as CycloneDX lists them."""

import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageMetadata, distribution, packages_distributions
from typing import Any

__all__ = ["bill_of_materials"]

_CLASSIFIER = "License :: "
_LONGEST = 64
"""Characters of a licence's name; some packages put its whole text there."""


def bill_of_materials() -> dict[str, Any]:
    """Name, version and licence of every package of which a module is loaded, as a CycloneDX 1.6 document.

    Packages that share a namespace with a loaded one are among them.
    """
    owners = _owners()
    loaded = {module.partition(".")[0] for module in list(sys.modules)}
    names = {name for module in loaded for name in owners.get(module, ())}
    found = sorted(map(_component, names), key=lambda one: one["purl"])
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": found}


@cache
def _owners() -> Mapping[str, list[str]]:
    """The packages that installed top-level modules belong to, for which the files of all packages are read."""
    return packages_distributions()


@cache
def _component(package: str) -> dict[str, Any]:
    metadata = distribution(package).metadata
    name, version = metadata["Name"], metadata["Version"]
    component = {"type": "library", "name": name, "version": version}
    licences = _licences(metadata)
    purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
    return {**component, "purl": purl, **({"licenses": licences} if licences else {})}


def _licences(metadata: PackageMetadata) -> list[dict[str, Any]]:
    """What a package says of its licence, the SPDX expression first; empty where it says nothing short."""
    expressions, classifiers, texts = (
        metadata.get_all(field) or [] for field in ("License-Expression", "Classifier", "License")
    )
    if expressions:
        return [{"expression": expressions[0]}]
    named = [text.rpartition(" :: ")[2] for text in classifiers if text.startswith(_CLASSIFIER)]
    names = [name for name in named or texts if name and len(name) <= _LONGEST and "\n" not in name]
    return [{"license": {"name": name}} for name in names]
