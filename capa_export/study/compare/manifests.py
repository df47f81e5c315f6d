"""Compares how two bundles were made, by their manifests; the first of every pair is the reference's."""

from collections.abc import Iterator, Mapping
from typing import Any

from capa_export.bundle.store import Bundle
from capa_export.study.compare.schema import Change, EngineChange, EngineFacts, FileSize

__all__ = ["changes", "engines", "sizes"]

_GRAPHS = (".onnx", ".data", ".safetensors")
"""Endings of the files whose sizes are compared: graphs, weights and the embedding table."""
_ENGINE = "engine/"


def changes(reference: Bundle, candidate: Bundle) -> Iterator[Change]:
    """Recipe, precision, linear layers, checkpoint, tools, files and engines, by dotted name."""
    one, other = dict(_flatten(_facts(reference))), dict(_flatten(_facts(candidate)))
    for name in one | other:
        if one.get(name) != other.get(name):
            yield Change(name=name, reference=one.get(name), candidate=other.get(name))


def sizes(reference: Bundle, candidate: Bundle) -> Iterator[FileSize]:
    """The sizes of the ONNX files of both bundles."""
    one, other = (_graph_bytes(bundle) for bundle in (reference, candidate))
    return (FileSize(file=file, reference=one.get(file), candidate=other.get(file)) for file in sorted(one | other))


def engines(reference: Bundle, candidate: Bundle) -> Iterator[EngineChange]:
    """The engines of the targets that both have engines for, by name; a kit has none yet."""
    one, other = (_engine_facts(bundle) for bundle in (reference, candidate))
    both = [target for target in one if target in other]
    names = dict.fromkeys((target, name) for target in both for name in (*one[target], *other[target]))
    return (
        EngineChange(engine=f"{target}/{name}", reference=one[target].get(name), candidate=other[target].get(name))
        for target, name in names
    )


def _facts(bundle: Bundle) -> dict[str, Any]:
    manifest, export = bundle.manifest, bundle.stage("export")
    return {
        "recipe": manifest.get("recipe"),
        **{key: export["result"].get(key) for key in ("precision", "linear_layers", "fp32_layers", "alpha")},
        "checkpoint": {key: (manifest.get("checkpoint") or {}).get(key) for key in ("revision", "sha256")},
        "calibration_samples": manifest.get("calibration_samples"),
        "tool": manifest.get("tool"),
        "files": {**export["files"], **{file: link["sha256"] for file, link in export["linked"].items()}},
        "engines": {
            target: {key: result.get(key) for key in ("runtime", "compute_capabilities", "weights", "plugins")}
            for target, result in _engine_results(bundle).items()
        },
    }


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; a list of plain values is one."""
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, part in value.items():
        yield from _flatten(part, f"{name}.{key}" if name else str(key))


def _graph_bytes(bundle: Bundle) -> dict[str, int]:
    export = bundle.stage("export")
    files = (file for file in [*export["files"], *export["linked"]] if file.endswith(_GRAPHS))
    return {file: (bundle.folder / file).stat().st_size for file in files}


def _engine_results(bundle: Bundle) -> dict[str, dict[str, Any]]:
    stages = bundle.manifest["stages"].items()
    return {name.removeprefix(_ENGINE): record["result"] for name, record in stages if name.startswith(_ENGINE)}


def _engine_facts(bundle: Bundle) -> dict[str, dict[str, EngineFacts]]:
    """Targets that have engines -> names -> facts."""
    return {
        target: {
            name: EngineFacts(**{key: facts[key] for key in EngineFacts.model_fields})
            for name, facts in result["engines"].items()
        }
        for target, result in _engine_results(bundle).items()
        if result["engines"]
    }
