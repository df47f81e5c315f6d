"""Faults in weights of few bits fail the gates, and a bisection names the layer; a healthy export passes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from capa_export.config.recipe import load_recipe
from capa_export.config.schedule import Prune, Stage
from capa_export.model.model import Model
from capa_export.parity.oracle import Oracle
from capa_export.parity.validate import compare_onnx
from capa_export.passes.pack_weights import outer_name, packed_name, scale_name, zero_name
from tests.models.qwen25vl import random_model, save_model
from tests.parity.test_bisect import SCALES, Exported, recorded, write_onnx
from tests.quantizing import FORMATS, quantize

WEIGHT = "model.layers.1.mlp.down_proj.weight"
HEAD = "lm_head.weight"
AWQ_SLOTS = [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.fixture(scope="module")
def healthy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("packed")
    # Numbers of 4 bits go by twos, and a head has as many outputs as there are tokens.
    checkpoint = save_model(folder / "checkpoint", random_model(vocab_size=72, num_hidden_layers=4))
    recipe = load_recipe("qwen25vl")
    if request.param in FORMATS:
        quantize(checkpoint, FORMATS[request.param])
    else:
        quantized, *others = request.param.split(", ")
        asked = dict(other.split(" ") for other in others)
        recipe = recipe.with_options(quantize=quantized, **{f"quantize_{part}": word for part, word in asked.items()})
    model = Model(recipe=recipe, checkpoint=str(checkpoint))
    options: dict[str, Any] = {"prune_layers": (2,), "scales": SCALES}
    for precision in ("fp16", "fp32"):
        write_onnx(model.source, precision, folder / precision, **options)
    oracle = Oracle(
        *(model.eager, model.family, model.prompter, Prune(schedule=(Stage(layer=2, ratio=0.75),)), SCALES),
        eos_token_ids=(),
        precision="fp16",
        onnx=folder / "fp16",
        fp32_onnx=folder / "fp32",
    )
    records = recorded(oracle, folder / "records")
    return Exported(model.source, folder, oracle, records, options)


def change(name: str, how: Callable[[Any], Any]) -> Callable[[ir.Model], None]:
    """A fault that puts other numbers into an initializer."""

    def plant(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy()
        changed = how(array.astype(np.float32)).astype(array.dtype)
        assert (changed != array).any()
        value.const_value = ir.Tensor(changed, dtype=value.dtype, name=name)

    return plant


def zero_off_by_one(model: ir.Model) -> None:
    scales = model.graph.initializers[scale_name(WEIGHT)].const_value
    assert scales is not None
    change(zero_name(WEIGHT), lambda zeros: zeros - scales.numpy().astype(np.float32))(model)


def by_slots(numbers: Any) -> Any:
    places = np.arange(numbers.shape[1]).reshape(-1, 8)[:, AWQ_SLOTS].reshape(-1)
    return numbers[:, places]


def by_inputs(model: ir.Model) -> None:
    """The scales that the inputs would have, in the places of the outputs'."""
    numbers = model.graph.initializers[packed_name(WEIGHT)].const_value
    assert numbers is not None
    sizes = np.abs(numbers.numpy().astype(np.float32)).max(1) / 127
    change(scale_name(WEIGHT), lambda s: s.mean() * sizes[: len(s)])(model)


def in_other_half(octets: Any) -> Any:
    octets = octets.astype(np.uint8)
    return octets >> 4 | octets << 4


def as_e5m2(numbers: Any) -> Any:
    return numbers.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).view(ml_dtypes.float8_e5m2)


INT4 = "int4:32/rtn, head int4:32"
INT8 = "int8, head int8, vision int8"
FP8 = "fp8, head fp8, vision fp8"

FAULTS = {
    "INT8: neighbour's scales": (change(scale_name(WEIGHT), lambda s: np.roll(s, 1)), INT8),
    "INT8: scales of the wrong axis": (by_inputs, INT8),
    "FP8: neighbour's scales": (change(scale_name(WEIGHT), lambda s: np.roll(s, 1)), FP8),
    "FP8: bits of E5M2": (change(packed_name(WEIGHT), as_e5m2), FP8),
    "NVFP4: nibbles swapped": (change(packed_name(WEIGHT), in_other_half), "nvfp4"),
    "NVFP4: neighbour's scales": (change(scale_name(WEIGHT), lambda s: np.roll(s, 1, 0)), "nvfp4"),
    "NVFP4: outer scale ignored": (change(outer_name(WEIGHT), np.ones_like), "nvfp4"),
    "nibbles swapped": (change(packed_name(WEIGHT), lambda q: q.reshape(-1, 2)[:, ::-1].reshape(q.shape)), INT4),
    "neighbour's scales": (change(scale_name(WEIGHT), lambda s: np.roll(s, 1, 0)), INT4),
    "a scale less": (change(scale_name(WEIGHT), lambda s: np.where(np.arange(s.shape[1]) == 9, 0, s)), "AutoAWQ"),
    "zero off by one": (zero_off_by_one, "AutoAWQ"),
    "AWQ order ignored": (change(packed_name(WEIGHT), by_slots), "AutoAWQ"),
    "g_idx ignored": (
        change(WEIGHT, lambda w: w[:, np.random.default_rng(7).permutation(w.shape[1])]),
        "GPTQ desc_act",
    ),
}


