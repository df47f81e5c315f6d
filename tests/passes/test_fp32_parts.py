"""FP32 islands in half-precision graphs: nodes, weights, what they compute, and what TensorRT makes of them."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from capa_export.base.errors import CapaError
from capa_export.config.parts import check_units, parse_unit
from capa_export.config.plugins import Plugins
from capa_export.export.graphs import write_onnx
from capa_export.graph.decoder import prefill_model
from capa_export.graph.functions import FUNCTIONS, PLUGIN
from capa_export.graph.rotary import rotary_tables
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.prompt import Prompter
from capa_export.model.source import Source
from capa_export.passes.for_tensorrt import prepare
from capa_export.passes.fp32_parts import FP32PartsPass, unit_of
from capa_export.passes.lower import LowerPass
from capa_export.run import onnx as onnx_model
from capa_export.run.onnx import OnnxModel
from capa_export.trt.doctor import _graph
from capa_export.trt.engines import build_graphs
from tests.conftest import noise
from tests.models import FAMILIES
from tests.models.shortened import first_layers
from tests.passes.test_lower import inputs, run
from tests.products import once_each
from tests.targets import one_gpu

GRAPHS = ("llm/prefill", "llm/decode", "visual/model")
RESIDUAL = ("residual", "visual.residual")
BRANCHES = ("2.self_attn", "3.mlp", "visual.0.attn", "visual.1.mlp")
LAYERS = ("2", "3", "visual.1")
ALL = (*RESIDUAL, *(str(layer) for layer in range(5)), "visual.0", "visual.1")
PARTS = {"residual": RESIDUAL, "branches": BRANCHES, "layers": LAYERS, "all": ALL}
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

Graphs = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    """A small random model of a family."""
    made: dict[str, Source] = {}

    def of(family: str) -> Source:
        if family not in made:
            small = FAMILIES[family]
            folder = small.save_model(tmp_path_factory.mktemp(family), small.random_model())
            made[family] = Source.of(open_checkpoint(str(folder)), load_family(family))
        return made[family]

    return of


@pytest.fixture(scope="module")
def graphs(source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """Its ONNX files, each variant written once; layer 2 prunes, and layer 3 has a scale for its FFN."""
    made: dict[tuple[object, ...], Path] = {}

    def write(family: str, fp32_layers: Sequence[str] = (), precision: str = "fp16") -> Path:
        key = (family, *fp32_layers, precision)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            of = source(family)
            scales = {3: np.linspace(0.5, 1.5, of.dims.decoder.hidden_size)}
            write_onnx(of, precision, made[key], prune_layers=(2,), scales=scales, fp32_layers=fp32_layers)
        return made[key]

    return write


class Plain(NamedTuple):
    """A graph in plain FP16, and what it computes in both precisions."""

    signature: list[tuple[object, ...]]
    inputs: dict[str, np.ndarray]
    fp32: dict[str, np.ndarray]
    fp16: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def plain(graphs: Graphs) -> Callable[[str, str], Plain]:
    """A family's graph without parts in FP32."""

    @cache
    def of(family: str, graph: str) -> Plain:
        path = graphs(family) / f"{graph}.onnx"
        feed = inputs(path)
        wide = {name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in feed.items()}
        fp32 = run(graphs(family, (), "fp32") / f"{graph}.onnx", wide)
        return Plain(signature(path), feed, fp32, run(path, feed))

    return of


def test_layers_that_a_model_does_not_have_are_refused(source: Callable[[str], Source]) -> None:
    dims = source("llava15").dims
    check_units(["4.mlp", f"visual.{dims.vision.num_blocks - 1}"], dims)
    with pytest.raises(CapaError, match=r"^--fp32-layers 5\.mlp: this model's decoder has layers 0 to 4$"):
        check_units(["0", "5.mlp"], dims)
    last = dims.vision.num_blocks
    with pytest.raises(CapaError, match=rf"^--fp32-layers visual.{last}: this model's vision tower has layers 0 to"):
        check_units([f"visual.{last}"], dims)


