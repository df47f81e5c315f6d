"""What the formats' own libraries pack and unpack, where they are installed, is decoded to the same bits."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from capa_export.base.dims import Section
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.quantized import modelopt
from capa_export.model.quantized.compressed_tensors import PackQuantized
from capa_export.model.quantized.parts import Format, Parts

MODELOPT = "nvidia-modelopt is in no extra and in no lock: pip install nvidia-modelopt"


def decoded(folder: Path, form: Format, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """The weight of one layer, stored as these tensors."""
    save_file({f"layer.{part}": tensor.contiguous() for part, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    opened = open_checkpoint(str(folder))
    stored = {**opened.tensors, **opened.packed}
    parts = Parts("layer", {name.removeprefix("layer."): tensor for name, tensor in stored.items()})
    form.shape(parts)
    return form.decode(parts).dequantized()


def weight(num_outputs: int, num_inputs: int) -> torch.Tensor:
    return torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(1))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="compressed-tensors has no wheels for Python 3.10")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_unpacks_the_same(bits: int, strategy: str, symmetric: bool, tmp_path: Path) -> None:  # noqa: FBT001 - A parameter of the test.
    import compressed_tensors as library  # pyright: ignore[reportMissingImports]
    from compressed_tensors.compressors.pack_quantized.base import (  # pyright: ignore[reportMissingImports]
        PackedQuantizationCompressor,
    )

    quantization: Any = library.quantization
    settings = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    settings |= {"group_size": 32} if strategy == "group" else {}
    args = quantization.QuantizationArgs(**settings)
    given, top = weight(40, 96), 2**bits - 1
    grouped = given.unflatten(1, (-1, 32 if strategy == "group" else 96))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = torch.maximum(-low, high) / (top // 2) if symmetric else (high - low) / top
    zero = torch.zeros_like(scale) if symmetric else (-low / scale).round() - 2 ** (bits - 1)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    state = {"weight": given, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    packed = PackedQuantizationCompressor.compress(state, scheme)
    meant = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    config = {"format": "pack-quantized", "config_groups": {"group_0": {"weights": settings}}}
    found = decoded(tmp_path, PackQuantized.read(Section(config, "config.json", "")), packed)
    np.testing.assert_array_equal(found, meant.numpy())


def test_modelopt_dequantizes_nvfp4_the_same(tmp_path: Path) -> None:
    pytest.importorskip("modelopt", reason=MODELOPT)
    from modelopt.torch.quantization.qtensor import NVFP4QTensor  # pyright: ignore[reportMissingImports]

    packed, scale, outer = NVFP4QTensor.quantize(weight(40, 96), 16)
    meant = packed.dequantize(dtype=torch.float32, scale=scale, double_scale=outer, block_sizes={-1: 16})
    form = modelopt.read(Section({"quant_algo": "NVFP4"}, "", ""))
    stored = packed._quantized_data
    found = decoded(tmp_path, form, {"weight": stored, "weight_scale": scale, "weight_scale_2": outer})
    np.testing.assert_array_equal(found, meant.numpy())


def test_modelopt_dequantizes_fp8_the_same(tmp_path: Path) -> None:
    pytest.importorskip("modelopt", reason=MODELOPT)
    from modelopt.torch.quantization.qtensor import FP8QTensor  # pyright: ignore[reportMissingImports]

    given = weight(40, 96)
    packed, scale = FP8QTensor.quantize(given, given.abs().amax() / 448)
    meant = packed.dequantize(dtype=torch.float32, scale=scale)
    form = modelopt.read(Section({"quant_algo": "FP8"}, "", ""))
    found = decoded(tmp_path, form, {"weight": packed._quantized_data, "weight_scale": scale})
    np.testing.assert_array_equal(found, meant.numpy())


def test_modelopt_packs_int4_so(tmp_path: Path) -> None:
    pytest.importorskip("modelopt", reason=MODELOPT)
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8  # pyright: ignore[reportMissingImports]

    given = weight(40, 96)
    scale = given.unflatten(1, (-1, 32)).abs().amax(-1) / 7
    by_column = scale.repeat_interleave(32, 1)
    meant = (given / by_column).round().clamp(-8, 7) * by_column
    form = modelopt.read(Section({"quant_algo": "W4A16_AWQ", "group_size": 32}, "", ""))
    found = decoded(tmp_path, form, {"weight": pack_int4_in_uint8(given, scale, 32), "weight_scale": scale})
    np.testing.assert_array_equal(found, meant.numpy())
