"""Formats and versions that are not read are refused by the key that names them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from capa_export.base.dims import Section
from capa_export.base.errors import CapaError
from capa_export.config.quantization import rounding
from capa_export.config.recipe import load_recipe
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import qwen25vl
from capa_export.model.quantized.formats import find_format, held
from capa_export.model.source import Source
from capa_export.plan.plan import dry_run
from tests.quantizing import FORMATS, quantize

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
PACKED: Any = FORMATS["packed"].config
WEIGHTS = PACKED["config_groups"]["group_0"]["weights"]


def packed(**weights: Any) -> dict[str, Any]:
    return {**PACKED, "config_groups": {"group_0": {"weights": {**WEIGHTS, **weights}}}}


REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": ({}, "quant_method: is missing; known formats: awq, gptq, compressed-tensors, modelopt, fp8"),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "quant_method: is 'bitsandbytes'; known formats"),
    "a list": ({"quant_method": ["awq"]}, "quant_method: is ['awq']; known formats"),
    "gemv": ({"quant_method": "awq", "version": "gemv", "bits": 4}, "version: is 'gemv', only 'gemm' is supported"),
    "3 bits": ({"quant_method": "gptq", "bits": 3}, "bits: is 3, only 4 and 8 are supported"),
    "AWQ of 8": ({"quant_method": "awq", "bits": 8}, "bits: is 8, and AutoAWQ's gemm layout has only 4"),
    "no bits": ({"quant_method": "awq"}, "bits: is missing"),
    "no group": (
        {"quant_method": "awq", "bits": 4, "group_size": 0},
        "group_size: must be a whole number of at least 1",
    ),
    "marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format: is 'marlin'"),
    "dynamic": ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:x": {"bits": 8}}}, "dynamic: gives layers settings"),
    "expression": ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:(": {}}}, "is no regular expression"),
    "checkpoint_format": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": [1]},
        "checkpoint_format: is [1], only",
    ),
    "desc_act": ({"quant_method": "gptq", "bits": 4, "desc_act": "no"}, "desc_act: must be true or false, not 'no'"),
    "endless": (
        {"quant_method": "gptq", "bits": 4, "dynamic": {"-:(.+)+x": {}}},
        "repeats too much, and might never end",
    ),
    "many": (
        {"quant_method": "gptq", "bits": 4, "dynamic": {"-:" + ".*" * 9: {}}},
        "repeats too much, and might never end",
    ),
    "huge": ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:a{9999999999}": {}}}, "is no regular expression"),
    "names": ({"quant_method": "awq", "bits": 4, "modules_to_not_convert": "visual"}, "must be a list of names"),
    "marlin-24": ({**PACKED, "format": "marlin-24"}, "format: is 'marlin-24', only 'pack-quantized' is supported"),
    "2 bits": (packed(num_bits=2), "weights.num_bits: is 2, only 4 and 8 are supported"),
    "floats": (packed(type="float"), "weights.type: is 'float', only 'int' is supported"),
    "blocks": (packed(strategy="block"), "weights.strategy: is 'block', only 'group', 'channel' and 'tensor'"),
    "no groups": ({**PACKED, "config_groups": {}}, "config_groups: is empty"),
    "two settings": (
        {**PACKED, "config_groups": {**PACKED["config_groups"], "b": {"weights": {**WEIGHTS, "num_bits": 8}}}},
        "config_groups: gives layers different settings",
    ),
    "inputs": (
        {**PACKED, "config_groups": {"a": {"weights": WEIGHTS, "input_activations": {"num_bits": 8}}}},
        "input_activations: quantizes inputs",
    ),
    "mixed": ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "quant_algo: is 'MIXED_PRECISION'; known"),
    "SVD": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4_SVD"},
        "quant_algo: is 'NVFP4_SVD'; known algorithms: FP8",
    ),
    "no blocks": ({"quant_method": "fp8"}, "weight_block_size: is missing"),
    "one block": ({**BLOCKS, "weight_block_size": [128]}, "weight_block_size: must be two numbers"),
    "e5m2": ({**BLOCKS, "fmt": "e5m2"}, "fmt: is 'e5m2', only 'e4m3' is supported"),
    "static": ({**BLOCKS, "activation_scheme": "static"}, "activation_scheme: is 'static', only 'dynamic'"),
}


@pytest.mark.parametrize("section", ["", "text_config", "llm_config"])
@pytest.mark.parametrize(("settings", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_is_refused_by_its_key(settings: Any, why: str, section: str) -> None:
    given = {"quantization_config": settings}
    with pytest.raises(CapaError, match=re.escape(why)) as refused:
        find_format({section: given} if section else given, "model/config.json")
    name = f"{section}.quantization_config" if section else "quantization_config"
    assert str(refused.value).startswith(f"model/config.json: {name}")
    assert "\n" not in str(refused.value)


def test_a_plain_checkpoint_has_no_format() -> None:
    assert find_format({"text_config": {}, "vision_config": {}, "quantization_config": None}, "config.json") is None


def test_a_tower_with_a_format_of_its_own_is_refused() -> None:
    with pytest.raises(CapaError, match=r"vision_config.quantization_config: a vision tower with a format of its own"):
        find_format({"vision_config": {"quantization_config": BLOCKS}}, "config.json")


def test_two_formats_in_one_config_are_refused() -> None:
    config = {"quantization_config": BLOCKS, "llm_config": {"quantization_config": FORMATS["AutoAWQ"].config}}
    with pytest.raises(CapaError, match=r"differs from llm_config.quantization_config; only one format"):
        find_format(config, "config.json")
    assert find_format({**config, "llm_config": {"quantization_config": dict(BLOCKS)}}, "config.json") is not None


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        ("FP8", "ModelOpt FP8 (E4M3), one scale a layer"),
        ("NVFP4", "ModelOpt NVFP4, groups of 16"),
        ("W4A16_AWQ", "ModelOpt INT4 AWQ, groups of 128"),
    ],
)
def test_modelopts_file_and_its_key_say_the_same(algorithm: str, name: str) -> None:
    beside = Section({"quantization": {"quant_algo": algorithm}}, "hf_quant_config.json", "")
    settings = json.loads(json.dumps({"quant_method": "modelopt", "quant_algo": algorithm}))
    for config in ({}, {"quantization_config": settings}):
        found = find_format(config, "config.json", beside)
        assert found is not None
        assert found.name == name
    other = {"quantization_config": FORMATS["AutoAWQ"].config}
    with pytest.raises(CapaError, match=f"is AutoAWQ.*but hf_quant_config.json says {re.escape(name)}"):
        find_format(other, "config.json", beside)


def test_modelopts_group_may_stand_with_its_weights() -> None:
    groups = {"group_0": {"weights": {"num_bits": 4, "group_size": 64}}}
    config = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "config_groups": groups}
    found = find_format({"quantization_config": config}, "config.json")
    assert found is not None
    assert found.name == "ModelOpt INT4 AWQ, groups of 64"


@pytest.mark.parametrize(
    ("name", "word"),
    [
        *((name, None) for name in FORMATS if FORMATS[name].config and name not in ("GPTQ by channel", "packed order")),
        *((name, "int8") for name in ("GPTQ 8 bits", "packed 8 bits", "packed tensor")),
        *((name, "fp8") for name in ("FP8 in config.json", "FP8 blocks")),
        ("AutoAWQ", "none"),
    ],
)
def test_a_plan_takes_for_packed_what_an_export_keeps(checkpoint: Path, tmp_path: Path, name: str, word: Any) -> None:
    """Of one scale a channel, and of another order of inputs that no setting names, only the weights tell."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    quantize(folder, FORMATS[name])
    form = find_format(json.loads((folder / "config.json").read_text(encoding="utf-8")), "config.json")
    kept = Source.of(open_checkpoint(str(folder)), qwen25vl, word).dims.decoder.packed
    assert form is not None and kept == (None if word == "none" else held(form, rounding(word), "config.json"))


@pytest.mark.parametrize(("name", "word"), [("AutoAWQ", "int4:32"), ("AutoAWQ", "int8"), ("FP8 blocks", "nvfp4")])
def test_a_plan_refuses_what_an_export_refuses(checkpoint: Path, tmp_path: Path, name: str, word: Any) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    quantize(folder, FORMATS[name])
    for refuse in (
        lambda: Source.of(open_checkpoint(str(folder)), qwen25vl, word),
        lambda: dry_run(
            load_recipe("qwen25vl").with_options(quantize=word), str(folder), out=None, precision="fp16", ffn=False
        ),
    ):
        with pytest.raises(CapaError, match=r"the checkpoint is quantized already .*; leave --quantize away, or take"):
            refuse()
