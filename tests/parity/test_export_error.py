"""No gate is met by NaN, by silence, or by an error in a layer that the logits do not show."""

import json

import numpy as np
import pytest

from capa_export.config.recipe import load_recipe
from capa_export.parity.export_error import ExportErrorMeter
from capa_export.parity.records import Noise
from capa_export.parity.trace import HiddenStates, Trace, rows_of_positions, sampled_rows
from capa_export.report.schema import Check, ExportError

PARITY = load_recipe("qwen25vl").parity
LOGITS = np.array([[3.0, 1.0, -2.0]], np.float32)


def failing(meter: ExportErrorMeter) -> dict[str, Check]:
    return {check.name: check for check in meter.result().checks if check.failure}


def test_top1_counts_where_the_margin_is_clear() -> None:
    meter = ExportErrorMeter("fp16 ONNX", "eager", PARITY.fp16, Noise(logits=0.01))
    meter.add(Trace(np.array([[1.0, 3.0, -2.0]], np.float32), []), Trace(LOGITS, []))
    found = failing(meter)
    assert found["top-1 wrong"].failure == "fp16 ONNX against eager: top-1 differs at 1 of 1 steps with a clear margin"
    assert {"cosine", "times the noise"} < set(found)
    unclear = ExportErrorMeter("fp16 ONNX", "eager", PARITY.fp16, Noise(logits=1.5))
    unclear.add(Trace(np.array([[1.0, 3.0, -2.0]], np.float32), []), Trace(LOGITS, []))
    assert "no step has a margin" in failing(unclear)["top-1 wrong"].failure


def test_no_gate_is_met_by_saying_nothing() -> None:
    assert "no prompt" in failing(ExportErrorMeter("x", "y", PARITY.bf16))["prompts"].failure
    same = Trace(LOGITS, [])
    for level in (float("nan"), float("inf")):
        meter = ExportErrorMeter("x", "y", PARITY.bf16, Noise(logits=level))
        meter.add(same, same)
        assert "overflows" in failing(meter)["times the noise"].failure


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_passes(broken: float) -> None:
    meter = ExportErrorMeter("x", "y", PARITY.fp32)
    meter.add(Trace(np.array([[1.0, broken]]), []), Trace(np.array([[1.0, 2.0]]), []))
    meter.add(Trace(np.array([[1.0, 2.0]]), []), Trace(np.array([[1.0, 2.0]]), []))
    assert {"cosine", "norm ratio", "KL"} <= set(failing(meter))
    written = json.dumps(meter.result().model_dump(mode="json"), allow_nan=False)
    row = ExportError.model_validate_json(written)
    assert {check.value for check in row.checks if check.name in {"cosine", "KL"}} == {None}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_layer_that_the_logits_do_not_show_fails(precision: str) -> None:
    gate = getattr(PARITY, precision)
    hidden = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
    hidden[1:, 2] = np.nan
    wrong = hidden.copy()
    wrong[2, 4] *= 1.2
    reference = Trace(LOGITS, [], hidden=hidden)
    for states, names in (
        (hidden, set()),
        (wrong, {"hidden norm ratio", *(["hidden times the noise"] if precision == "fp16" else [])}),
        (np.where(np.isnan(hidden), hidden, np.nan), {"hidden cosine", "hidden norm ratio"}),
    ):
        noise = Noise(1e-3, (1e-3, 1e-3, 1e-3)) if precision == "fp16" else Noise()
        meter = ExportErrorMeter("x", "y", gate, noise)
        own = Trace(LOGITS, [], hidden=states)
        meter.add(own, reference, own)
        assert names <= set(failing(meter))
        assert bool(failing(meter)) == bool(names)
    layers = meter.result().layers
    assert [layer.relative_error for layer in layers] == [None, None, None]


def test_states_lie_where_their_positions_say() -> None:
    rows = sampled_rows(200)
    assert len(rows) == 64 and rows[0] == 0 and rows[-1] == 199
    assert sampled_rows(3).tolist() == [0, 1, 2]
    states = HiddenStates(np.array([0, 2, 4]), 2)
    everything = np.arange(10.0).reshape(5, 2)
    states.add_prefill(everything, np.arange(5))
    states.add_prefill(everything[[0, 3, 4]], np.array([0, 3, 4]))
    for layer in range(2):
        states.add_step(layer, np.array([7.0, layer]))
    expected = [[[0, 1], [4, 5], [8, 9], [7, 0]], [[0, 1], [np.nan, np.nan], [8, 9], [7, 1]]]
    np.testing.assert_array_equal(states.stacked(), expected)
    kept = [np.array([0, 3, 4, 7]), np.array([3, 7])]
    assert [own.tolist() for own in rows_of_positions(kept)] == [[0, 3, 4, 7], [1, 3]]
