"""What transformers' own processor makes of a folder, ours does: on every way such folders have been published."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from capa_export.base.errors import CapaError
from capa_export.model.checkpoint import Checkpoint, fetch_config
from capa_export.model.families import load_family
from capa_export.model.prompt import Prompter, Turn
from capa_export.model.sidecars import copy_sidecars
from tests.conftest import noise
from tests.models import FAMILIES

PROCESSORS = {
    "qwen25vl": "Qwen2_5_VLProcessor",
    "internvl3": "InternVLProcessor",
    "llava15": "LlavaProcessor",
    "qwen3vl": "Qwen3VLProcessor",
}
QWEN = ("qwen25vl", "qwen3vl")
Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint a family, with LLaVA's processor_config.json, without which its processor counts no tokens."""
    folder = tmp_path_factory.mktemp("originals")
    saved = {name: module.save_model(folder / name, module.random_model()) for name, module in FAMILIES.items()}
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    _write(saved["llava15"] / "processor_config.json", settings)
    _write(saved["internvl3"] / "processor_config.json", {"image_seq_length": 4})
    return saved


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], Any]:
    """transformers' own processor of a folder, but for the video processor, which needs torchvision."""

    def load(folder: Path, family: str) -> Any:
        processor: Any = getattr(transformers, PROCESSORS[family])

        def arguments(*_: object, **__: object) -> list[Any]:
            made = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
            options: dict[str, Any] = {"image_processor": {"backend": "pil"}}
            return [
                made[name].from_pretrained(folder, **options.get(name, {})) if name in made else None
                for name in processor.get_attributes()
            ]

        monkeypatch.setattr(processor, "_get_arguments_from_pretrained", arguments)
        monkeypatch.setattr(processor, "check_argument_for_proper_class", _accept)
        return processor.from_pretrained(folder)

    return load


def _accept(*_: object) -> None: ...


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, data: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")


def _take_template(folder: Path) -> str:
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    return template


def _tokenizer(folder: Path, **settings: object) -> None:
    path = folder / "tokenizer_config.json"
    _write(path, {**_read(path), **settings})


def _pictures(folder: Path, *dropped: str, **settings: object) -> None:
    path = folder / "preprocessor_config.json"
    data = {**_read(path), **settings}
    _write(path, {key: value for key, value in data.items() if key not in dropped})


def _nested(folder: Path, *, stale: bool) -> None:
    """What newer transformers save: one file with all processors in it."""
    path = folder / "processor_config.json"
    pictures = _read(folder / "preprocessor_config.json")
    _write(path, {**(_read(path) if path.is_file() else {}), "image_processor": pictures, "video_processor": {}})
    if stale:
        _pictures(folder, image_mean=[0.1, 0.1, 0.1], size={"shortest_edge": 28, "longest_edge": 3136})
    else:
        (folder / "preprocessor_config.json").unlink()


STRINGS_ONLY = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
ELSEWHERE = "{% for message in messages %}another{% endfor %}"

TEMPLATES: dict[str, Edit] = {
    "a file of its own": lambda folder: None,
    "older file": lambda folder: _write(folder / "chat_template.json", {"chat_template": _take_template(folder)}),
    "older file, and text in the tokenizer": lambda folder: (
        _write(folder / "chat_template.json", {"chat_template": _take_template(folder)}),
        _tokenizer(folder, chat_template=STRINGS_ONLY),
    ),
    "older file, and a newer one": lambda folder: (
        _write(folder / "chat_template.json", {"chat_template": _take_template(folder)}),
        _write(folder / "chat_template.jinja", ELSEWHERE),
    ),
    "own file, and text in the tokenizer": lambda folder: _tokenizer(folder, chat_template=STRINGS_ONLY),
    "processor_config.json": lambda folder: _write(
        folder / "processor_config.json",
        {
            **(_read(folder / "processor_config.json") if (folder / "processor_config.json").exists() else {}),
            "chat_template": _take_template(folder),
        },
    ),
    "processor_config.json, and others": lambda folder: (
        _write(
            folder / "processor_config.json",
            {
                **(_read(folder / "processor_config.json") if (folder / "processor_config.json").exists() else {}),
                "chat_template": _take_template(folder),
            },
        ),
        _write(folder / "chat_template.json", {"chat_template": ELSEWHERE}),
        _tokenizer(folder, chat_template=STRINGS_ONLY),
    ),
    "the tokenizer's alone": lambda folder: _tokenizer(folder, chat_template=_take_template(folder)),
    "several of the tokenizer's": lambda folder: _tokenizer(
        folder,
        chat_template=[
            {"name": "tool_use", "template": ELSEWHERE},
            {"name": "default", "template": _take_template(folder)},
        ],
    ),
    "others beside it": lambda folder: _write(folder / "additional_chat_templates" / "tool_use.jinja", ELSEWHERE),
    "the default among others": lambda folder: (
        _write(folder / "additional_chat_templates" / "tool_use.jinja", ELSEWHERE),
        _write(folder / "additional_chat_templates" / "default.jinja", _take_template(folder)),
        _tokenizer(folder, chat_template=STRINGS_ONLY),
    ),
    "pictures first in the tokenizer, in place in the processor": lambda folder: (
        _write(folder / "chat_template.json", {"chat_template": _take_template(folder)}),
        _tokenizer(folder, chat_template="{{ bos_token }}" + ELSEWHERE),
    ),
}

