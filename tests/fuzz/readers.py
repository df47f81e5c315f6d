"""Every reader of files that others wrote, as one function of bytes; CapaError is all that may come out of it."""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from hashlib import sha256
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
from onnx import TensorProto, helper
from PIL import Image
from safetensors.numpy import save
from transformers import AutoConfig

from capa_export.base.toml import shipped
from capa_export.bundle.confined import references
from capa_export.bundle.manifest import encode_manifest
from capa_export.bundle.signature import read_private_key, read_public_key
from capa_export.bundle.store import MANIFEST, Bundle, digest_of
from capa_export.calibrate.sums import Calibration, LayerSums
from capa_export.config.gates import with_gates
from capa_export.config.pixels import PixelBounds
from capa_export.config.recipe import judging_recipe, load_recipe, recipe_of
from capa_export.config.target import load_target
from capa_export.data.conversation import read_messages
from capa_export.data.picture_files import open_picture
from capa_export.data.samples import samples_from
from capa_export.export.in_place import embedding_of
from capa_export.model.checkpoint import fetch_config, open_checkpoint, open_tensors
from capa_export.model.families import load_family, qwen25vl
from capa_export.model.families.qwen25vl.video import _settings, _sizes
from capa_export.model.generation import GenerationOptions, eos_token_ids, read_generation
from capa_export.model.processors.rendering import render
from capa_export.model.processors.resolved import read_processors
from capa_export.model.prompt import Prompter
from capa_export.model.quantized.choice import CHOICE, WeightChoice
from capa_export.report.schema import read_parity
from capa_export.report.terminal import print_bundle
from capa_export.run.decoding import TokenChooser
from capa_export.study.compare.manifests import changes
from capa_export.trt import builder
from capa_export.trt.kit_file import VERSION
from capa_export.trt.stage import build_kit
from tests.building import Building
from tests.recorded import record

__all__ = ["OBEYED", "READERS", "Reader"]

OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys."""


@dataclass(frozen=True)
class Reader:
    """What is read, and a file that is good."""

    file: str
    """Its name."""
    read: Callable[[Path], object]
    good: bytes
    kind: Literal["json", "toml", "binary"]
    beside: Mapping[str, bytes] = field(default_factory=dict)
    """Other files in its folder."""
    is_slow: bool = False

    def __call__(self, folder: Path, data: bytes) -> None:
        """Read `data` as the file; the folder is this reader's own."""
        for name, content in {**self.beside, self.file: data}.items():
            (folder / name).write_bytes(content)
        self.read(folder / self.file)


def _manifest(path: Path) -> None:
    bundle = Bundle.open(path.parent)
    recipe_of(bundle.manifest, bundle.folder)


def _signed_manifest(path: Path) -> None:
    """The bundle of a hostile builder, whose digests fit."""
    try:
        entries = json.loads(path.read_bytes())
        path.write_bytes(encode_manifest({**entries, "version": 2}))
    except (ValueError, TypeError, RecursionError):
        return
    bundle = Bundle.open(path.parent)
    Building.recorded(bundle)
    with redirect_stdout(StringIO()) as shown:
        print_bundle(bundle.folder, bundle.manifest)
    assert not OBEYED.search(shown.getvalue()), shown.getvalue()
    list(changes(bundle, bundle))
    judging_recipe(recipe_of(bundle.manifest, bundle.folder), None)
    for stage in bundle.manifest["stages"]:
        bundle.is_current(stage, "key")
        bundle.verify(stage)


def _built(_: Any, task: Mapping[str, Any], _file: Path, _environment: Any, log: Path, _install: str) -> dict[str, Any]:
    """In the place of TensorRT's own process."""
    for file in (task["plan"], task["layers"], log):
        Path(file).touch()
    return {"version": "10.3", "warnings": [], "peak_rss_bytes": 1}


def _kit(path: Path) -> None:
    """The kit of a hostile builder, whose digest fits, on a machine that takes itself for its device."""
    try:
        spec = json.loads(path.read_bytes())
        path.write_text(json.dumps({**spec, "digest": digest_of(spec)}), encoding="utf-8")
    except (ValueError, TypeError, RecursionError):
        return
    (path.parent / "m.onnx").write_bytes(_onnx())
    pretended: dict[str, Any] = {
        "check_device": lambda _: None,
        "read_version": lambda *_: "10.3",
        "find_headers": lambda *_: path.parent,
        "_compile": lambda *_: path,
        "_run": _built,
    }
    with patch.multiple(builder, **pretended):
        build_kit(path.parent)


def _processors(path: Path) -> None:
    read_processors(path.parent)


def _template(path: Path) -> None:
    render(path.read_text(encoding="utf-8", errors="replace"), [{"role": "user", "content": []}], {})


def _target(path: Path) -> None:
    target = load_target(str(path))
    if target.engine is not None:
        target.require_engine()
        target.dim("sequence")


