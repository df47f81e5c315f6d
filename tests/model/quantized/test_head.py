"""The LM head rounded by itself: its numbers, the eager model that has them, and what depends on them."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.weight_types import PackedLayers
from capa_export.bundle.store import PARITY, Bundle
from capa_export.cli import main
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.model.generation import GenerationOptions
from capa_export.model.model import Model
from capa_export.model.prompt import Turn
from capa_export.model.quantized.rounded import nearest
from capa_export.model.quantized.tensor import quantization
from capa_export.model.streamed import StoredWeights, hollow_model
from capa_export.passes.pack_weights import packed_forms
from capa_export.plan.flops import parameters
from capa_export.plan.plan import dry_run
from capa_export.run.bundled import bundled_dims
from tests.building import Building, answer
from tests.conftest import noise
from tests.models import FAMILIES, qwen3vl
from tests.models.qwen25vl import random_model, save_model
from tests.quantizing import FORMATS, quantize

HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of as many tokens as 4 bits have room for: an even number."""
    return save_model(tmp_path_factory.mktemp("even"), random_model(vocab_size=72))


@pytest.fixture
def folder(even: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(even, tmp_path / "checkpoint"))


def opened(folder: Path, head: str | None, recipe: str = "qwen25vl", **options: Any) -> Model:
    return Model(recipe=load_recipe(recipe).with_options(quantize_head=head, **options), checkpoint=str(folder))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_the_eager_model_has_the_nearest_numbers_and_all_else_as_it_was(
    tmp_path: Path, *, tied: bool, streamed: bool
) -> None:
    folder = qwen3vl.save_model(tmp_path, qwen3vl.random_model(2, tie_word_embeddings=tied))
    plain, model = opened(folder, None, "qwen3vl").eager, opened(folder, "int8", "qwen3vl")
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) is tied
    stored = plain.lm_head.weight.detach()
    form = PackedLayers(kind="int8", group=None)
    numbers, scales, _ = nearest(stored.numpy().copy(), form)
    expected = torch.from_numpy(numbers.astype("float32") * scales)
    assert 0 < (expected - stored).norm() / stored.norm() < 0.01
    if streamed:
        weights = StoredWeights(model.source)
        hollow = hollow_model(model.source, weights)
        with weights.holding(hollow, "head"):
            assert torch.equal(hollow.lm_head.weight, expected)
        rows = hollow.get_input_embeddings()(torch.arange(9))
        assert torch.equal(rows, plain.get_input_embeddings().weight[:9])
        return
    before, after = dict(plain.named_parameters()), dict(model.eager.named_parameters())
    assert torch.equal(after.pop(HEAD), expected)
    before.pop(HEAD, None)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert model.source.dims.decoder.packed is None and model.source.dims.decoder.packed_head == form
    assert quantization(model.source.tensors) == "the LM head in INT8, rounded to nearest, one scale an output"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--quantize-head", "nvfp4"], "--quantize-head nvfp4: must be none, int8, int4, fp8, or int4 with a group"),
        (["--quantize-head", "int4:32/rtn"], "as int4:64; a head is rounded to nearest"),
        (["--quantize-head", "int8:32"], "--quantize-head int8:32: INT8 has one scale an output; say int8 alone"),
        (["--quantize-head", "int4:48"], "groups of 48 are multiplied nowhere; take one of 32, 64, 128"),
        (["--quantize-head", "int4"], "groups of 128 inputs do not divide hidden_size, 64; choose another group"),
        (["--quantize-head", "fp8", "--target", "rtx"], "target rtx does not take FP8 weights: compute capability 8.0"),
        (["--quantize-head", "int8", "--target", "orin"], "build with --quantize-head int4 or --quantize-head none"),
        (["--quantize-head", "int8", "--auto-precision"], "says which layers --quantize leaves as they are; say"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    folder: Path, options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder.parent / "out"
    for command in (["build", str(folder), "--out", str(out)], ["plan", str(folder)]):
        assert main([*command, "--model", "qwen25vl", *options]) == ExitCode.USAGE
        err = capsys.readouterr().err
        assert problem in err and len(err.strip().splitlines()) == 1
    assert not [path for path in out.rglob("*") if path.suffix not in (".lock", "")]


def test_an_odd_number_of_tokens_has_no_4_bits(checkpoint: Path) -> None:
    with pytest.raises(CapaError, match="--quantize-head int4:32: vocab_size is 71, and numbers of 4 bits go by twos"):
        _ = opened(checkpoint, "int4:32").source
    assert opened(checkpoint, "int8").source.rounds


def test_a_head_that_is_quantized_already_is_refused(folder: Path) -> None:
    quantize(folder, FORMATS["packed 8 bits"], re.compile("lm_head"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CapaError, match=r"quantized already \(compressed-tensors.*leave --quantize-head away"):
        _ = opened(folder, "int8").source
    assert quantization(opened(folder, None).source.tensors) == (
        "the LM head in compressed-tensors pack-quantized, 8 bits, one scale a channel, with zero points"
    )


def test_weights_in_place_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["build", str(folder), "--model", "qwen25vl", "--out", str(folder.parent / "out")]
    assert main([*command, "--quantize-head", "int8", "--weights", "in-place"]) == ExitCode.USAGE
    assert "own weights, and --quantize-head int8 rounds them" in capsys.readouterr().err


def building_of(folder: Path, tmp_path: Path, family: str = "qwen25vl", **options: Any) -> Building:
    data: dict[str, Any] = load_recipe(family).model_dump()
    data["prune"] = {"schedule": [{"layer": 2, "ratio": 0.75}]}
    data["ffn"] = {"eta": 0.5, "budget": 100}
    data["parity"] |= {"prompts": 1, "steps": 2, "accuracy_samples": 1}
    noise(224, 224).save(tmp_path / "picture.png")
    recipe = Recipe.model_validate(data | options)
    return Building.of(recipe, Bundle(tmp_path / "out"), folder, images=tmp_path / "picture.png", precision="fp16")


KEPT = {
    "none": "the LM head kept in 8 bits; inputs not quantized",
    "int4:32/rtn": "34 kept in 4 bits, the LM head kept in 8 bits, 1 expanded to fp16 (a score reads them whole);",
    "AutoAWQ": "34 kept in 4 bits, the LM head kept in 8 bits, 1 expanded to fp16 (a score reads them whole);",
}


@pytest.mark.parametrize(
    "form",
    # In four bits, too, and layer by layer.
    [pytest.param(form, marks=() if form == "int4:32/rtn" else pytest.mark.exhaustive) for form in KEPT],
)
def test_a_bundle_has_its_head_in_few_bits_and_says_so(
    form: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if form in FORMATS:
        quantize(folder, FORMATS[form])
    building = building_of(folder, tmp_path, quantize=None if form in FORMATS else form, quantize_head="int8")
    building.options = replace(building.options, layer_by_layer=form == "int4:32/rtn")
    parity = building.build()
    assert parity.passed, [check.failure for error in parity.export_error for check in error.checks]
    assert KEPT[form] in capsys.readouterr().err
    assert parity.quantization_error is not None and parity.quantization_error.kl > 0
    assert "the LM head in INT8" in parity.quantization_error.weights
    for file in ("prefill", "decode"):
        forms = packed_forms(ir.load(building.bundle.folder / f"onnx/llm/{file}.onnx").graph)
        assert forms[HEAD].kind == "int8" and len(forms) == (35 if "kept in 4" in KEPT[form] else 1)
    dims = bundled_dims(building.bundle).decoder
    assert dims.packed_head == PackedLayers(kind="int8", group=None)
    assert (dims.packed is not None) is ("kept in 4" in KEPT[form])
    assert dims == building.model.source.dims.decoder
    assert json.loads((building.bundle.folder / PARITY).read_text())["quantization_error"]["kl"] > 0
    answers = answer(building.bundle, [[Turn("user", ["what ?"])]], options=GenerationOptions(max_new_tokens=3))
    assert answers[0]["answer"]


def test_the_layers_of_a_quantized_checkpoint_are_expanded_without_it(folder: Path, tmp_path: Path) -> None:
    quantize(folder, FORMATS["AutoAWQ"])
    building = building_of(folder, tmp_path, quantize="none", quantize_head="int4:32")
    building.options = replace(building.options, ffn=False)
    building.export()
    packing = building.bundle.stage("export")["result"]["packing"]
    assert (packing["packed"], packing["expanded"]) == (0, {"as asked": 35})
    assert packing["head"] == {"type": "int4", "group": 32}
    assert bundled_dims(building.bundle).packings == {"--quantize-head": PackedLayers(kind="int4", group=32)}


@pytest.mark.parametrize(
    "family",
    [
        *(pytest.param(family, marks=pytest.mark.exhaustive) for family in ("internvl3", "llava15")),
        # Its head is the embedding.
        "qwen3vl",
    ],
)
def test_every_family_has_it(family: str, tmp_path: Path) -> None:
    made = FAMILIES[family].random_model(**({"tie_word_embeddings": True} if family == "qwen3vl" else {}))
    folder = FAMILIES[family].save_model(tmp_path / "checkpoint", made)
    building = building_of(folder, tmp_path, family, quantize_head="int8")
    building.options = replace(building.options, ffn=False)
    parity = building.build()
    assert parity.passed, [check.failure for error in parity.export_error for check in error.checks]
    assert building.bundle.stage("export")["result"]["packing"]["head"] == {"type": "int8", "group": None}


def test_another_head_runs_again_what_depends_on_it(folder: Path, tmp_path: Path) -> None:
    building = building_of(folder, tmp_path, quantize="int4:32")
    building.options = replace(building.options, ffn=False)
    building.calibrate()
    building.export()
    made = {name: stage["key"] for name, stage in building.bundle.manifest["stages"].items()}
    again = building.again(recipe=building.recipe.with_options(quantize_head="int8"))
    again.calibrate()
    again.export()
    after = {name: stage["key"] for name, stage in building.bundle.manifest["stages"].items()}
    assert after["quantize"] == made["quantize"]
    assert after["calibrate"] != made["calibrate"] and after["export"] != made["export"]
    assert again.model.digest != building.model.digest


def test_a_plan_counts_it(folder: Path) -> None:
    options: dict[str, Any] = {"out": None, "precision": "fp16", "ffn": False}
    plain = dry_run(load_recipe("qwen25vl"), str(folder), **options)
    for word, less in {"int8": 72 * 64 - 2 * 72, "int4:32": 2 * 72 * 64 - 72 * 64 // 2 - 2 * (72 * 64 // 32)}.items():
        found = dry_run(load_recipe("qwen25vl").with_options(quantize_head=word), str(folder), **options)
        assert plain["files"]["onnx weights"] - found["files"]["onnx weights"] == less
        assert found["files"]["embedding.safetensors"] == plain["files"]["embedding.safetensors"]
        assert found["memory"]["run"] < plain["memory"]["run"]
    source = opened(folder, "int8", quantize="int4:32/rtn").source
    total = parameters(source.dims)
    assert total.bytes_of_head(2) == 72 * 64 + 2 * 72