def computed_in(path: Path) -> dict[str, ir.DataType]:
    """Dtype of the first output of every node that computes with floating point, by the node's name."""
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True)
    graph = ir.from_proto(inferred).graph
    dtypes = {str(node.name): node.outputs[0].dtype for node in graph if node.op_type != "Cast"}
    return {name: dtype for name, dtype in dtypes.items() if dtype in (FLOAT, HALF)}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_branches_are_in_fp32_with_their_norms(graphs: Graphs, family: str, graph: str) -> None:
    before, after = (computed_in(graphs(family, units) / f"{graph}.onnx") for units in ((), BRANCHES))
    changed = {name for name, dtype in after.items() if dtype != before[name]}
    assert after.keys() == before.keys()
    assert {after[name] for name in changed} == {FLOAT}
    if graph.startswith("visual"):
        # Window attention has nodes of its own around it.
        indices = {name.split("blocks.")[-1].split("layers.")[-1].split("layer.")[-1][0] for name in changed}
        assert indices == {"0", "1"}
        assert any("/mlp/" in name for name in changed) and any("/Attention" in name for name in changed)
    else:
        assert {name.split("/")[1] for name in changed} == {"layers.2", "layers.3"}
        of_prune = {"prune"} if graph == "llm/prefill" else set()
        assert {name.split("/")[2] for name in changed if "layers.2/" in name} == {
            "input_layernorm",
            "self_attn",
            *of_prune,
        }
        assert {name.split("/")[2] for name in changed if "layers.3/" in name} == {"post_attention_layernorm", "mlp"}
    assert not any(name.endswith(("/Add", "/Add_2", "VisualScale", "TokenGather")) for name in changed)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_is_in_fp32_and_nothing_else(graphs: Graphs, family: str, graph: str) -> None:
    before, after = (computed_in(graphs(family, units) / f"{graph}.onnx") for units in ((), RESIDUAL))
    changed = {name for name, dtype in after.items() if dtype != before[name]}
    of_blocks = [name for name in after if name.rpartition("/")[0].rpartition(".")[2].isdigit()]
    sums = {name for name in of_blocks if name.endswith(("/Add", "/Add_2", "/VisualScale"))}
    norms = {name for name in after if name.endswith("Normalization") and name.count("/") >= 2 and "_norm/" not in name}
    norms = {name for name in norms if name.rpartition("/")[0].rpartition("/")[0].rpartition(".")[2].isdigit()}
    assert sums and norms
    assert sums | norms <= changed
    assert not any(part in name for name in changed for part in ("self_attn/", "attn/", "attention/", "mlp/"))


@pytest.mark.parametrize(("family", "graph", "parts"), once_each(FAMILIES, GRAPHS, PARTS))
def test_computes_what_the_fp32_graph_computes(
    graphs: Graphs, plain: Callable[[str, str], Plain], family: str, graph: str, parts: str
) -> None:
    path = graphs(family, PARTS[parts]) / f"{graph}.onnx"
    signed, feed, expected, without = plain(family, graph)
    onnx.checker.check_model(str(path), full_check=True)
    assert signature(path) == signed
    actual = run(path, feed)
    for name, value in expected.items():
        errors = [np.abs(one[name].astype(np.float32) - value).max(initial=0) for one in (actual, without)]
        if name.startswith("kept"):
            assert errors[0] == 0
        else:
            # FP16 in and out, and between the islands: what the plain graph does to the same numbers, or an ulp or two.
            assert errors[0] <= max(1.5 * errors[1], 2e-3 * np.abs(value).max()), name


def signature(path: Path) -> list[tuple[object, ...]]:
    graph = ir.load(path).graph
    return [(value.name, value.dtype, str(value.shape)) for value in (*graph.inputs, *graph.outputs)]


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_unit_of_a_node_puts_it_in_fp32(graphs: Graphs, family: str, graph: str) -> None:
    nodes = ir.load(graphs(family) / f"{graph}.onnx").graph
    units = {str(node.name): unit for node in nodes if (unit := unit_of(node)) is not None}
    assert {unit.branch for unit in units.values()} == {None, "attention", "mlp"}
    for unit in set(units.values()):
        model = ir.load(graphs(family) / f"{graph}.onnx")
        FP32PartsPass([unit])(model)
        halves = [
            str(node.name)
            for node in model.graph
            if node.op_type != "Cast" and any(value.dtype == HALF for value in node.outputs)
        ]
        # DeepStack features are on their way to the stream.
        left = [name for name in halves if units.get(name) == unit and not name.endswith("prune/Gather")]
        # The stream begins behind what embeds patches and tokens.
        assert not [name for name in left if unit.index is not None or "layer" in name or "block" in name]


