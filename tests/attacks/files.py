"""Attacks by what lies where a file is expected, and by what a bundle's files say."""

import shutil
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.attacks.victims import Attack, Victim, beginning

__all__ = ["FOLDERS", "MANIFESTS", "PLACES", "PROCESSORS", "RECIPES", "STRANGE", "WEIGHTS"]

_SIDECARS = (
    *("config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "preprocessor_config.json", "processor_config.json", "merges.txt", "vocab.json"),
    *("chat_template.json", "model.safetensors.index.json", "adapter_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "additional_chat_templates/x.jinja", "video_preprocessor_config.json", "tokenizer_x"),
)


def _checkpoint_folder(name: str, command: str = "export") -> Attack:
    def attack(victim: Victim) -> list[object]:
        copy = Path(shutil.copytree(victim.checkpoint, victim.folder / "checkpoint"))
        (copy / name).unlink(missing_ok=True)
        (copy / name).mkdir(parents=True)
        return getattr(victim, command)(copy)

    return attack


def _bundle_folder(name: str) -> Attack:
    def attack(victim: Victim) -> list[object]:
        copy = Path(shutil.copytree(victim.bundle, victim.folder / "bundle"))
        (copy / name).unlink(missing_ok=True)
        (copy / name).mkdir(parents=True)
        return victim.run(copy)

    return attack


def _option_folder(*options: object) -> Attack:
    def attack(victim: Victim) -> list[object]:
        folder = victim.folder / "folder.toml"
        folder.mkdir()
        return [
            {"BUNDLE": victim.bundle, "FOLDER": folder, "OUT": victim.folder / "out"}.get(str(o), o) for o in options
        ]

    return attack


FOLDERS: dict[str, Attack] = {
    **{f"a folder for {name}": _checkpoint_folder(name) for name in _SIDECARS},
    **{f"a folder for {name}, planned": _checkpoint_folder(name, "plan") for name in ("config.json", _SIDECARS[6])},
    **{
        f"a folder for {name} of a bundle": _bundle_folder(name)
        for name in (
            *("capa_manifest.json", "onnx/llm/prefill.onnx", "onnx/llm/model.onnx.data", "onnx/llm/config.json"),
            *("onnx/processors/processors.json", "onnx/processors/tokenizer.json", "onnx/llm/embedding.json"),
            *("onnx/llm/generation_config.json", ".verified.json"),
        )
    },
    "a folder for --model": _option_folder("plan", "-m", "FOLDER"),
    "a folder for --target": _option_folder("engine", "BUNDLE", "-t", "FOLDER"),
    "a folder for --gate": _option_folder("validate", "BUNDLE", "--gate", "FOLDER"),
    "a folder for --messages": _option_folder("run", "BUNDLE", "--messages", "FOLDER"),
    "a folder for --image": _option_folder("run", "BUNDLE", "--prompt", "x", "--image", "FOLDER"),
    "a folder for --junit": _option_folder("validate", "BUNDLE", "--junit", "FOLDER"),
    "a folder for --plugin-library": _option_folder(
        "engine", "BUNDLE", "--plugins", "native", "--plugin-library", "FOLDER"
    ),
    "an empty folder for a bundle": _option_folder("inspect", "FOLDER"),
    "an empty folder for a kit": _option_folder("engine", "FOLDER", "--on-device"),
    "an empty folder for --data": _option_folder("evaluate", "BUNDLE", "--data", "FOLDER", "-o", "OUT"),
    "a file for --out": lambda victim: [*victim.export(victim.checkpoint)[:-1], victim.recipe],
    "a file for a bundle": lambda victim: ["inspect", victim.recipe],
    "a folder for an output": lambda victim: ["explain", victim.bundle, "--prompt", "x", "--image",
        victim.pictures / "0.png", "-o", victim.folder],
}  # fmt: skip


def _says(*path: Any, to: Any, command: str = "run") -> Attack:
    def attack(victim: Victim) -> list[object]:
        def change(data: Any) -> None:
            # Golden samples take minutes to make, and their files are not what this is about.
            data["stages"].setdefault("golden", {**data["stages"]["validate"], "files": {}, "linked": {}})
            for key in path[:-1]:
                data = data[key]
            data[path[-1]] = to

        copy = victim.bundle_saying(change)
        return victim.run(copy) if command == "run" else [command, copy]

    return attack


STRANGE: dict[str, Any] = {
    "list": [1],
    "text": "../../evil",
    "boolean": True,
    "surrogate": "\ud800",
    "markup": "[/red]",
    "escape": "\x1b[2J",
    "null": None,
    "number": 10**30,
    "object": {"a": [1]},
}
PLACES: dict[str, tuple[Any, ...]] = {
    "recipe": ("recipe",),
    "recipe name": ("recipe", "name"),
    "family": ("recipe", "family"),
    "recipe checkpoint": ("recipe", "checkpoint"),
    "picture": ("recipe", "picture"),
    "pictures": ("recipe", "pictures"),
    "schedule": ("recipe", "prune", "schedule"),
    "selector": ("recipe", "prune", "schedule", 0, "selector"),
    "options": ("recipe", "prune", "schedule", 0, "options"),
    "parity": ("recipe", "parity"),
    "checkpoint": ("checkpoint",),
    "checkpoint source": ("checkpoint", "source"),
    "checkpoint files": ("checkpoint", "files"),
    "checkpoint sha256": ("checkpoint", "sha256"),
    "revision": ("checkpoint", "revision"),
    "stages": ("stages",),
    "export": ("stages", "export"),
    "export files": ("stages", "export", "files"),
    "export linked": ("stages", "export", "linked"),
    "export result": ("stages", "export", "result"),
    "export seconds": ("stages", "export", "seconds"),
    "peak memory": ("stages", "export", "peak_memory_bytes"),
    "precision": ("stages", "export", "result", "precision"),
    "linear layers": ("stages", "export", "result", "linear_layers"),
    "fp32 layers": ("stages", "export", "result", "fp32_layers"),
    "not for genai": ("stages", "export", "result", "not_for_genai"),
    "needs transformers": ("stages", "export", "result", "needs_transformers"),
    "calibrate result": ("stages", "calibrate", "result"),
    "validate result": ("stages", "validate", "result"),
    "golden result": ("stages", "golden", "result"),
    "tool": ("tool",),
    "command": ("command",),
    "hashed": ("hashed",),
    "version": ("version",),
}


def _manifests() -> Iterator[tuple[str, Attack]]:
    """Every place is read by every command; which of the values stands there goes round."""
    values = cycle(STRANGE.items())
    for place, path in PLACES.items():
        for command in ("inspect", "run", "validate", "doctor", "compare"):
            kind, value = next(values)
            yield f"{command}: {place} {kind}", _says(*path, to=value, command=command)


MANIFESTS = dict(_manifests())


def _compare(attack: Attack) -> Attack:
    return lambda victim: [*attack(victim), victim.bundle]


MANIFESTS = {name: _compare(attack) if name.startswith("compare") else attack for name, attack in MANIFESTS.items()}


def _recipe(old: str, new: str) -> Attack:
    def attack(victim: Victim) -> list[object]:
        path = victim.folder / "r.toml"
        text = victim.recipe.read_text()
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8", errors="surrogatepass")
        return ["plan", "-m", path, "--checkpoint", victim.checkpoint, "-t", "onnx"]

    return attack


RECIPES: dict[str, Attack] = {
    "a huge picture": _recipe("[prune]", "picture = [1000000000, 1000000000]\n[prune]"),
    "a family outside": _recipe('family = "qwen25vl"', 'family = "../../evil"'),
    "a family of a module within": _recipe('family = "qwen25vl"', 'family = "qwen25vl.vision"'),
    "a layer far away": _recipe("layer = 2,", f"layer = {10**18},"),
    "a million stages": _recipe("schedule = [", "schedule = [" + "{layer = 2, ratio = 0.1}," * 100_000),
    "nested tables": _recipe("[prune]", "[" + "a." * 50_000 + "b]\n[prune]"),
    "an infinite eta": _recipe("eta = 0.5", "eta = inf"),
    "an infinite budget": _recipe("budget = 100", "budget = nan"),
}


def _weights(change: Callable[[dict[str, Any]], Any], command: str = "build") -> Attack:
    def attack(victim: Victim) -> list[object]:
        copy = Path(shutil.copytree(victim.checkpoint, victim.folder / "checkpoint"))
        tensors = load_file(copy / "model.safetensors")
        tensors = change(tensors) or tensors
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        if command != "build":
            return getattr(victim, command)(copy)
        out = victim.folder / "out"
        options = ("--images", victim.pictures, "-t", "onnx", "-o", out, "--samples", 2)
        return ["build", "-m", victim.recipe, "--checkpoint", copy, *options]

    return attack


def _filled(value: float, *names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: {
        name: np.full_like(tensor, value) if any(part in name for part in names) else tensor
        for name, tensor in tensors.items()
    }


WEIGHTS: dict[str, Attack] = {
    "all zero": _weights(_filled(0, "")),
    "a head of zeros": _weights(_filled(0, "lm_head")),
    "norms of zeros": _weights(_filled(0, "norm")),
    "a tower of zeros": _weights(_filled(0, "visual")),
    "huge": _weights(_filled(1e30, "mlp")),
    "ones": _weights(_filled(1, "")),
    "empty": _weights(lambda tensors: {name: tensor[:0] for name, tensor in tensors.items()}, "export"),
    "no tensors": _weights(lambda _: {"a": np.zeros(0, np.float32)}, "export"),
    "integers": _weights(lambda tensors: {name: tensor.astype(np.int64) for name, tensor in tensors.items()}, "export"),
    "a million names": _weights(
        lambda tensors: {**tensors, **{f"model.layers.{i}.x": np.zeros(0, np.float32) for i in range(50_000)}}, "export"
    ),
}


def _processors(*path: Any, to: Any) -> Attack:
    def attack(victim: Victim) -> list[object]:
        def change(data: Any) -> None:
            for key in path[:-1]:
                data = data[key]
            data[path[-1]] = to

        return victim.run(victim.bundle_with("onnx/processors/processors.json", change))

    return attack


PROCESSORS: dict[str, Attack] = {
    f"{key} {beginning(value)}": _processors("image_processor", key, to=value)
    for key, values in {
        "size": ({"shortest_edge": 10**12, "longest_edge": 10**12}, {"height": 10**6, "width": 10**6}, {}, "x"),
        "patch_size": (10**6, 0, -1, 1.5),
        "merge_size": (10**6, 0),
        "temporal_patch_size": (10**6, 0, 4),
        "kind": ("plain", "tiles", "squared", "nothing"),
        "image_mean": ([0.5] * 10**6, "x", [float("nan")] * 3),
        "image_std": ([0, 0, 0],),
        "resample": (99, -1),
        "rescale_factor": (1e308, 0),
        "do_center_crop": (True,),
        "crop_size": ({"height": 10**6, "width": 10**6},),
        "do_resize": (False,),
    }.items()
    for value in values
}
