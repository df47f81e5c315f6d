"""Random checkpoints are read as what they stand for; in AutoAWQ's layout weights have the size of plain ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import Qwen3VLForConditionalGeneration

from benchmarks.random_checkpoint import CONFIGS, write
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.source import Source

TOWER = {"depth": 1, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 256}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


@pytest.mark.parametrize("awq", [False, True])
def test_weights_keep_the_size_of_what_they_multiply(tmp_path: Path, *, awq: bool) -> None:
    config = CONFIGS["qwen25vl-3b"]
    config = {**config, **SMALL, "vision_config": {**config["vision_config"], **TOWER, "fullatt_block_indexes": [0]}}
    write(config, tmp_path, shard_bytes=1 << 19, awq=awq)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    source = Source.of(open_checkpoint(str(tmp_path)), load_family("qwen25vl"))
    formats = {getattr(tensor, "format_name", None) for tensor in source.tensors.values()}
    assert (formats == {None, "AutoAWQ, 4 bits, groups of 128, with zero points"}) is awq
    for name, inputs in (("self_attn.q_proj", 256), ("mlp.down_proj", 384), ("mlp.gate_proj", 256)):
        weight = source.tensors[f"model.layers.1.{name}.weight"].mapped().astype(np.float32)
        assert weight.std() == pytest.approx(0.7 * inputs**-0.5, rel=0.05)
        assert abs(weight.mean()) < 0.1 * weight.std()


def test_qwen3_vl_has_the_names_of_transformers(tmp_path: Path) -> None:
    config = CONFIGS["qwen3vl-2b"]
    tower = {**config["vision_config"], **TOWER, "deepstack_visual_indexes": [0]}
    write({**config, "text_config": {**config["text_config"], **SMALL}, "vision_config": tower}, tmp_path)
    _, read = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not (read["missing_keys"] or read["unexpected_keys"] or read["mismatched_keys"])
    written = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    assert "model.language_model.layers.2.self_attn.q_norm.weight" in written
