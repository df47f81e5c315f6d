"""What the three graphs make of a prompt on ONNX Runtime, for engines to be held against on another machine."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from capa_export.bundle.store import ONNX, Bundle
from capa_export.config.recipe import recipe_of
from capa_export.graph.contract import CACHE_ROWS, is_cache, is_past, is_present
from capa_export.run.bundled import bundled_prompter
from capa_export.run.onnx import OnnxModel
from capa_export.trt.kit_file import GOLDEN

if TYPE_CHECKING:
    from capa_export.config.gates import Gate

__all__ = ["Run", "golden_bounds", "in_blocks", "run_golden", "write_golden"]

_STEPS = 2
_SIDE = 224
"""Of the picture, in pixels."""
_SHARE = 0.01
"""Of the kept positions that an engine may change, or one: FP16 at the cut has moved less in exports of random models.
"""


Run = tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]]
"""File of a graph, what went in, and what came out."""


class _Session:
    """A session that notes its runs."""

    def __init__(self, session: Any, file: str, runs: list[Run]) -> None:
        self._session, self._file, self._runs = session, file, runs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, names: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        outputs = self._session.run(names, feed)
        self._runs.append((self._file, dict(feed), dict(zip(names, outputs, strict=True))))
        return outputs


class _Noted(OnnxModel):
    """A model that notes every run of a graph."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.runs: list[Run] = []

    def _opened(self, file: str, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Any:
        return _Session(super()._opened(file, shapes), file, self.runs)


def run_golden(bundle: Bundle) -> list[Run]:
    """Run vision, prefill and two decode steps of one prompt; returns the runs in their order.

    Raises:
        CapaError: ONNX Runtime cannot run the graphs.
    """
    recipe = recipe_of(bundle.manifest, bundle.folder)
    prompt = bundled_prompter(bundle)(recipe.calibration.prompt, [_picture()])
    model = _Noted(bundle.folder / ONNX)
    run = model.prefill(prompt, recipe.prune.num_keep(prompt.image_lengths))
    logits, cache = run.logits, run.cache
    for step in range(_STEPS):
        logits, cache = model.step(cache, int(logits.argmax()), prompt.next_position + step)
    return model.runs


def write_golden(folder: Path, runs: Sequence[Run]) -> None:
    """Write `golden.safetensors` and `golden.json`: the runs in their order.

    Of caches there are only the shapes: each run of decode takes what the run before it returned as `present`.
    """
    tensors: dict[str, np.ndarray] = {}

    def kept(index: int, values: Mapping[str, np.ndarray]) -> dict[str, str]:
        keys = {name: f"{index}.{name}" for name in values if not is_cache(name)}
        tensors.update({key: np.ascontiguousarray(values[name]) for name, key in keys.items()})
        return keys

    said = [
        {
            "onnx": file,
            "inputs": kept(index, inputs),
            "outputs": kept(index, outputs),
            "caches": {name: list(array.shape) for name, array in (inputs | outputs).items() if is_cache(name)},
        }
        for index, (file, inputs, outputs) in enumerate(runs)
    ]
    names = [PurePosixPath(name).name for name in GOLDEN]
    save_file(tensors, folder / names[1])
    (folder / names[0]).write_text(json.dumps({"runs": said}, indent=1) + "\n", encoding="utf-8")


def in_blocks(
    inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A run of one prompt as engines have it: decode takes caches in blocks and returns the new rows alone."""
    if not any(map(is_past, inputs)):
        return dict(inputs), dict(outputs)
    blocks: dict[str, np.ndarray] = {}
    for name, array in inputs.items():
        if is_past(name):
            _, heads, rows, size = array.shape
            padded = np.pad(array, ((0, 0), (0, 0), (0, -rows % CACHE_ROWS), (0, 0)))
            blocks[name] = padded.reshape(1, heads, -1, CACHE_ROWS, size)
        else:
            blocks[name] = array
    return blocks, {name: array[:, :, -1:] if is_present(name) else array for name, array in outputs.items()}


def golden_bounds(bundle: Bundle) -> dict[str, Any]:
    """How close engines must come to the golden, by the gates of the bundle's recipe.

    Returns:
        Of `logits` and of `hidden` states, which features are held to as well, the least `cosine` and the largest
        `norm_ratio`; and the `share` of kept positions that may be others.
    """
    recipe = recipe_of(bundle.manifest, bundle.folder)
    gate: Gate = getattr(recipe.parity, bundle.said("export", "precision"))
    return {
        "logits": {"cosine": gate.cosine.limit, "norm_ratio": gate.norm_ratio.limit},
        "hidden": {"cosine": gate.hidden_cosine.limit, "norm_ratio": gate.hidden_norm_ratio.limit},
        "share": _SHARE,
    }


def _picture() -> Image.Image:
    """The same at every call, and nowhere twice the same."""
    y, x = np.mgrid[:_SIDE, :_SIDE]
    return Image.fromarray(np.stack([x * 255 // _SIDE, y * 255 // _SIDE, (x ^ y) % 256], axis=-1).astype(np.uint8))