def _graph(path: Path) -> None:
    record(path.parent, "export", [path.name, "data"]).verify("export")


def _prompt(path: Path) -> None:
    dims = qwen25vl.model_dims(fetch_config(str(_TINY)))
    Prompter(path.parent, path.parent, qwen25vl, dims)


def _generation(path: Path) -> None:
    """And a token that is chosen so."""
    generation = read_generation(path.parent).with_options(GenerationOptions())
    chooser = TokenChooser(generation, [1, 9, 1], [2], np.random.default_rng(0))
    for _ in range(3):
        chooser(np.array([1, -2, 0.5, 3, 0, 2, 4, -1], np.float32))


def _video(path: Path) -> None:
    dims = qwen25vl.model_dims(fetch_config(str(_TINY)))
    _sizes(_settings(path.parent), 8, PixelBounds(), dims)


def _dims(family: str) -> Callable[[Path], object]:
    return lambda path: load_family(family).model_dims(fetch_config(str(path.parent)))


def _config(model_type: str, **vision: Any) -> bytes:
    config = AutoConfig.for_model(model_type).to_dict()
    config["vision_config"] |= vision
    return json.dumps(config).encode()


def _choice() -> bytes:
    with TemporaryDirectory() as folder:
        factors = {"model.layers.0.input_layernorm": np.ones(4, np.float32)}
        WeightChoice(factors=factors, errors=(0.1,), plain=(1,), tried=((1, 0.01),), budget=0.02).save(
            Path(folder) / "x"
        )
        return (Path(folder) / "x").read_bytes()


def _calibration() -> bytes:
    with TemporaryDirectory() as folder:
        Calibration("digest", 1, [LayerSums.zeros(4)] * 2, {"layers.0": 1.0}).save(Path(folder) / "x")
        return (Path(folder) / "x").read_bytes()


def _onnx() -> bytes:
    data = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "data", "offset": "0", "length": "16"}.items():
        data.external_data.add(key=key, value=value)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    inner = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "inner", [], [y], [data])
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    return helper.make_model(helper.make_graph([node], "main", [x], [y], [data])).SerializeToString()


def _picture() -> bytes:
    file = BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    return file.getvalue()


def _shipped(file: str) -> bytes:
    folder, name = file.split("/")
    return (shipped(folder) / name).read_bytes()


def _recipe(path: Path) -> None:
    load_recipe(str(path)).with_options(ratio=0.5)


_SAMPLES = load_recipe("tiny-qwen25vl")
_TINY = Path(_SAMPLES.checkpoint)
_SIDECARS = {path.name: path.read_bytes() for path in _TINY.iterdir() if path.suffix in (".json", ".jinja")}
_MESSAGES = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what ?"}]}]
_GENERATION = {
    "do_sample": True,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.05,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[3], [1, 2]],
    "suppress_tokens": [0],
    "min_length": 4,
    "min_new_tokens": 1,
    "num_beams": 1,
}
_STAGE = {
    "key": "key",
    "files": {"x": sha256(b"x").hexdigest()},
    "linked": {},
    "result": {"precision": "fp16", "engines": {}},
}
_ENTRIES: dict[str, Any] = {
    "version": 2,
    "stages": {"export": _STAGE, "engine/rtx": _STAGE},
    "recipe": _SAMPLES.model_dump(mode="json"),
    "command": ["build"],
    "checkpoint": {"source": "x", "revision": None, "files": {}, "sha256": {}},
    "hashed": {"files": {}, "sha256": {}},
}
_PARITY = {
    "passed": True,
    "failures": [],
    "warnings": [],
    "strict": False,
    "oracle": "eager",
    "prompts": "scenes",
    "num_prompts": 1,
    "seed": 0,
    "schedule": [{"layer": 1, "ratio": 0.5}],
    "linear_layers": [2],
    "fp32_layers": [],
    "export_error": [],
    "selection": [],
    "method_error": {"questions": 0},
    "notes": [],
}
_TENSOR = save({"a": np.zeros(4, np.float32)})
_INDEX = {"weight_map": {"a": "model-1.safetensors"}}


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


_PUBLIC_KEY = b"""-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAO2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2ik=
-----END PUBLIC KEY-----
"""

