"""What the audit asks for and what it refuses, and planted massive activations from calibration to gates."""

from pathlib import Path
from typing import Any

import pytest

from capa_export.base.errors import CapaError
from capa_export.calibrate.audit import audit
from capa_export.calibrate.measure import calibrate
from capa_export.config.recipe import load_recipe
from capa_export.config.schedule import Prune, Stage
from capa_export.data.samples import samples_from
from capa_export.export.graphs import write_onnx
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import llava15, qwen25vl
from capa_export.model.families.qwen25vl.dims import model_dims
from capa_export.model.prompt import Prompter
from capa_export.model.source import Source
from capa_export.parity.oracle import Oracle
from capa_export.parity.records import write_records
from capa_export.parity.validate import compare_onnx
from tests.conftest import noise
from tests.models import llava15 as small_llava15
from tests.models.qwen25vl import random_model, save_model
from tests.planted import plant_in_decoder, plant_in_tower

LAYER, BLOCK = "model.language_model.layers.3", "model.visual.blocks.2"


@pytest.fixture(scope="module")
def dims() -> Any:
    return model_dims(random_model().config.to_dict())


def asked(dims: Any, *, samples: int = 40, **absmax: float) -> tuple[str, ...]:
    return audit({f"{LAYER}.self_attn.scores": 1.0, **absmax}, "fp16", dims, samples)[0]


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        (LAYER, "residual"),
        (f"{LAYER}.input_layernorm.input", "residual"),
        (f"{LAYER}.post_attention_layernorm.input", "residual"),
        (f"{LAYER}.input_layernorm", "3.self_attn"),
        (f"{LAYER}.post_attention_layernorm", "3.mlp"),
        (f"{LAYER}.self_attn", "3.self_attn"),
        (f"{LAYER}.self_attn.query", "3.self_attn"),
        (f"{LAYER}.self_attn.scores", "3.self_attn"),
        (f"{LAYER}.mlp", "3.mlp"),
        (f"{LAYER}.mlp.up_proj", "3.mlp"),
        (f"{LAYER}.mlp.down_proj.input", "3.mlp"),
        (BLOCK, "visual.residual"),
        (f"{BLOCK}.norm2.input", "visual.residual"),
        (f"{BLOCK}.norm1", "visual.2.attn"),
        (f"{BLOCK}.norm2", "visual.2.mlp"),
        (f"{BLOCK}.attn.key", "visual.2.attn"),
        (f"{BLOCK}.attn.scores", "visual.2.attn"),
        (f"{BLOCK}.mlp.down_proj.input", "visual.2.mlp"),
        ("model.vision_tower.encoder.layer.1.attention", "visual.1.attn"),
        ("model.vision_tower.encoder.layers.1.layer_norm1", "visual.1.attn"),
    ],
)
def test_what_becomes_an_island(dims: Any, name: str, unit: str) -> None:
    # Half of FP16's range for a calibration of many samples, a quarter for one of few.
    for samples, largest in ((40, 32752.0), (39, 16376.0)):
        assert asked(dims, samples=samples, **{name: largest}) == ()
        assert asked(dims, samples=samples, **{name: largest + 1}) == (unit,)
    for precision in ("bf16", "fp32"):
        assert audit({name: 1e30}, precision, dims, 40) == ((), ())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (f"{LAYER}.self_attn.key", "the KV cache is in it"),
        (f"{LAYER}.self_attn.value", "the KV cache is in it"),
        ("model.language_model.layers.0.input_layernorm.input", "the embeddings, of text and of pictures, are in it"),
        ("model.visual.blocks.0.norm1.input", "patches are embedded in it"),
        ("model.visual.merger.mlp.2", "what stands behind the last layer"),
        ("model.language_model.norm", "what stands behind the last layer"),
    ],
)
def test_what_is_refused(dims: Any, name: str, reason: str) -> None:
    with pytest.raises(CapaError, match=rf"^{name} reaches 2e\+05, 305% of the largest FP16 number, and {reason}"):
        asked(dims, **{name: 2e5})


