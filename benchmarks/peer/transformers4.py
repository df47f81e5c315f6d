"""A checkpoint saved by transformers 5, as transformers 4 reads it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

__all__ = ["downgraded"]


def downgraded(checkpoint: Path, out: Path) -> Path:
    """A copy beside `out`."""
    copy = out.with_name(out.name + "-transformers4")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy)
    if json.loads((copy / "config.json").read_text(encoding="utf-8"))["model_type"] == "llava":
        for path in copy.glob("*.safetensors"):
            _rename(path)
        for path in copy.glob("*.index.json"):
            _edit(path, lambda index: index.update(weight_map={_named(k): v for k, v in index["weight_map"].items()}))
    _edit(copy / "config.json", _config)
    _edit(copy / "tokenizer_config.json", lambda entry: entry.update(tokenizer_class="PreTrainedTokenizerFast"))
    _edit(copy / "tokenizer.json", lambda entry: _punctuation(entry.get("pre_tokenizer")))
    return copy


def _named(tensor: str) -> str:
    """CLIP's tower has one more level."""
    return re.sub(r"\bvision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", tensor)


def _rename(path: Path) -> None:
    """Rewrite the names in a shard's header; the data stay as they are."""
    old = path.rename(path.with_suffix(".old"))
    with old.open("rb") as source, path.open("wb") as target:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        text = json.dumps({_named(name): entry for name, entry in header.items()}).encode()
        target.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, target, 1 << 24)
    old.unlink()


def _edit(path: Path, change: Any) -> None:
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _config(section: Any) -> None:
    if not isinstance(section, dict):
        return
    if "dtype" in section:
        section["torch_dtype"] = section.pop("dtype")
    rope = section.pop("rope_parameters", None)
    if rope:
        section["rope_theta"] = rope.pop("rope_theta")
        if rope.get("mrope_section"):
            rope["rope_type"] = "mrope"
        if rope.get("rope_type") != "default":
            section["rope_scaling"] = {"type": rope["rope_type"], **rope}
    for inner in section.values():
        _config(inner)


def _punctuation(section: Any) -> None:
    """Write `Punctuation` as the regular expression it stands for: openvino-tokenizers does not read its mode."""
    if not isinstance(section, dict):
        return
    for inner in section.get("pretokenizers", []):
        _punctuation(inner)
    if section["type"] == "Punctuation":
        split = {
            "type": "Split",
            "pattern": {"Regex": r"[!-/:-@\[-`{-~]"},
            "behavior": section["behavior"],
            "invert": False,
        }
        section.clear()
        section.update(split)