def test_weights_are_those_of_the_checkpoint_and_shared(graphs: Graphs, source: Callable[[str], Source]) -> None:
    folder, tensors = graphs("qwen25vl", BRANCHES), source("qwen25vl").tensors
    prefill, decode = (ir.load(folder / "llm" / f"{name}.onnx").graph.initializers for name in ("prefill", "decode"))
    for name, dtype in (("3.mlp.down_proj", FLOAT), ("2.self_attn.o_proj", FLOAT), ("3.self_attn.o_proj", HALF)):
        ours, theirs = (part[f"model.layers.{name}.weight"].const_value for part in (prefill, decode))
        assert isinstance(ours, ir.ExternalTensor)
        assert isinstance(theirs, ir.ExternalTensor)
        assert (ours.dtype, ours.offset, ours.location) == (dtype, theirs.offset, theirs.location)
        stored = np.concatenate(list(tensors[f"model.layers.{name}.weight"].chunks()))
        np.testing.assert_array_equal(ours.numpy().reshape(-1), stored.astype(dtype.numpy()))


def test_a_weight_that_others_read_too_keeps_its_dtype(source: Callable[[str], Source]) -> None:
    """Two layers share one: what is in FP32 reads it through a cast."""
    dims = source("qwen25vl").dims
    half = prefill_model(dims.decoder, HALF, rotary_tables(dims), prune_layers=(), linear_layers=())
    weights = [half.graph.initializers[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in (1, 3)]
    ((other, at),) = weights[0].uses()
    other.replace_input_with(at, weights[1])
    assert FP32PartsPass([parse_unit("3.mlp")])(half).modified
    assert weights[1].dtype == HALF and other.inputs[at] is weights[1]
    assert {use.node.op_type for use in weights[1].uses()} == {other.op_type, "Cast"}
    assert half.graph.initializers["model.layers.3.mlp.up_proj.weight"].dtype == FLOAT


def test_a_second_run_changes_nothing(source: Callable[[str], Source]) -> None:
    dims = source("qwen25vl").dims
    options: Any = {"prune_layers": (2,), "linear_layers": (3,)}
    half = prefill_model(dims.decoder, HALF, rotary_tables(dims), **options)
    for words in (["visual.1"], ["2", "residual", "3.mlp", "visual.residual"]):
        widen = FP32PartsPass([parse_unit(word) for word in words])
        assert widen(half).modified == (len(words) > 1)
        text = ir.to_onnx_text(half, exclude_initializers=True)
        assert not widen(half).modified
        assert ir.to_onnx_text(half, exclude_initializers=True) == text


@pytest.mark.parametrize("units", [(), ("2.self_attn", "3.mlp"), ("residual",), ("2", "3")], ids=" ".join)
def test_nodes_in_an_island_keep_their_plugins(graphs: Graphs, tmp_path: Path, units: tuple[str, ...]) -> None:
    path, plugins = graphs("qwen25vl", units) / "llm/prefill.onnx", set(FUNCTIONS)
    nodes = [node for node in ir.load(path).graph if node.domain == "capa"]
    assert {node.op_type for node in nodes if "plugin_version" in node.attributes} == plugins
    for node in nodes:
        # A kernel takes one floating-point type a call.
        dtypes = {value.dtype for value in node.inputs if value is not None and value.dtype in (HALF, FLOAT)}
        assert len(dtypes) == 1, node.name
    prepared = prepare(path, tmp_path / "prepared.onnx", external_weights=False, plugins=True)
    assert (prepared.num_plugins, prepared.num_nodes) == (len(plugins), len(plugins))
    prepared = prepare(path, tmp_path / "without.onnx", external_weights=False, plugins=False)
    assert (prepared.num_plugins, prepared.num_nodes) == (0, len(plugins))
    # A TensorRT that would take bodies before plugins gets none of the bodies.
    prepared = prepare(path, tmp_path / "old.onnx", external_weights=False, plugins=True, version=(10, 3))
    old = ir.load(tmp_path / "old.onnx")
    assert {node.op_type for node in old.graph if node.domain} == plugins
    assert (prepared.num_plugins, len(old.functions)) == (len(plugins), 0)
    assert {finding.verdict for finding in _graph(path, path.parent)} == {"ok"}


def test_plugins_for_some_of_the_nodes_are_refused(graphs: Graphs, tmp_path: Path) -> None:
    model = ir.load(graphs("qwen25vl") / "llm/prefill.onnx")
    node = next(node for node in model.graph if node.op_type == "VisualScale")
    for name in PLUGIN:
        del node.attributes[name]
    path = graphs("qwen25vl") / "llm/earlier.onnx"
    ir.save(model, path)
    with pytest.raises(CapaError, match=r"1 of 4 CAPA nodes take no plugin.*: export again, or build with --plugins n"):
        prepare(path, tmp_path / "prepared.onnx", external_weights=False, plugins=True)
    assert prepare(path, tmp_path / "prepared.onnx", external_weights=False, plugins=False).num_nodes == 4


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("units", [RESIDUAL, BRANCHES, LAYERS], ids=["residual", "branches", "layers"])
def test_older_operators_compute_the_same(graphs: Graphs, graph: str, units: tuple[str, ...]) -> None:
    path = graphs("qwen25vl", units) / f"{graph}.onnx"
    model = ir.load(path)
    assert LowerPass((10, 3))(model).modified
    ir.save(model, path.with_name(f"lowered-{path.name}"))
    feed = inputs(path)
    expected, actual = run(path, feed), run(path.with_name(f"lowered-{path.name}"), feed)
    for name, value in expected.items():
        # As in the tests of `lower`: one rounding more in half precision.
        limit = 0 if name.startswith("kept") else 2e-3 * np.abs(value.astype(np.float32)).max()
        assert np.abs(actual[name].astype(np.float32) - value.astype(np.float32)).max() <= limit, name


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_runs_with_attention_in_tiles(
    graphs: Graphs, source: Callable[[str], Source], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = source("qwen25vl")
    prompter = Prompter(of.checkpoint.folder, of.checkpoint.folder, of.family, of.dims)
    prompt = prompter("what color is the star ?", [noise(112, 84)])
    folder = graphs("qwen25vl", ("2.self_attn", "visual.2"), precision)
    whole = OnnxModel(folder, threads=1).prefill(prompt, [4])
    monkeypatch.setattr(onnx_model, "_ATTENTION_LIMIT", 0)
    tiles = OnnxModel(folder, threads=1)
    in_tiles = tiles.prefill(prompt, [4])
    assert tiles._sessions["llm/prefill.onnx"][1] and tiles._sessions["visual/model.onnx"][1]
    np.testing.assert_array_equal(in_tiles.kept[0], whole.kept[0])
    np.testing.assert_allclose(in_tiles.logits, whole.logits, rtol=0, atol=2e-3 * np.abs(whole.logits).max())


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize(
    ("units", "plugins"),
    [
        *(
            # Some of each alone, and other parts than these.
            pytest.param(units, "python", marks=pytest.mark.exhaustive)
            for units in (RESIDUAL, ("2.self_attn", "3.mlp", "visual.1"), ("2", "4", "visual.0.attn"))
        ),
        ((*RESIDUAL, "2", "4", "visual.0.attn"), "python"),
        pytest.param((*RESIDUAL, "2", "4", "visual.0.attn"), "none", marks=pytest.mark.exhaustive),
    ],
)
def test_tensorrt_builds_it(tmp_path: Path, units: tuple[str, ...], plugins: Any) -> None:
    """Of a trained checkpoint, whose head size the plugins take; layer 2 prunes, and layer 4 has a scale."""
    of = Source.of(open_checkpoint(str(first_layers(tmp_path / "checkpoint"))), load_family("qwen25vl"))
    write_onnx(of, "fp16", tmp_path, prune_layers=(2,), scales={4: np.ones(192)}, fp32_layers=units)
    # In the others is no CAPA node: without plugins they are what they were before.
    graphs = {f"{graph}.onnx": graph for graph in (GRAPHS if plugins != "none" else GRAPHS[:1])}
    built = build_graphs(
        tmp_path, graphs, tmp_path / "engines", one_gpu(), weights="external", plugins=Plugins(plugins)
    )
    for file, name in graphs.items():
        count = sum(node.domain == "capa" for node in ir.load(tmp_path / file).graph)
        assert built[name]["capa_nodes"] == count == (4 if name.endswith("prefill") else 0)
        assert built[name]["custom_layers"] == (0 if plugins == "none" else count)
        assert built[name]["weight_copies"] == 0