EVERY: dict[str, Edit] = {
    "processor_config.json alone": lambda folder: _nested(folder, stale=False),
    "processor_config.json beside a stale file": lambda folder: _nested(folder, stale=True),
    "no class": lambda folder: _pictures(folder, "image_processor_type"),
    "class of the fast kind": lambda folder: _pictures(
        folder, image_processor_type=_read(folder / "preprocessor_config.json")["image_processor_type"] + "Fast"
    ),
    "class of the feature extractors": lambda folder: _pictures(
        folder,
        "image_processor_type",
        feature_extractor_type=_read(folder / "preprocessor_config.json")["image_processor_type"].replace(
            "ImageProcessor", "FeatureExtractor"
        ),
    ),
    "absent keys": lambda folder: _pictures(
        folder, "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample", "do_convert_rgb"
    ),
    "other numbers": lambda folder: _pictures(folder, image_mean=[0.2, 0.3, 0.4], rescale_factor=0.01, resample=2),
    "no rescaling": lambda folder: _pictures(folder, do_rescale=False),
    "no normalizing": lambda folder: _pictures(folder, do_normalize=False),
    "no resizing": lambda folder: _pictures(folder, do_resize=False),
    "no size": lambda folder: _pictures(folder, "size", "crop_size"),
}
PIXELS: dict[str, Edit] = {
    "both edges": lambda folder: _pictures(folder, size={"shortest_edge": 3136, "longest_edge": 9408}),
    "pixels": lambda folder: _pictures(folder, "size", min_pixels=3136, max_pixels=9408),
    "pixels over edges": lambda folder: _pictures(
        folder, size={"shortest_edge": 12544, "longest_edge": 25088}, min_pixels=3136, max_pixels=9408
    ),
    "pixels in the size": lambda folder: _pictures(folder, size={"min_pixels": 3136, "max_pixels": 9408}),
    "the larger alone": lambda folder: _pictures(folder, max_pixels=9408),
    "one edge": lambda folder: _pictures(folder, size={"shortest_edge": 9408}),
    "a number": lambda folder: _pictures(folder, size=9408),
    "height and width": lambda folder: _pictures(folder, size={"height": 56, "width": 84}),
}
SQUARES: dict[str, Edit] = {
    "a number": lambda folder: _pictures(folder, size=56, crop_size=56),
    "one edge": lambda folder: _pictures(folder, size={"shortest_edge": 56}),
    "height and width": lambda folder: _pictures(folder, size={"height": 56, "width": 56}),
    "both edges": lambda folder: _pictures(folder, size={"shortest_edge": 56, "longest_edge": 84}),
    "no cropping": lambda folder: _pictures(folder, size={"height": 56, "width": 56}, do_center_crop=False),
    "no cropping of one edge": lambda folder: _pictures(folder, size={"shortest_edge": 56}, do_center_crop=False),
}
PICTURES = [
    *((family, name, edit) for family in FAMILIES for name, edit in EVERY.items()),
    *((family, name, edit) for family in QWEN for name, edit in PIXELS.items()),
    *((family, name, edit) for family in ("llava15", "internvl3") for name, edit in SQUARES.items()),
]

NOT_TAKEN = {
    *((family, name) for family in QWEN for name in ("pixels in the size", "one edge", "a number", "height and width")),
    ("internvl3", "one edge"),
    ("internvl3", "both edges"),
    ("internvl3", "no cropping of one edge"),
    ("llava15", "no cropping of one edge"),
    # The class's own sizes, which are not this small model's.
    ("internvl3", "no size"),
    ("llava15", "no size"),
}
"""Settings that leave transformers, or the model behind it, without a picture that it can take."""

