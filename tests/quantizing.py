"""Small models stored in the published quantized formats, by packers that share no code with the decoders.

Each packer rounds a weight [out, in] to the format's numbers, packs those with loops over single numbers, and gives the
stored tensors with the weight that the format's specification says they stand for.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

__all__ = ["FORMATS", "GROUP", "Packed", "Packer", "quantize"]

GROUP = 32
DECODER_LINEARS = re.compile(r"layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight$")
"""Names of the weights of a decoder's linear layers; a vision tower's have other ones, or `vision` in them."""
Tensors = dict[str, torch.Tensor]
Packed = tuple[Tensors, torch.Tensor]


@dataclass(frozen=True)
class Packer:
    """A format: the tensors of a layer, and what its config says."""

    pack: Callable[[torch.Tensor], Packed]
    config: Mapping[str, Any]
    beside: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """`hf_quant_config.json`."""


def quantize(folder: Path, packer: Packer, chosen: re.Pattern[str] = DECODER_LINEARS) -> dict[str, torch.Tensor]:
    """Store a checkpoint's decoder in a format, in place; gives its layers' weights by stored name."""
    stored = load_file(folder / "model.safetensors")
    expected: Tensors = {}
    for name in [name for name in stored if chosen.search(name) and "visual" not in name and "vision" not in name]:
        parts, expected[name] = packer.pack(stored.pop(name).float())
        stored |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if packer.config:
        config["quantization_config"] = dict(packer.config)
    (folder / "config.json").write_text(json.dumps(config))
    if packer.beside:
        (folder / "hf_quant_config.json").write_text(json.dumps(packer.beside))
    return expected


def _words(rows: list[list[int]], bits: int, order: list[int] | None = None) -> torch.Tensor:
    """Rows of numbers without sign as rows of words of 32 bits, padded with zeros."""
    each = 32 // bits
    result: list[list[int]] = []
    for row in rows:
        words: list[int] = []
        for start in range(0, len(row), each):
            word = 0
            for slot in range(each):
                index = start + (order[slot] if order else slot)
                word |= (row[index] if index < len(row) else 0) << (bits * slot)
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        result.append(words)
    return torch.tensor(result, dtype=torch.int32)


def _groups(weight: torch.Tensor, size: int, bits: int, *, symmetric: bool, dtype: torch.dtype) -> Any:
    """Numbers without sign [out, in], zero points [out, groups] and scales [out, groups] by round to nearest."""
    top = (1 << bits) - 1
    grouped = weight.unflatten(1, (-1, size))
    if symmetric:
        scales = (grouped.abs().amax(-1) / (top // 2)).to(dtype)
        zeros = torch.full(scales.shape, 1 << (bits - 1))
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = ((high - low) / top).to(dtype)
        zeros = (-low / scales.float()).round().clamp(1, top).to(torch.int64)
    numbers = (grouped / scales.float()[..., None]).round() + zeros[..., None]
    return numbers.clamp(0, top).to(torch.int64).flatten(1), zeros, scales


def _meant(numbers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, of: list[int]) -> torch.Tensor:
    """The weight, number by number: the whole difference by the scale of the input's group, exact in FP64."""
    rows = [
        [(number - zeros_of[group]) * scales_of[group] for number, group in zip(row, of, strict=True)]
        for row, zeros_of, scales_of in zip(numbers.tolist(), zeros.tolist(), scales.tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).float()


def _in_groups(num_inputs: int, size: int = GROUP) -> list[int]:
    return [i // size for i in range(num_inputs)]


def awq(weight: torch.Tensor) -> Packed:
    """AutoAWQ: `order_map` of its `WQLinear_GEMM.from_linear`, transposed."""
    numbers, zeros, scales = _groups(weight, GROUP, 4, symmetric=False, dtype=torch.float16)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    parts = {
        "qweight": _words(numbers.T.tolist(), 4, order),
        "qzeros": _words(zeros.T.tolist(), 4, order),
        "scales": scales.T.contiguous(),
    }
    return parts, _meant(numbers, zeros, scales, _in_groups(weight.shape[1]))


def gptq(bits: int, *, version: int = 1, ordered: bool = False, size: int = GROUP) -> Callable[[torch.Tensor], Packed]:
    """AutoGPTQ and GPTQModel; `ordered` puts inputs into groups in a shuffled order, as by activation."""

    def pack(weight: torch.Tensor) -> Packed:
        num_inputs = weight.shape[1]
        columns = num_inputs if size == -1 else size
        order = torch.arange(num_inputs)
        if ordered:
            order = torch.randperm(num_inputs, generator=torch.Generator().manual_seed(7))
        numbers, zeros, scales = _groups(weight[:, order], columns, bits, symmetric=False, dtype=torch.float16)
        of = [0] * num_inputs
        for place, i in enumerate(order.tolist()):
            of[i] = place // columns
        unordered = numbers[:, order.argsort()]
        parts = {
            "qweight": _columns(unordered, bits),
            "qzeros": _words([[z - (version == 1) for z in row] for row in zeros.T.tolist()], bits),
            "scales": scales.T.contiguous(),
            "g_idx": torch.tensor(of, dtype=torch.int32),
        }
        return parts, _meant(unordered, zeros, scales, of)

    return pack


def _columns(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers [out, in] packed along the inputs, as words [in*bits/32, out]."""
    return _words(numbers.tolist(), bits).T.contiguous()


def pack_quantized(bits: int, strategy: str, *, symmetric: bool, ordered: bool = False) -> Any:
    """compressed-tensors: BF16 scales, zero points packed along the outputs."""

    def pack(weight: torch.Tensor) -> Packed:
        num_inputs = weight.shape[1]
        columns = GROUP if strategy == "group" else num_inputs
        order = torch.arange(num_inputs)
        if ordered:
            order = torch.randperm(num_inputs, generator=torch.Generator().manual_seed(7))
        numbers, zeros, scales = _groups(weight[:, order], columns, bits, symmetric=symmetric, dtype=torch.bfloat16)
        if strategy == "tensor":
            scales[:] = scales.amax()
            numbers = ((weight / scales.float()).round() + zeros).clamp(0, (1 << bits) - 1).to(torch.int64)
        of = [0] * num_inputs
        for place, i in enumerate(order.tolist()):
            of[i] = place // columns
        unordered = numbers[:, order.argsort()]
        parts = {
            "weight_packed": _words(unordered.tolist(), bits),
            "weight_scale": scales[:1, 0].clone() if strategy == "tensor" else scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = _words(zeros.T.tolist(), bits).T.contiguous()
        if ordered:
            parts["weight_g_idx"] = torch.tensor(of, dtype=torch.int32)
        return parts, _meant(unordered, zeros, scales, of)

    return pack


def int4_awq(weight: torch.Tensor) -> Packed:
    """ModelOpt: two's complement, two outputs an octet, the input scaled first."""
    pre = 2.0 ** torch.linspace(-1, 1, weight.shape[1]).to(torch.bfloat16)
    numbers, zeros, scales = _groups(weight / pre.float(), GROUP, 4, symmetric=True, dtype=torch.float32)
    octets = [
        [((int(low) - 8) & 15) | (((int(high) - 8) & 15) << 4) for low, high in zip(*pair, strict=True)]
        for pair in zip(numbers[0::2].tolist(), numbers[1::2].tolist(), strict=True)
    ]
    parts = {"weight": torch.tensor(octets, dtype=torch.uint8), "weight_scale": scales, "pre_quant_scale": pre}
    return parts, _meant(numbers, zeros, scales, _in_groups(weight.shape[1])) * pre.float()


def fp8(weight: torch.Tensor) -> Packed:
    """ModelOpt: one scale a layer."""
    scale = weight.abs().amax() / 448
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    parts = {"weight": numbers, "weight_scale": scale, "input_scale": torch.tensor(0.03)}
    return parts, (_e4m3(numbers).double() * scale.double()).float()


def fp8_blocks(weight: torch.Tensor) -> Packed:
    """Blocks of 48 x 40, which no layer is a multiple of in both directions."""
    rows, columns = 48, 40
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    numbers, meant = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            block = slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns)
            scales[r, c] = weight[block].abs().amax() / 448
            numbers[block] = (weight[block] / scales[r, c]).to(torch.float8_e4m3fn)
            meant[block] = (_e4m3(numbers[block].contiguous()).double() * scales[r, c].double()).float()
    return {"weight": numbers, "weight_scale_inv": scales}, meant


def nvfp4(*, pre: bool = False) -> Callable[[torch.Tensor], Packed]:
    """ModelOpt: two inputs an octet, E2M1 in groups of 16 whose scales are FP8 under one of FP32."""

    def pack(weight: torch.Tensor) -> Packed:
        factors = 2.0 ** torch.linspace(-1, 1, weight.shape[1])
        scaled = weight / factors if pre else weight
        outer = scaled.abs().amax() / (6 * 448)
        grouped = scaled.unflatten(1, (-1, 16))
        scales = (grouped.abs().amax(-1) / 6 / outer).clamp(2**-9, 448).to(torch.float8_e4m3fn)
        step = (_e4m3(scales) * outer)[..., None]
        distance = (grouped / step)[..., None] - _E2M1
        codes = distance.abs().argmin(-1).flatten(1)
        octets = [[low | high << 4 for low, high in zip(row[0::2], row[1::2], strict=True)] for row in codes.tolist()]
        parts = {
            "weight": torch.tensor(octets, dtype=torch.uint8),
            "weight_scale": scales,
            "weight_scale_2": outer,
            "input_scale": torch.tensor(0.02),
        }
        meant = (_E2M1[codes].unflatten(1, (-1, 16)) * step).flatten(1)
        if pre:
            parts["pre_quant_scale"] = factors
            meant = meant * factors
        return parts, meant

    return pack


_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _e4m3(numbers: torch.Tensor) -> torch.Tensor:
    """FP8 numbers by their bits: sign, four bits of exponent with a bias of 7, three of mantissa, no infinity."""
    table: list[float] = []
    for octet in range(256):
        exponent, mantissa = octet >> 3 & 15, octet & 7
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        table.append(float("nan") if octet & 127 == 127 else -size if octet & 128 else size)
    return torch.tensor(table)[numbers.view(torch.uint8).long()]


def _awq_config(**settings: Any) -> dict[str, Any]:
    given = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True}
    return {**given, "modules_to_not_convert": ["visual", "vision_model", "vision_tower"], **settings}


def _gptq_config(bits: int, **settings: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": False, "desc_act": False, **settings}


def _packed_config(bits: int, strategy: str, *, symmetric: bool, actorder: str | None = None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric, "actorder": actorder}
    weights["group_size"] = GROUP if strategy == "group" else None
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head", "re:.*visual.*"],
    }


def _modelopt(algorithm: str, **settings: Any) -> dict[str, Any]:
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head", "visual*"]}
    return {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": {**quantization, **settings}}


FORMATS: Mapping[str, Packer] = {
    "AutoAWQ": Packer(awq, _awq_config()),
    "GPTQ": Packer(gptq(4), _gptq_config(4)),
    "GPTQ v2": Packer(gptq(4, version=2), _gptq_config(4, checkpoint_format="gptq_v2")),
    "GPTQ desc_act": Packer(gptq(4, ordered=True), _gptq_config(4, desc_act=True)),
    "GPTQ 8 bits": Packer(gptq(8), _gptq_config(8)),
    "GPTQ by channel": Packer(gptq(4, size=-1), _gptq_config(4, group_size=-1)),
    "packed": Packer(pack_quantized(4, "group", symmetric=True), _packed_config(4, "group", symmetric=True)),
    "packed zeros": Packer(pack_quantized(4, "group", symmetric=False), _packed_config(4, "group", symmetric=False)),
    "packed 8 bits": Packer(
        pack_quantized(8, "channel", symmetric=False), _packed_config(8, "channel", symmetric=False)
    ),
    "packed tensor": Packer(pack_quantized(8, "tensor", symmetric=True), _packed_config(8, "tensor", symmetric=True)),
    "packed order": Packer(
        pack_quantized(4, "group", symmetric=True, ordered=True),
        _packed_config(4, "group", symmetric=True, actorder="group"),
    ),
    "INT4 AWQ": Packer(
        int4_awq, {}, _modelopt("W4A16_AWQ", group_size=GROUP, has_zero_point=False, pre_quant_scale=True)
    ),
    "FP8": Packer(fp8, {}, _modelopt("FP8")),
    "FP8 in config.json": Packer(fp8, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}),
    "NVFP4": Packer(nvfp4(), {}, _modelopt("NVFP4", group_size=16)),
    "NVFP4 AWQ": Packer(nvfp4(pre=True), {}, _modelopt("NVFP4_AWQ", group_size=16)),
    "FP8 blocks": Packer(
        fp8_blocks,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [48, 40],
            "modules_to_not_convert": ["visual", "lm_head"],
        },
    ),
}
"""Formats that are read, by a name for test ids."""