def test_findings_name_the_worst_of_each_part(dims: Any) -> None:
    absmax = {f"{LAYER}.mlp": 2e5, f"{LAYER}.mlp.down_proj.input": 2e4, LAYER: 3e5, f"{LAYER}.self_attn.scores": 9.0}
    units, findings = audit(absmax, "fp16", dims, 4)
    assert units == ("3.mlp", "residual")
    assert findings == (
        f"3.mlp in FP32: {LAYER}.mlp reaches 2e+05, 305% of the largest FP16 number",
        f"residual in FP32: {LAYER} reaches 3e+05, 458% of the largest FP16 number",
    )


def test_a_calibration_of_an_earlier_version_says_less(dims: Any) -> None:
    units, [finding] = audit({LAYER: 1.0}, "fp16", dims, 4)
    assert (units, finding) == (
        (),
        "the calibration knows no norms, FFN products or attention scores; calibrate again to audit them",
    )


def test_layers_that_the_graph_does_not_run_ask_for_nothing() -> None:
    dims = llava15.model_dims(small_llava15.random_model().config.to_dict())
    last = f"model.vision_tower.encoder.layers.{dims.vision.num_blocks}"
    assert asked(dims, **{last: 1e6, f"{last}.mlp": 1e6}) == ()


def plant_in_both(model: Any) -> None:
    plant_in_tower(model)
    plant_in_decoder(model)


@pytest.mark.parametrize(
    ("plant", "asked_for"),
    [
        (None, ()),
        (plant_in_both, ("1.mlp", "residual", "visual.2.mlp", "visual.residual")),
    ],
)
def test_massive_activations_pass_the_gates_with_the_audit_and_not_without(
    plant: Any, asked_for: tuple[str, ...], tmp_path: Path
) -> None:
    model = random_model()
    if plant is not None:
        plant(model)
    folder = save_model(tmp_path / "checkpoint", model)
    source = Source.of(open_checkpoint(str(folder)), qwen25vl)
    prompter = Prompter(folder, folder, qwen25vl, source.dims)
    (tmp_path / "pictures").mkdir()
    for index, size in enumerate(((224, 224), (140, 196), (84, 336))):
        noise(*size, index).save(tmp_path / f"pictures/{index}.png")
    prune = Prune(schedule=(Stage(layer=2, ratio=0.75),))
    recipe = load_recipe("qwen25vl").model_copy(update={"prune": prune})
    train, held_out = (samples_from(tmp_path / "pictures", recipe, 3, split=split) for split in ("train", "held_out"))
    calibration = calibrate(model, qwen25vl, prompter, train, checkpoint_digest="x")
    units, findings = audit(calibration.absmax, "fp16", source.dims, calibration.samples)
    assert (units, len(findings)) == (asked_for, len(asked_for))

    def failures(fp32_layers: tuple[str, ...]) -> list[str]:
        name = "-".join(fp32_layers) or "plain"
        onnx, records = tmp_path / f"onnx-{name}", tmp_path / f"records-{name}"
        records.mkdir()
        write_onnx(source, "fp16", onnx, prune_layers=(2,), scales={}, fp32_layers=fp32_layers)
        oracle = Oracle(
            model=model,
            family=qwen25vl,
            prompter=prompter,
            prune=prune,
            scales={},
            precision="fp16",
            onnx=onnx,
            fp32_onnx=onnx,
            eos_token_ids=(2,),
            fp32_layers=fp32_layers,
        )
        compared = compare_onnx(onnx, "fp16", write_records(records, oracle, held_out, 3), recipe)
        rows = [*compared.export_error, *compared.selection]
        return [check.failure for row in rows for check in row.checks if check.failure]

    assert failures(units) == []
    if units:
        assert any(failure.startswith("fp16 ONNX against eager CAPA fp32: cosine -inf") for failure in failures(()))
