"""The trained Qwen2.5-VL without most of its layers: engines are built of what is left in a third of the time."""

import json
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file

from capa_export.config.recipe import load_recipe

__all__ = ["first_layers"]


def first_layers(folder: Path, count: int = 5) -> Path:
    """The checkpoint of tiny-qwen25vl in a new folder, with its first decoder layers and its whole vision tower."""
    shutil.copytree(load_recipe("tiny-qwen25vl").checkpoint, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    text |= {"num_hidden_layers": count, "layer_types": text["layer_types"][:count]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    layers = {name: name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    kept = {name: value for name, value in tensors.items() if int(layers.get(name, 0)) < count}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
