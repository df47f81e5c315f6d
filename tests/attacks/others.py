"""Attacks by pipes, by what is named as a key, by targets, by kits, and by checkpoints that are quantized."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, x25519
from safetensors.torch import load_file, save_file

from capa_export.base.toml import shipped
from capa_export.bundle.store import digest_of
from capa_export.trt.kit_file import KIT
from tests.attacks.victims import Attack, Victim
from tests.quantizing import FORMATS, quantize
from tests.targets import one_gpu
from tests.trt.test_builder import NUM_KEEP
from tests.trt.test_kit_file import write_kit

__all__ = ["KEYS", "KITS", "PIPES", "QUANTIZED", "TARGETS"]


def _piped(*options: object, name: str = "pipe") -> Attack:
    def attack(victim: Victim) -> list[object]:
        os.mkfifo(victim.folder / name)
        places: dict[object, object] = {
            "PIPE": victim.folder / name,
            "BUNDLE": victim.bundle,
            "RECIPE": victim.recipe,
            "CHECKPOINT": victim.checkpoint,
            "PICTURES": victim.pictures,
            "OUT": victim.folder / "out",
        }
        return [places.get(option, option) for option in options]

    return attack


_EXPORT = ("export", "-m", "RECIPE", "--checkpoint", "CHECKPOINT", "-o", "OUT")
PIPES: dict[str, Attack] = {
    "a pipe for --model": _piped("plan", "-m", "PIPE", "-t", "onnx", name="pipe.toml"),
    "a pipe for --target": _piped("plan", "-m", "RECIPE", "-t", "PIPE", name="pipe.toml"),
    "a pipe for --gate": _piped("validate", "BUNDLE", "--gate", "PIPE", name="pipe.toml"),
    "a pipe for --messages": _piped("run", "BUNDLE", "--messages", "PIPE"),
    "a pipe for --image": _piped("run", "BUNDLE", "--prompt", "x", "--image", "PIPE"),
    "a pipe for --video": _piped("run", "BUNDLE", "--prompt", "x", "--video", "PIPE"),
    "a pipe for --images": _piped("validate", "BUNDLE", "--images", "PIPE"),
    "a pipe of conversations for --images": _piped("validate", "BUNDLE", "--images", "PIPE", name="pipe.jsonl"),
    "a pipe for --data": _piped("evaluate", "BUNDLE", "--data", "PIPE", "-o", "OUT", name="pipe.jsonl"),
    "a pipe for --calibration": _piped(*_EXPORT, "--calibration", "PIPE"),
    "a pipe for --sign": _piped(*_EXPORT, "--sign", "PIPE"),
    "a pipe for --verify-key": _piped("inspect", "BUNDLE", "--verify-key", "PIPE"),
    "a pipe for --out": _piped(*_EXPORT[:-1], "PIPE"),
    "a pipe for a bundle": _piped("inspect", "PIPE"),
    "a pipe for a checkpoint": _piped("plan", "PIPE", "-t", "onnx"),
    "a pipe for a kit": _piped("engine", "PIPE", "--on-device"),
    "a pipe for --plugin-library": _piped("engine", "BUNDLE", "--plugins", "native", "--plugin-library", "PIPE"),
    "a pipe for --junit": _piped("validate", "BUNDLE", "--junit", "PIPE"),
}


def _key(data: bytes | None, *options: object) -> Attack:
    def attack(victim: Victim) -> list[object]:
        path = victim.folder / "key.pem"
        path.mkdir() if data is None else path.write_bytes(data)
        places: dict[object, object] = {"KEY": path, "BUNDLE": victim.bundle}
        return [places.get(option, option) for option in (*options, "KEY")]

    return attack


def _pem(key: Any, *, public: bool = False) -> bytes:
    if public:
        return key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


_OWN = ed25519.Ed25519PrivateKey.generate()
_WRONG_KEYS: dict[str, bytes | None] = {
    "an empty file": b"",
    "a folder": None,
    "a curve": _pem(ec.generate_private_key(ec.SECP256R1())),
    "a public curve": _pem(ec.generate_private_key(ec.SECP256R1()), public=True),
    "Ed448": _pem(ed448.Ed448PrivateKey.generate()),
    "a public X25519": _pem(x25519.X25519PrivateKey.generate(), public=True),
    "the other half": _pem(_OWN, public=True),
    "the other half of it": _pem(_OWN),
    "a certificate": b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n",
    "OpenSSH's": _OWN.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    ),
    "a megabyte of nothing": bytes(1 << 20),
    "control characters": b"\x1b[2J\x1b]0;owned\x07",
    "no base64": b"-----BEGIN PUBLIC KEY-----\n\xff\xfe=\n-----END PUBLIC KEY-----\n",
    "a nested sequence": b"-----BEGIN PRIVATE KEY-----\n" + b"MIAw" * 9_000 + b"\n-----END PRIVATE KEY-----\n",
}
KEYS: dict[str, Attack] = {
    f"{kind} for {options[-1]}": _key(data, *options)
    for kind, data in _WRONG_KEYS.items()
    for options in (("inspect", "BUNDLE", "--verify-key"), ("validate", "BUNDLE", "--sign"))
}


def _target(change: Callable[[str], str], *, forecast: bool = True) -> Attack:
    def attack(victim: Victim) -> list[object]:
        text = (shipped("engines") / "orin.toml").read_text(encoding="utf-8")
        changed = change(text)
        assert changed != text
        path = victim.folder / "t.toml"
        path.write_text(changed, encoding="utf-8", errors="surrogatepass")
        command = ["plan", "-m", victim.recipe, "--checkpoint", victim.checkpoint]
        return [*(command if forecast else ["engine", victim.bundle]), "-t", path]

    return attack


def _instead(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, 1)


TARGETS: dict[str, Attack] = {
    f"{new[:30]} for {old[:30]}, {'planned' if forecast else 'built'}": _target(_instead(old, new), forecast=forecast)
    for old, new in (
        ("memory = 4,", "memory = 0,"),
        ("memory = 4,", "memory = inf,"),
        ("memory = 4,", "memory = -4,"),
        ("bandwidth = 34,", "bandwidth = 0,"),
        ("bandwidth = 34,", "bandwidth = nan,"),
        ("tflops = 5 ", "tflops = 0 "),
        ("tflops = 5 ", "tflops = 1e400 "),
        ('version_min = "10.3"', 'version_min = "x"'),
        ('version_min = "10.3"', f'version_min = "{"1." * 3000}"'),
        ('compute_capabilities = ["8.7"]', "compute_capabilities = []"),
        ('compute_capabilities = ["8.7"]', 'compute_capabilities = ["8.7;x"]'),
        ('precisions = ["fp16", "bf16", "fp32"]', "precisions = []"),
        ('limits_of = "rtx"', 'limits_of = "../../x"'),
        ("sequence = { min = 1,", "sequence = { min = 5000,"),
        ("max = 4096 }", "max = 100000000000000000000 }"),
        ("batch = { min = 1, opt = 1, max = 1 }", "batch = { min = 0, opt = 0, max = 0 }"),
        ('runtime = "tensorrt"', 'runtime = "os"'),
        ('built = "on-device"', 'built = "here"'),
    )
    for forecast in (True, False)
}


def _kit(change: Callable[[dict[str, Any]], Any]) -> Attack:
    def attack(victim: Victim) -> list[object]:
        kit = write_kit(victim.folder / "kit", one_gpu(values=NUM_KEEP), "llm/tiny")
        spec = json.loads((kit / KIT).read_text(encoding="utf-8"))
        del spec["digest"]
        spec = change(spec) or spec
        (kit / KIT).write_text(json.dumps({**spec, "digest": digest_of(spec)}), encoding="utf-8")
        return ["engine", kit, "--on-device"]

    return attack


def _saying(key: str, value: Any) -> Attack:
    return _kit(lambda spec: spec.update({key: value}))


KITS: dict[str, Attack] = {
    f"{key} {kind}": _saying(key, value)
    for key in (
        *("tool", "target", "runtime", "install", "version", "version_min", "version_below", "weights", "plugins"),
        *("compute_capabilities", "cpu", "jetpack", "files", "engines", "golden", "lowered_below"),
    )
    for kind, value in {
        "list": [1],
        "text": "../x",
        "escape": "\x1b[2J",
        "surrogate": "\ud800",
        "number": 10**400,
        "null": None,
        "object": {"a": {}},
    }.items()
}


def _quantized(form: str, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], *, plan: bool) -> Attack:
    def attack(victim: Victim) -> list[object]:
        copy = Path(shutil.copytree(victim.checkpoint, victim.folder / "checkpoint"))
        quantize(copy, FORMATS[form])
        config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(copy / "model.safetensors")
        change(config["quantization_config"], tensors)
        (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(
            {name: one.contiguous() for name, one in tensors.items()}, copy / "model.safetensors", {"format": "pt"}
        )
        return (victim.plan if plan else victim.export)(copy)

    return attack


def _setting(**settings: Any) -> Callable[[dict[str, Any], Any], Any]:
    return lambda config, _: config.update(settings)


def _tensor(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, dict[str, torch.Tensor]], Any]:
    def changed(_: Any, tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(f".{part}"))
        tensors[name] = change(tensors[name])

    return changed


_SETTINGS: dict[str, tuple[tuple[str, Any], ...]] = {
    "AutoAWQ": (
        *(("bits", bits) for bits in (0, -4, 3, 10**9, "4", None, [4])),
        *(("quant_method", value) for value in ([1], None, "\ud800", "x")),
    ),
    "GPTQ": (
        *(("group_size", size) for size in (0, -2, 10**12, "x", 1.5, True)),
        *(("desc_act", value) for value in ("yes", [], 10**30)),
        *(("checkpoint_format", value) for value in ([1], {}, "\x1b[2J")),
    ),
    "packed": (
        *(("config_groups", value) for value in ([], {}, {"a": 1}, None, "x")),
        *(("ignore", value) for value in ("re:(", ["re:("], ["re:(.+)+x"], 1)),
    ),
}
QUANTIZED: dict[str, Attack] = {
    f"plan: {form}: {key} {value!r:.20}": _quantized(form, _setting(**{key: value}), plan=True)
    for form, settings in _SETTINGS.items()
    for key, value in settings
} | {
    f"export: {form}: {part} {kind}": _quantized(form, _tensor(part, change), plan=False)
    for form, part in (
        *(("AutoAWQ", part) for part in ("qweight", "qzeros", "scales")),
        *(("GPTQ desc_act", part) for part in ("qweight", "qzeros", "g_idx")),
        *(("packed zeros", part) for part in ("weight_packed", "weight_zero_point", "weight_shape")),
    )
    for kind, change in {
        "empty": lambda one: one[:0],
        "alone": lambda one: one.reshape(-1)[0].clone(),
        "deep": lambda one: one[None],
        "half": lambda one: one[: len(one) // 2],
        "of bytes": lambda one: one.to(torch.uint8),
        # Any bits are four numbers; an order, a shape and a scale have bounds.
        **({"huge": lambda one: torch.full_like(one, torch.inf if one.is_floating_point() else 2**31 - 1)}
            if part in ("scales", "g_idx", "weight_shape") else {}),
        **({"negative": lambda one: torch.full_like(one, -1)} if part in ("g_idx", "weight_shape") else {}),
    }.items()
}  # fmt: skip