Part = str | Image.Image
CONVERSATIONS: dict[str, list[tuple[str, list[Part]]]] = {
    "picture, then text": [("user", [noise(448, 224), "what color"])],
    "text, then picture": [("user", ["what color", noise(448, 224)])],
    "text between pictures": [("user", [noise(224, 224), "what", noise(448, 224, 1), "color"])],
    "several turns": [
        ("system", ["what ?"]),
        ("user", [noise(224, 448), "what color"]),
        ("assistant", ["red"]),
        ("user", ["what", noise(224, 224, 2)]),
    ],
    "text alone": [("user", ["what is the star ?"])],
    "odd size": [("user", [noise(61, 97), "what color"])],
}
"""Pictures whose sides are multiples of every patch, merged or not, and one of another size."""


def _expected(processor: Any, conversation: Sequence[tuple[str, list[Part]]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Token ids and pixel values, as whoever uses transformers gets them."""

    def entry(part: Part) -> dict[str, Any]:
        return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}

    messages = [{"role": role, "content": [entry(part) for part in parts]} for role, parts in conversation]
    # A processor without a template of its own has users apply the tokenizer's.
    template = None if processor.chat_template else processor.tokenizer.get_chat_template()
    made = processor.apply_chat_template(
        messages,
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
    )
    return np.asarray(made["input_ids"])[0], made.get("pixel_values")


def _compare(folder: Path, family: str, processor: Any) -> set[str]:
    """Hold every conversation against transformers, as a checkpoint and as a bundle; returns those it refuses too."""
    module = load_family(family)
    config = fetch_config(str(folder))
    dims = module.model_dims(config)
    bundle = folder.with_name("bundle")
    copy_sidecars(Checkpoint(folder=folder, config=config, tensors={}), bundle)
    refused: set[str] = set()
    prompters = Prompter(folder, folder, module, dims), Prompter(bundle / "llm", bundle / "visual", module, dims)
    for name, conversation in CONVERSATIONS.items():
        turns = [Turn(role, parts) for role, parts in conversation]
        try:
            input_ids, pixels = _expected(processor, conversation)
            _check_pixels(pixels, processor, dims)
        except (TypeError, ValueError):
            refused.add(name)
            continue
        for prompter in prompters:
            prompt = prompter.chat(turns)
            np.testing.assert_array_equal(prompt.input_ids, input_ids)
            assert bool(prompt.pictures) == (pixels is not None)
            if pixels is not None:
                patches = [picture.patches.reshape(-1, *pixels.shape[1:]) for picture in prompt.pictures]
                np.testing.assert_array_equal(np.concatenate(patches), pixels)
    return refused


def _check_pixels(pixels: np.ndarray | None, processor: Any, dims: Any) -> None:
    """Raise where the model's own vision tower would, since processors do not know it."""
    side = getattr(dims.vision, "image_size", None)
    if pixels is not None and side is not None and pixels.shape[2:] != (side, side):
        raise ValueError(f"{type(processor).__name__} makes {pixels.shape}")


def _prompter(folder: Path, family: str) -> Prompter:
    module = load_family(family)
    return Prompter(folder, folder, module, module.model_dims(fetch_config(str(folder))))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_templates(
    originals: dict[str, Path], reference: Callable[[Path, str], Any], tmp_path: Path, family: str, name: str
) -> None:
    folder = Path(shutil.copytree(originals[family], tmp_path / family))
    TEMPLATES[name](folder)
    assert not _compare(folder, family, reference(folder, family))
    _prompter(folder, family).check()


@pytest.mark.parametrize(("family", "name", "edit"), PICTURES, ids=[f"{family}-{name}" for family, name, _ in PICTURES])
def test_pictures(
    originals: dict[str, Path],
    reference: Callable[[Path, str], Any],
    tmp_path: Path,
    family: str,
    name: str,
    edit: Edit,
) -> None:
    folder = Path(shutil.copytree(originals[family], tmp_path / family))
    edit(folder)
    refused = _compare(folder, family, reference(folder, family))
    if (family, name) in NOT_TAKEN:
        assert refused == CONVERSATIONS.keys() - {"text alone"}
        with pytest.raises(CapaError, match=r"does not work with its own settings|makes (?:tiles|pictures) of"):
            _prompter(folder, family).check()
        return
    assert refused == ({"odd size"} if name == "no resizing" and family in QWEN else set())
    prompter = _prompter(folder, family)
    prompter.check()
    if refused:
        with pytest.raises(CapaError, match="the image processor refuses a picture of 61 x 97 pixels"):
            prompter("what", [noise(61, 97)])
