"""A bisection names the graph, the layer, the block and the operator of planted faults, and finds nothing in health."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil, log2
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from capa_export.config.parts import layer_of
from capa_export.config.schedule import Prune, Stage
from capa_export.export.graphs import write_onnx
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Prompter, Turn
from capa_export.model.source import Source
from capa_export.parity.bisect import bisect
from capa_export.parity.oracle import Oracle
from capa_export.parity.records import Records, write_records
from capa_export.report.schema import Bisection
from tests.conftest import noise
from tests.models.qwen25vl import random_model, save_model
from tests.parity.builds import asked
from tests.parity.faults import FAULTS, KINDS, Fault
from tests.parity.graph_faults.weights import norm_epsilon

SCALES = {1: np.linspace(0.5, 1.5, 64), 3: np.linspace(1.5, 0.6, 64)}
PREFILL = "llm/prefill.onnx"


@dataclass(frozen=True)
class Exported:
    """A healthy export beside its reference graphs."""

    source: Source
    folder: Path
    """Of `onnx` folders, by precision."""
    oracle: Oracle
    records: Records
    options: Mapping[str, Any]

    def bisected(self, folder: Path, precision: str = "fp16") -> Bisection:
        return bisect(folder, precision, self.folder / "fp32", self.records)

    def write(self, precision: str, folder: Path, **options: Any) -> Path:
        write_onnx(self.source, precision, folder, **{**self.options, **options})
        return folder

    def with_fault(
        self, folder: Path, plant: Callable[[ir.Model], object], file: str = PREFILL, of: str = "fp16"
    ) -> Path:
        shutil.copytree(self.folder / of, folder)
        model = ir.load(folder / file)
        plant(model)
        ir.save(model, folder / file)
        return folder


def exported(model: Any, checkpoint: Path, folder: Path, precision: str = "fp16", steps: int = 3) -> Exported:
    source = Source.of(open_checkpoint(str(checkpoint)), qwen25vl)
    prompter, prune = (
        Prompter(checkpoint, checkpoint, qwen25vl, source.dims),
        Prune(schedule=(Stage(layer=2, ratio=0.75),)),
    )
    options = {"prune_layers": (2,), "scales": SCALES}
    for each in dict.fromkeys((precision, "fp32")):
        write_onnx(source, each, folder / each, **options)
    onnx = {"precision": precision, "onnx": folder / precision, "fp32_onnx": folder / "fp32"}
    oracle = Oracle(model, qwen25vl, prompter, prune, SCALES, eos_token_ids=(), **onnx)
    return Exported(source, folder, oracle, recorded(oracle, folder / "records", steps), options)


def recorded(oracle: Oracle, folder: Path, steps: int = 3) -> Records:
    folder.mkdir()
    turns = [Turn("user", [noise(140, 196), "what color is the star ?"])]
    return write_records(folder, oracle, asked([turns]), steps)


@pytest.fixture(scope="module")
def healthy(model: Any, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(model, checkpoint, tmp_path_factory.mktemp("bisect"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_is_found_in_a_healthy_export(healthy: Exported, precision: str) -> None:
    found = healthy.bisected(healthy.folder / precision, precision)
    assert (found.graph, found.layer, found.block, found.node, found.fp32_layers) == ("", "", "", "", ())
    assert found.probes and all(probe.clean for probe in found.probes)
    assert (
        found.sentence
        == f"no graph of the {precision} ONNX leaves the eager model by more than its precision explains."
    )


EARLIER = {
    "kept_too_few": "model/layers.2/prune/Add",
    "wrong_score_layer": "model/layers.2/prune/Slice",
    "positions_from_pruned_length": "model/Reshape",
}
"""Where the first wrong operator is not the one that the fault is named after, but what that reads."""

WORDS = {
    "alpha_dropped": "model.layers.1.visual_scale differs in 64 of 64 numbers (all are one)",
    "alpha_of_another_layer": "(they are those of model.layers.3.visual_scale)",
    "output_weight_transposed": "(it is transposed)",
    "heads_swapped": "differs in 2,048 of 4,096 numbers (its columns change places)",
    "bias_dropped": "(all are zero)",
    "tile_negated": "of 6,144 numbers, by up to 2 times what they should be",
    "causal_mask_lost": "is_causal is 0, not 1",
    "norm_epsilon": "epsilon is 1.00001, not 1e-05",
    "kv_group_off_by_one": "it reads Where of",
    "score_over_visual_keys": "the body of the function ContributionScore was changed",
    "nan_weight": "its output is not finite; model.norm.weight differs in 1 of 64 numbers (some are not finite)",
    "wrong_score_layer": "it reads model/layers.1/self_attn/RotaryEmbedding/output_0, not model/layers.2/",
}
"""How the sentence says what was changed in a prefill of FP16."""

GRAPHS = [fault for fault in FAULTS if fault.file.endswith(".onnx")]
BOTH = {"text_rows_not_merged", "cache_not_gathered", "score_over_visual_keys", "norm_epsilon", "vision_heads_swapped"}


@pytest.mark.parametrize(
    ("fault", "precision"),
    [
        pytest.param(
            *(fault, precision),
            id=f"{precision}-{fault.name}",
            # Each kind once: in FP32 where it is planted in both, and no sentence is awaited of FP16.
            marks=()
            if fault in KINDS and precision == ("fp32" if fault.plant.__name__ in BOTH - WORDS.keys() else "fp16")
            else pytest.mark.exhaustive,
        )
        for precision in ("fp16", "fp32")
        for fault in GRAPHS
        if precision == "fp16" or fault.plant.__name__ in BOTH
    ],
)
def test_a_planted_fault_is_named(healthy: Exported, tmp_path: Path, fault: Fault, precision: str) -> None:
    folder = shutil.copytree(healthy.folder / precision, tmp_path / "onnx")
    name = fault.plant.__name__
    place = EARLIER.get(name, wrong := fault.into(folder))
    found = healthy.bisected(folder, precision)
    assert (found.graph, found.layer, found.node) == (fault.file, layer_of(wrong), place), found.sentence
    # What stands in a layer itself has a block that its name does not tell.
    inner = wrong.split("/")[2:-1] if layer_of(wrong) else []
    assert found.block in (inner[:1] or ["residual", "visual_scale", "norm", "lm_head", "merger", ""])
    assert found.fp32_layers == ()
    assert found.sentence.endswith("; the file was changed: run `capa-export export` again.")
    assert not found.probes[-1].clean and found.probes[-1].name == place
    if (fault.file, precision) == (PREFILL, "fp16"):
        assert WORDS.get(name, "") in found.sentence


def test_every_sentence_is_of_a_fault_that_is_planted() -> None:
    assert WORDS.keys() <= {fault.plant.__name__ for fault in KINDS if fault.file == PREFILL}


def test_embeddings_of_other_tokens(healthy: Exported, tmp_path: Path) -> None:
    folder = shutil.copytree(healthy.folder / "fp16", tmp_path / "onnx")
    next(fault for fault in FAULTS if "embedding" in fault.file).into(folder)
    found = healthy.bisected(folder)
    assert (found.graph, found.layer, found.node) == ("llm/embedding.safetensors", "", "")
    assert "are not the checkpoint's" in found.sentence


def test_a_fault_too_small_for_its_operator_shows_later(healthy: Exported, tmp_path: Path) -> None:
    wrong = "model/layers.0/self_attn/Attention"

    def plant(model: ir.Model) -> None:
        node = next(node for node in model.graph if node.name == wrong)
        node.attributes["scale"] = ir.AttrFloat32("scale", node.attributes["scale"].as_float() * 1.0006)

    # In FP32, whose rounding is far below what is told apart, on any processor.
    found = healthy.bisected(healthy.with_fault(tmp_path / "onnx", plant, of="fp32"), "fp32")
    assert (found.layer, found.node) == ("layers.0", wrong), found.sentence
    assert "scale is 1.0006, not 1, which shows at layers.1" in found.sentence


def test_a_graph_that_stops_half_way(healthy: Exported, tmp_path: Path) -> None:
    def not_gathered(model: ir.Model) -> None:
        nodes = {node.name: node for node in model.graph}
        whole = nodes["model/layers.0/self_attn/RotaryEmbedding"]
        for index in (1, 2):
            nodes["model/layers.3/self_attn/RotaryEmbedding"].replace_input_with(index, whole.inputs[index])

    found = healthy.bisected(healthy.with_fault(tmp_path / "onnx", not_gathered))
    assert (found.graph, found.layer, found.block) == (PREFILL, "layers.3", "self_attn")
    assert found.node == "model/layers.3/self_attn/RotaryEmbedding"
    assert "it reads model/Cast_2/output_0, not model/layers.2/prune/TokenGather/output_3" in found.sentence


def test_another_prune_layer(healthy: Exported, tmp_path: Path) -> None:
    folder = healthy.write("fp16", tmp_path / "onnx", prune_layers=(1,))
    found = healthy.bisected(folder)
    assert (found.graph, found.layer) == (PREFILL, "layers.2")
    assert "has no model/layers.2/prune/TopKKeep" in found.sentence


def test_a_graph_that_is_written_wrong(healthy: Exported, tmp_path: Path) -> None:
    folder = healthy.with_fault(tmp_path / "onnx", lambda model: norm_epsilon(model, 1e5), of="fp32")
    found = bisect(folder, "fp32", folder, healthy.records)
    assert (found.graph, found.layer, found.block, found.node) == (PREFILL, "layers.3", "", "")
    assert "the graph itself is not this model's; please report it, with transformers" in found.sentence
    assert found.fp32_layers == ()


@pytest.mark.slow
def test_layers_are_searched_in_log_steps(tmp_path: Path) -> None:
    num_layers = 16
    model = random_model(num_hidden_layers=num_layers)
    deep = exported(model, save_model(tmp_path / "checkpoint", model), tmp_path, "fp32", steps=2)
    for layer in (0, 11):

        def plant(model: ir.Model, layer: int = layer) -> None:
            node = next(node for node in model.graph if node.name == f"model/layers.{layer}/mlp/down_proj/Gemm")
            node.attributes["alpha"] = ir.AttrFloat32("alpha", 1.5)

        found = deep.bisected(deep.with_fault(tmp_path / str(layer), plant, of="fp32"), "fp32")
        assert (found.layer, found.block) == (f"layers.{layer}", "mlp")
        assert "alpha is 1.5, not left out" in found.sentence
        probed = [probe.name for probe in found.probes if probe.name.startswith("layers.")]
        assert len(probed) == len(set(probed)) <= ceil(log2(num_layers)) + 2


@pytest.mark.parametrize(
    ("mlp", "up", "down", "layer", "units"),
    [
        ("model.language_model.layers.2.mlp", 1e2, 1e4, "layers.2", ("2.mlp", "residual")),
        ("model.language_model.layers.2.mlp", 1.5e5, 1e-3, "layers.2", ("2.mlp",)),
        ("model.visual.blocks.1.mlp", 1e2, 1e4, "visual.blocks.1", ("visual.1.mlp", "visual.residual")),
    ],
)
def test_what_overflows_is_proposed_for_fp32_and_that_removes_it(
    tmp_path: Path, mlp: str, up: float, down: float, layer: str, units: tuple[str, ...]
) -> None:
    model = random_model()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        parameters[f"{mlp}.up_proj.weight"] *= up
        parameters[f"{mlp}.down_proj.weight"] *= down
    planted = exported(model, save_model(tmp_path / "checkpoint", model), tmp_path)
    found = planted.bisected(tmp_path / "fp16")
    assert (found.layer, found.block, found.fp32_layers) == (layer, "mlp", units), found.sentence
    assert "> 65504" in found.sentence
    assert found.sentence.endswith(f"; compute it in FP32: --fp32-layers {','.join(units)}.")
    remedied = planted.write("fp16", tmp_path / "remedied", fp32_layers=found.fp32_layers)
    records = recorded(replace(planted.oracle, fp32_layers=found.fp32_layers), tmp_path / "again")
    assert replace(planted, records=records).bisected(remedied).graph == ""