HEAD_FAULTS = {
    "nibbles swapped": (change(packed_name(HEAD), lambda q: q.reshape(-1, 2)[:, ::-1].reshape(q.shape)), INT4),
    "neighbour's scales": (change(scale_name(HEAD), lambda s: np.roll(s, 1, 0)), INT4),
    "INT8: neighbour's scales": (change(scale_name(HEAD), lambda s: np.roll(s, 1)), INT8),
    "INT8: scale of scales ignored": (change(outer_name(HEAD), np.ones_like), INT8),
    "FP8: bits of E5M2": (change(packed_name(HEAD), as_e5m2), FP8),
}


TOWER = "visual.blocks.1.mlp.down_proj.weight"
TOWER_FAULTS = {
    "INT8: neighbour's scales": (change(scale_name(TOWER), lambda s: np.roll(s, 1)), INT8),
    "FP8: bits of E5M2": (change(packed_name(TOWER), as_e5m2), FP8),
}


REPEATED = {
    *("NVFP4: nibbles swapped", "NVFP4: outer scale ignored"),
    *("neighbour's scales", "INT8: neighbour's scales", "FP8: neighbour's scales"),
}
"""What is done to other numbers or to the head, too, waits for `make test-all`."""


def planted(faults: dict[str, Any]) -> list[Any]:
    """Formats and faults' names."""
    return [
        pytest.param(of, name, marks=pytest.mark.exhaustive if name in REPEATED else ())
        for name, (_, of) in faults.items()
    ]


def failures(exported: Exported, folder: Path) -> list[str]:
    found = compare_onnx(folder, "fp16", exported.records, load_recipe("qwen25vl"))
    return [check.failure for error in found.export_error for check in error.checks if check.failure]


@pytest.mark.parametrize(
    "healthy",
    [
        *("AutoAWQ", INT8),
        # Each of these has a fault below.
        *(pytest.param(of, marks=pytest.mark.exhaustive) for of in ("GPTQ desc_act", INT4, FP8, "nvfp4")),
    ],
    indirect=True,
)
def test_a_healthy_export_passes(healthy: Exported) -> None:
    assert failures(healthy, healthy.folder / "fp16") == []
    assert not healthy.bisected(healthy.folder / "fp16").node


@pytest.mark.parametrize(("healthy", "fault"), planted(FAULTS), indirect=["healthy"])
def test_a_fault_is_seen_and_its_layer_named(healthy: Exported, fault: str, tmp_path: Path) -> None:
    folder = healthy.with_fault(tmp_path / "onnx", FAULTS[fault][0])
    assert failures(healthy, folder)
    found = healthy.bisected(folder)
    assert (found.graph, found.layer, found.block) == ("llm/prefill.onnx", "layers.1", "mlp"), found.sentence
    assert "down_proj" in found.node
    assert WEIGHT in found.sentence


@pytest.mark.parametrize(("healthy", "fault"), planted(HEAD_FAULTS), indirect=["healthy"])
def test_a_fault_of_the_head_is_seen_and_the_head_named(healthy: Exported, fault: str, tmp_path: Path) -> None:
    folder = healthy.with_fault(tmp_path / "onnx", HEAD_FAULTS[fault][0])
    assert failures(healthy, folder)
    found = healthy.bisected(folder)
    assert (found.graph, found.layer, found.block) == ("llm/prefill.onnx", "", "lm_head"), found.sentence
    assert found.node.startswith("lm_head/")
    assert HEAD in found.sentence


@pytest.mark.parametrize(
    ("healthy", "fault"), [(of, name) for name, (_, of) in TOWER_FAULTS.items()], indirect=["healthy"]
)
def test_a_fault_of_the_tower_is_seen_and_its_block_named(healthy: Exported, fault: str, tmp_path: Path) -> None:
    folder = healthy.with_fault(tmp_path / "onnx", TOWER_FAULTS[fault][0], file="visual/model.onnx")
    found = healthy.bisected(folder)
    assert (found.graph, found.layer, found.block) == ("visual/model.onnx", "visual.blocks.1", "mlp"), found.sentence
    assert failures(healthy, folder)
    assert "down_proj" in found.node
    assert TOWER in found.sentence
