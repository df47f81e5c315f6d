"""What is found between two bundles, what counts as a regression, and what cannot be compared."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle.store import Bundle, files_under
from capa_export.config.gates import Limits
from capa_export.config.recipe import Recipe
from capa_export.data.samples import samples_from
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Prompter
from capa_export.parity.oracle import Oracle
from capa_export.parity.records import write_records
from capa_export.study.compare.bundles import compare
from capa_export.study.compare.manifests import engines
from capa_export.study.compare.schema import BundleComparison
from capa_export.study.compare.table import compare_table
from tests.recorded import record
from tests.study.compare.conftest import Exported, note_validation, overwrite, rerecord

Comparison = Callable[..., BundleComparison]


@pytest.fixture
def compared(reference: Bundle, pictures: Path) -> Comparison:
    """Holds a candidate against the reference, by default on the pictures."""

    def run(candidate: Bundle, **options: object) -> BundleComparison:
        return compare(reference, candidate, **{"images": pictures, **options})  # pyright: ignore[reportArgumentType]

    return run


def test_a_copy_differs_in_nothing(compared: Comparison, spare: Bundle) -> None:
    found = compared(spare)
    assert found.passed and not found.failures and not found.changes
    assert (found.logits.kl_mean, found.logits.kl_max, found.logits.top1, found.logits.diverged) == (0, 0, 1, 0)
    assert found.logits.diverges_at is None
    assert [(kept.layer, kept.iou, kept.reference) for kept in found.kept] == [(2, 1.0, found.kept[0].candidate)]
    assert found.sizes and all(size.reference == size.candidate for size in found.sizes)
    assert found.num_prompts == 2 and found.answers is None
    assert BundleComparison.model_validate_json(found.model_dump_json()) == found


def test_both_are_timed_in_turn(compared: Comparison, spare: Bundle) -> None:
    timings = {timing.what: timing for timing in compared(spare).timings}
    assert set(timings) == {"vision", "prefill", "decode"}
    for timing in timings.values():
        assert timing.runs >= 2
        assert timing.ratio == pytest.approx(timing.candidate_ms / timing.reference_ms)


def test_another_ratio_shows_in_recipe_kept_sets_and_logits(compared: Comparison, exported: Exported) -> None:
    found = compared(exported(ratio=0.5))
    changes = {change.name: (change.reference, change.candidate) for change in found.changes}
    assert changes["recipe.prune.schedule.0.ratio"] == (0.75, 0.5)
    assert not any(name.startswith("checkpoint") for name in changes)
    (kept,) = found.kept
    assert kept.candidate == 2 * (kept.reference or 0) and kept.iou == pytest.approx(0.5)
    assert (found.logits.kl_mean or 0) > 1e-6


def test_stages_of_other_layers_stand_side_by_side(compared: Comparison, exported: Exported) -> None:
    one, two = compared(exported(prune_layer=1), limits=Limits(kl=100)).kept
    assert (one.layer, one.reference, one.iou) == (1, None, None) and one.candidate
    assert (two.layer, two.candidate, two.iou) == (2, None, None) and two.reference


def test_another_precision_shows_in_the_sizes(compared: Comparison, exported: Exported) -> None:
    found = compared(exported(precision="fp32"))
    assert "precision" in {change.name for change in found.changes}
    sizes = {size.file: (size.reference, size.candidate) for size in found.sizes}
    before, after = sizes["onnx/llm/model.onnx.data"]
    assert before and after and 1.9 < after / before < 2.1
    assert found.passed, found.failures


def test_a_changed_weight_is_a_regression(compared: Comparison, spare: Bundle) -> None:
    overwrite(spare, "model.layers.3.mlp.down_proj.weight", 0.5)
    found = compared(spare)
    assert [change.name for change in found.changes] == ["files.onnx/llm/model.onnx.data"]
    assert found.failures == (
        f"the next token's mean KL from the reference, in nats, is {found.logits.kl_mean:.3g}, at most 0.02 is allowed",
    )
    assert found.logits.diverged and found.logits.diverges_at is not None


def test_logits_that_are_no_numbers_are_a_regression(compared: Comparison, spare: Bundle) -> None:
    overwrite(spare, "model.layers.3.mlp.down_proj.weight", float("nan"))
    found = compared(spare, limits=Limits(kl=100))
    assert found.logits.kl_mean is None and "is not a number," in found.failures[0]
    assert json.loads(found.model_dump_json())["logits"]["kl_mean"] is None


def test_each_side_prepares_its_own_pictures(compared: Comparison, spare: Bundle) -> None:
    file = "onnx/processors/processors.json"
    path = spare.folder / file
    settings = json.loads(path.read_text())
    settings["image_processor"]["image_mean"] = [0.0, 0.0, 0.0]
    path.write_text(json.dumps(settings))
    rerecord(spare, file)
    found = compared(spare, limits=Limits(kl=100))
    assert [change.name for change in found.changes] == [f"files.{file}"]
    assert (found.logits.kl_mean or 0) > 1e-6


def test_the_candidate_has_to_have_passed_its_own_validation(compared: Comparison, spare: Bundle) -> None:
    note_validation(spare, "fp16 ONNX: cosine 0.5")
    assert compared(spare).failures == (f"{spare.folder}: failed its own validation: fp16 ONNX: cosine 0.5",)
    stages = spare.manifest["stages"]
    del stages["validate"]
    spare.update(stages=stages)
    (failure,) = compared(spare).failures
    assert "was not validated" in failure


def test_lost_answers_are_a_regression(exported: Exported, tmp_path: Path) -> None:
    deployed = exported("tiny-qwen25vl")
    candidate = Bundle(Path(shutil.copytree(deployed.folder, tmp_path / "candidate")))
    overwrite(candidate, "model.norm.weight", -1.0)
    found = compare(deployed, candidate, samples=8, limits=Limits(kl=100))
    assert found.answers is not None and found.answers.difference is not None
    assert found.answers.source == "asked now" and found.answers.reference.value == 1.0
    assert found.answers.difference.high < 0
    significant, drop = found.failures
    words = f"{found.answers.candidate.value:.1%} of 8 answers are right, 100.0% before: "
    assert significant.startswith(f"{words}the 95 % interval of the difference ends at -")
    assert drop.startswith(f"{words}the drop is") and drop.endswith("at most 0.05 is allowed")


def test_where_nobody_knows_the_answers_the_validations_say_how_many_were_right(
    reference: Bundle, spare: Bundle, pictures: Path, tmp_path: Path
) -> None:
    deployed = Bundle(Path(shutil.copytree(reference.folder, tmp_path / "deployed")))
    note_validation(deployed, right=99)
    note_validation(spare, right=90)
    found = compare(deployed, spare, images=pictures)
    assert found.answers is not None and found.answers.source == "parity.json"
    assert found.answers.difference is None and found.answers.questions == 100
    (failure,) = found.failures
    assert failure.startswith("90.0% of 100 answers are right, 99.0% before")
    assert compare(deployed, spare, images=pictures, limits=Limits(accuracy_drop=0.1)).passed


def test_golden_samples_are_asked_where_nothing_else_is_said(
    reference: Bundle, spare: Bundle, model: Any, prompter: Prompter, recipe: Recipe, pictures: Path
) -> None:
    oracle = Oracle(
        model=model,
        family=qwen25vl,
        prompter=prompter,
        prune=recipe.prune,
        scales={},
        precision="fp32",
        onnx=spare.folder / "onnx",
        fp32_onnx=spare.folder / "onnx",
        eos_token_ids=[],
    )
    (spare.folder / "golden").mkdir()
    write_records(spare.folder / "golden", oracle, samples_from(pictures, recipe, 2, split="held_out"), 2)
    record(spare.folder, "golden", files_under(spare.folder, "golden"), result={}, seconds=0.0, peak_memory_bytes=0)
    found = compare(reference, spare)
    assert (found.prompts, found.num_prompts) == (f"golden samples of {spare.folder}", 2)
    assert found.passed and found.logits.kl_max == 0


def test_speed_is_asked_for_only_where_a_limit_is_given(compared: Comparison, spare: Bundle) -> None:
    limits = Limits(vision_slowdown=1e-6, prefill_slowdown=1e-6, decode_slowdown=1e6)
    first, second = compared(spare, limits=limits).failures
    assert first.startswith("vision time") and second.startswith("prefill time")


def test_engines_of_one_target_are_compared(
    reference: Bundle, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = [Bundle(Path(shutil.copytree(reference.folder, tmp_path / name))) for name in ("a", "b")]
    for bundle, layers in zip(bundles, (9, 12), strict=True):
        facts = {"onnx": "llm/prefill.onnx", "bytes": 1000, "layers": layers, "custom_layers": 3, "weight_copies": 0}
        result = {"runtime": "tensorrt-rtx", "weights": "embedded", "engines": {"llm/prefill": facts}}
        record(bundle.folder, "engine/rtx", [], result=result, seconds=0.0, peak_memory_bytes=0)
    found = compare(*bundles, images=pictures)
    (engine,) = found.engines
    assert engine.reference is not None and engine.candidate is not None
    assert (engine.engine, engine.reference.layers, engine.candidate.layers) == ("rtx/llm/prefill", 9, 12)
    assert not list(engines(reference, bundles[1]))
    # One engine that is prefill and decode has a name of its own.
    joined = {"runtime": "tensorrt-rtx", "weights": "joined", "engines": {"llm/decoder": facts}}
    record(bundles[1].folder, "engine/rtx", [], result=joined, seconds=0.0, peak_memory_bytes=0)
    found = compare(*map(Bundle, (bundle.folder for bundle in bundles)), images=pictures)
    sides = [(one.engine, one.reference is None, one.candidate is None) for one in found.engines]
    assert sides == [("rtx/llm/prefill", False, True), ("rtx/llm/decoder", True, False)]
    compare_table(found)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["rtx/llm/decoder", "layers", "none", "12"] in shown and ["rtx/llm/prefill", "layers", "9", "none"] in shown


def test_bundles_of_other_models_are_refused_in_one_line(
    reference: Bundle, spare: Bundle, exported: Exported, pictures: Path
) -> None:
    other = exported("tiny-llava15")
    with pytest.raises(CapaError, match=r"family llava15, and qwen25vl in .*; compare takes two bundles") as raised:
        compare(reference, other, images=pictures)
    assert raised.value.code == ExitCode.PREFLIGHT
    path = spare.folder / "onnx/processors/tokenizer.json"
    text = path.read_text(encoding="utf-8")
    assert '"blue"' in text and '"red"' in text
    path.write_text(text.replace('"blue"', '"_"').replace('"red"', '"blue"').replace('"_"', '"red"'), encoding="utf-8")
    rerecord(spare, "onnx/processors/tokenizer.json")
    with pytest.raises(CapaError, match="tokenizer numbers tokens otherwise"):
        compare(reference, spare, images=pictures)


def test_a_bundle_that_was_changed_is_refused_by_the_name_of_the_file(compared: Comparison, spare: Bundle) -> None:
    path = spare.folder / "onnx/llm/model.onnx.data"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CapaError, match=r"model\.onnx\.data.*sha256 differs"):
        compared(spare)