_PRIVATE_KEY = b"""-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f
-----END PRIVATE KEY-----
"""
_KIT: dict[str, Any] = {
    "version": VERSION,
    "tool": "capa-export",
    "target": "orin",
    "runtime": "tensorrt",
    "install": "pip install tensorrt",
    "version_min": "10.3",
    "version_below": "12",
    "lowered_below": "10.7",
    "jetpack": None,
    "cpu": None,
    "compute_capabilities": ["8.7"],
    "precision": "fp16",
    "weights": "embedded",
    "plugins": "none",
    "golden": None,
    "files": {"m.onnx": sha256(_onnx()).hexdigest(), "data": sha256(bytes(16)).hexdigest()},
    "engines": {
        "llm/tiny": {
            "onnx": "m.onnx",
            "lowered": "m.onnx",
            "capa_nodes": 0,
            "plugins": 0,
            "profiles": {"m.onnx": {"shapes": {"x": [[1], [2], [4]]}, "shape_inputs": {}}},
        }
    },
}
_PROCESSORS = {
    "tokenizer": {"chat_template": "{{ messages }}", "special_tokens": {"eos_token": "</s>"}},
    "image_processor": {
        "kind": "patches",
        "do_resize": True,
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 0.00392156862745098,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    },
}

READERS: Mapping[str, Reader] = {
    "manifest": Reader(MANIFEST, _manifest, encode_manifest(_ENTRIES), "json"),
    "signed manifest": Reader(MANIFEST, _signed_manifest, _json(_ENTRIES), "json", {"x": b"x"}),
    "public key": Reader("k.pem", lambda path: read_public_key(path, path / "elsewhere"), _PUBLIC_KEY, "binary"),
    "recipe": Reader("r.toml", _recipe, _shipped("graphs/qwen25vl.toml"), "toml"),
    "target": Reader("t.toml", _target, _shipped("engines/orin.toml"), "toml"),
    "kit": Reader("kit.json", _kit, _json(_KIT), "json", {"data": bytes(16)}),
    "processors": Reader(
        "processors.json", _processors, _json(_PROCESSORS), "json", {"tokenizer.json": _SIDECARS["tokenizer.json"]}
    ),
    "template": Reader("t.jinja", _template, b"{% for m in messages %}{{ m.role }}{% endfor %}", "binary"),
    "picture": Reader("a.png", open_picture, _picture(), "binary"),
    "private key": Reader("k.pem", lambda path: read_private_key(path, path / "elsewhere"), _PRIVATE_KEY, "binary"),
    "gates": Reader("g.toml", lambda path: with_gates(_SAMPLES.parity, path), b"[fp16]\ncosine = 0.9\n", "toml"),
    "qwen25vl config": Reader("config.json", _dims("qwen25vl"), _config("qwen2_5_vl", out_hidden_size=8192), "json"),
    "qwen3vl config": Reader("config.json", _dims("qwen3vl"), _config("qwen3_vl", out_hidden_size=4096), "json"),
    "internvl3 config": Reader("config.json", _dims("internvl3"), _config("internvl"), "json"),
    "llava15 config": Reader("config.json", _dims("llava15"), _config("llava"), "json"),
    "eos": Reader(
        "generation_config.json", lambda path: eos_token_ids(path.parent), _json({"eos_token_id": [1, 2]}), "json"
    ),
    "generation": Reader("generation_config.json", _generation, _json(_GENERATION), "json"),
    "messages": Reader("m.json", read_messages, _json(_MESSAGES), "json", {"a.png": _picture()}),
    "samples": Reader(
        "s.jsonl",
        lambda path: samples_from(path, _SAMPLES, 2, split="train"),
        _json({"messages": _MESSAGES, "answer": "x"}),
        "json",
        {"a.png": _picture()},
    ),
    "shard": Reader("x.safetensors", open_tensors, _TENSOR, "binary"),
    "index": Reader(
        "model.safetensors.index.json",
        lambda path: open_checkpoint(str(path.parent)),
        _json(_INDEX),
        "json",
        {"config.json": b"{}", "model-1.safetensors": _TENSOR},
    ),
    "choice of weights": Reader(CHOICE, WeightChoice.load, _choice(), "binary"),
    "calibration": Reader("c.safetensors", Calibration.load, _calibration(), "binary"),
    "parity": Reader("parity.json", read_parity, _json(_PARITY), "json"),
    "graph": Reader("m.onnx", _graph, _onnx(), "binary", {"data": bytes(16)}),
    "weights table": Reader(
        "x.weights.json", references, _json({"w": {"file": "x", "offset": 0, "length": 1}}), "json", {"x": b"x"}
    ),
    "embedding": Reader(
        "embedding.json",
        lambda path: embedding_of(path.parent),
        _json({"file": "x", "tensor": "a"}),
        "json",
        {"x": _TENSOR},
    ),
    "image processor": Reader(
        "preprocessor_config.json", _prompt, _SIDECARS["preprocessor_config.json"], "json", _SIDECARS, is_slow=True
    ),
    "tokenizer config": Reader(
        "tokenizer_config.json", _prompt, _SIDECARS["tokenizer_config.json"], "json", _SIDECARS, is_slow=True
    ),
    "tokenizer": Reader("tokenizer.json", _prompt, _SIDECARS["tokenizer.json"], "json", _SIDECARS, is_slow=True),
    "video settings": Reader("preprocessor_config.json", _video, _SIDECARS["preprocessor_config.json"], "json"),
}
