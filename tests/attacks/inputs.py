"""Attacks by pictures, videos, prompts, tokenizers, templates and options."""

import json
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

from capa_export.bundle.store import Bundle
from tests.attacks.victims import Attack, Victim, changed_json
from tests.conftest import recorded

__all__ = ["OPTIONS", "PICTURES", "PROMPTS"]


def gif(frames: int, width: int = 1, height: int = 1) -> bytes:
    """A GIF of so many frames, each of one pixel; the canvas is as large as it says."""
    header = b"GIF89a" + width.to_bytes(2, "little") + height.to_bytes(2, "little") + b"\x80\0\0\0\0\0\xff\xff\xff"
    pixel = b"\x01\0\x01\0\0\x02\x02\x44\x01\0"
    return header + (b"\x21\xf9\x04\0\x0a\0\0\0\x2c\0\0\0\0" + pixel) * frames + b";"


def tiff(width: int, height: int) -> bytes:
    """A TIFF that says how large it is, and holds nothing."""
    entries = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 1)]
    parts = [tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little") for tag, value in entries]
    return b"II*\0\x08\0\0\0" + len(parts).to_bytes(2, "little") + b"".join(parts) + b"\0\0\0\0"


def png(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and holds nothing."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\0\0\0\0"
    chunks = (header, b"IDAT" + zlib.compress(b""), b"IEND")
    whole = (len(chunk[4:]).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n{} loop\n%%EOF\n"
"""A program that never ends, for whoever runs it."""


def _picture(name: str, data: bytes, option: str = "--image") -> Attack:
    def attack(victim: Victim) -> list[object]:
        (victim.folder / name).write_bytes(data)
        return ["run", victim.bundle, "--prompt", "what ?", option, victim.folder / name, "--max-new-tokens", 2]

    return attack


def _saved(width: int, height: int, mode: str = "L", suffix: str = "png") -> Attack:
    def attack(victim: Victim) -> list[object]:
        path = victim.folder / f"picture.{suffix}"
        Image.new(mode, (width, height)).save(path)
        return victim.look(path)

    return attack


def _frames(victim: Victim) -> list[object]:
    folder = victim.folder / "frames"
    folder.mkdir()
    data = (victim.pictures / "0.png").read_bytes()
    for index in range(1000):
        (folder / f"{index}.png").write_bytes(data)
    return ["run", victim.bundle, "--prompt", "what ?", "--video", folder]


def _messages(messages: Any) -> Attack:
    def attack(victim: Victim) -> list[object]:
        path = victim.folder / "m.json"
        path.write_text(json.dumps(messages))
        (victim.folder / "a.gif").write_bytes(gif(100))
        return ["run", victim.bundle, "--messages", path, "--max-new-tokens", 2]

    return attack


def _turn(**part: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part, {"type": "text", "text": "what ?"}]}]


PICTURES: dict[str, Attack] = {
    "an EPS that is named a PNG": _picture("a.png", EPS),
    "a PNG of a billion pixels": _picture("a.png", png(40_000, 40_000)),
    "a TIFF of a billion pixels": _picture("a.tiff", tiff(40_000, 40_000)),
    "a TIFF of 2^62 pixels": _picture("a.tiff", tiff(2**31 - 1, 2**31 - 1)),
    "a strip": _saved(100_000, 1),
    "a GIF of 100,000 frames": _picture("a.gif", gif(100_000)),
    "a film of 100,000 frames": _picture("a.gif", gif(100_000), "--video"),
    "a film of large frames": _picture("a.gif", gif(2_000, 8_000, 8_000), "--video"),
    "frames of 4 gigapixels": _picture("a.gif", gif(3, 65_535, 65_535), "--video"),
    "a thousand pictures as a film": _frames,
    "an infinite rate in messages": _messages(_turn(type="video", video="a.gif", fps=float("inf"))),
    "a huge rate in messages": _messages(_turn(type="video", video="a.gif", fps=1e300)),
    "a huge data URL": _messages(_turn(type="image", image="data:image/png;base64," + "A" * 10_000_000)),
    "no picture": _picture("a.png", b"\x89PNG\r\n\x1a\n" + b"\xff" * 99),
    "an empty picture": _picture("a.png", b""),
}


def _template(text: str) -> Attack:
    def attack(victim: Victim) -> list[object]:
        def change(data: Any) -> None:
            data["tokenizer"]["chat_template"] = text

        return victim.run(victim.bundle_with("onnx/processors/processors.json", change))

    return attack


def _tokenizer(change: Callable[[Any], Any]) -> Attack:
    return lambda victim: victim.run(victim.bundle_with("onnx/processors/tokenizer.json", change))


def _tenfold(data: Any) -> None:
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    data["normalizer"] = {"type": "Sequence", "normalizers": [replace] * 12}


def _backtracking(data: Any) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(.+)+\\x00"}, "behavior": "Isolated", "invert": False}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split]}


def _generation(**settings: Any) -> Attack:
    return lambda victim: victim.run(
        victim.bundle_with("onnx/llm/generation_config.json", lambda data: data.update(settings))
    )


def _endless_answer(victim: Victim) -> list[object]:
    """No token ends it, but its context does."""
    bundle = victim.bundle_with("onnx/llm/generation_config.json", _never_ends)
    changed_json(bundle / "onnx/llm/config.json", _short_context)
    recorded(Bundle(bundle))
    return victim.run(bundle)


def _never_ends(data: Any) -> None:
    data.update(max_new_tokens=10**18, eos_token_id=10**6)


def _short_context(data: Any) -> None:
    data["text_config"]["max_position_embeddings"] = 256


def _long_prompt(victim: Victim) -> list[object]:
    path = victim.folder / "m.json"
    text = "what " * 300_000
    path.write_text(json.dumps([{"role": "user", "content": text}]))
    return ["run", victim.bundle, "--messages", path]


PROMPTS: dict[str, Attack] = {
    "a template of nested loops": _template("{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3),
    "a template of 2 GB": _template("{{ 'a' * 2000000000 }}"),
    "a template that is none": _template("{% for"),
    "a template that says control characters": _template("{{ raise_exception('\x1b[2J') }}"),
    "a normalizer that multiplies": _tokenizer(_tenfold),
    "an expression that backtracks": _tokenizer(_backtracking),
    "a vocabulary of nothing": _tokenizer(lambda data: data["model"].update(vocab={}, merges=[])),
    "ids beyond the table": _tokenizer(
        lambda data: data["model"]["vocab"].update(
            {key: value + 10**6 for key, value in data["model"]["vocab"].items()}
        )
    ),
    "a prompt of 300,000 words": _long_prompt,
    "an answer without an end": _endless_answer,
    "a penalty of infinity": _generation(repetition_penalty=float("inf")),
    "a temperature of nothing": _generation(do_sample=True, temperature=1e-300),
    "a huge n-gram": _generation(no_repeat_ngram_size=10**9, max_new_tokens=2),
}


def _options(*options: object) -> Attack:
    def attack(victim: Victim) -> list[object]:
        places: dict[object, object] = {
            "BUNDLE": victim.bundle,
            "RECIPE": victim.recipe,
            "PICTURE": victim.pictures / "0.png",
            "PICTURES": victim.pictures,
            "OUT": victim.folder / "out",
        }
        return [places.get(option, option) for option in options]

    return attack


_RUN = ("run", "BUNDLE", "--prompt", "what ?", "--image", "PICTURE")
_PLAN = ("plan", "-m", "RECIPE", "-t", "onnx")
OPTIONS: dict[str, Attack] = {
    **{
        f"{options[-1]} for {options[-2]}": _options(*options)
        for options in (
            *((*_RUN, "--video", "PICTURE", "--fps", value) for value in ("inf", "nan", "-1", "1e300")),
            *((*_RUN, "--ratio", value) for value in ("nan", "inf", "-1", "1")),
            *((*_RUN, "--temperature", value) for value in ("nan", "inf", "0", "1e-320")),
            *((*_RUN, "--top-p", value) for value in ("nan", "2")),
            *((*_RUN, "--top-k", value) for value in ("-1", 10**30)),
            *((*_RUN, "--repetition-penalty", value) for value in ("nan", "inf", "1e308")),
            *((*_RUN, "--max-new-tokens", value) for value in (0, -1)),
            *((*_RUN, "--temperature", 1, "--seed", value) for value in (-1, 10**400)),
            *((*_RUN, "--min-pixels", value) for value in (0, -1, 10**30)),
            *((*_RUN, "--max-pixels", value) for value in (0, -1, 10**30)),
            *((*_PLAN, "--ratio", value) for value in ("nan", "inf")),
            *((*_PLAN, "--ffn-budget", value) for value in ("nan", "-1")),
            *((*_PLAN, "--memory", value) for value in ("inf", "nanGB", "-1GB", "1e400GB")),
            *((*_PLAN, "--min-keep-per-image", value) for value in (10**30,)),
            *(
                (*_PLAN, "--schedule", value)
                for value in ("capa@2:nan", "capa@2:1e400", f"capa@{10**30}:0.5", "\x1b[2J")
            ),
            *((*_PLAN, "--fp32-layers", value) for value in (f"{10**30}", "-1", "\x1b[2J", "visual." * 9999)),
            *((*_PLAN, "--min-pixels", value) for value in (10**30,)),
            *(("validate", "BUNDLE", "--images", "PICTURES", "--seed", value) for value in (10**400,)),
            *(("evaluate", "BUNDLE", "--data", "PICTURES", "-o", "OUT", "--limit", value) for value in (0, 10**30)),
            *(("inspect", value) for value in ("\x1b[2J", "a\0b", "x" * 5000, "")),
            *(("plan", value) for value in ("\x1b[2J", "a\0b", "x" * 5000, "../../x/y", "")),
            *(("plan", "-m", value) for value in ("\x1b[2J.toml", "a\0b.toml", "x" * 5000 + ".toml")),
        )
    },
}
