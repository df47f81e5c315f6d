"""The forecast of an answer's time: the rule, the shipped data sheets, and how near it comes to published figures."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.forecast import PAGE, page
from capa_export.base.errors import CapaError
from capa_export.base.weight_types import PackedLayers
from capa_export.cli import main
from capa_export.config.target import Device, load_target
from capa_export.plan.device_memory import decoder_bytes
from capa_export.plan.forecast import ANSWER, AnswerWork, forecast
from tests.plan.test_device_memory import SEVEN
from tests.plan.test_plan import parameters, published

DEVICE = Device(memory=8, bandwidth=100, tflops=10)
WORK = AnswerWork(
    vision_flops=45_000_000_000,
    vision_bytes=0,
    prefill_flops=90_000_000_000,
    step_bytes=80_000_000,
    cache_bytes=8_000_000,
)


def test_each_part_takes_what_its_products_or_its_bytes_take() -> None:
    times = forecast(WORK, DEVICE)
    assert times is not None
    assert (times.vision, times.prefill) == (10, 20)
    assert times.token == pytest.approx((80 + 1.35 * 8) / 80)
    assert times.first == 30
    assert times.last == pytest.approx(30 + (ANSWER - 1) * times.token)


def test_a_short_prompt_takes_as_long_as_its_weights_are_read() -> None:
    few = AnswerWork(vision_flops=0, vision_bytes=16_000_000, prefill_flops=1, step_bytes=80_000_000, cache_bytes=0)
    times = forecast(few, DEVICE)
    assert times is not None
    assert (times.vision, times.prefill, times.token) == pytest.approx((0.2, 1, 1))


def test_nothing_is_forecast_without_a_data_sheet() -> None:
    assert forecast(WORK, Device(memory=8)) is None


def test_a_step_reads_the_layers_and_the_head() -> None:
    total = parameters(SEVEN)
    assert decoder_bytes(total, 2) == 2 * (total.decoder + total.lm_head)
    packed = parameters(replace(SEVEN, decoder=replace(SEVEN.decoder, packed=PackedLayers(kind="int4", group=128))))
    linear = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    rest = total.decoder - linear + total.lm_head
    assert decoder_bytes(packed, 2) == linear // 2 + 2 * (linear // 128) + 2 * rest


@pytest.mark.parametrize("name", ["rtx", "spark", "orin", "thor", "h100", "ada", "ampere"])
def test_every_shipped_device_has_its_data_sheet(name: str) -> None:
    assert all(device.bandwidth and device.tflops for device in load_target(name).devices.values())


def test_memory_alone_may_be_told(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[devices]\n"My board" = 12\n', encoding="utf-8")
    assert load_target(str(mine)).devices == {"My board": Device(memory=12)}
    mine.write_text('[devices]\n"My board" = { memory = 12, bandwidth = 0 }\n', encoding="utf-8")
    with pytest.raises(CapaError, match="My board"):
        load_target(str(mine))


def test_the_page_is_what_the_code_forecasts() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_orin_is_met_within_what_the_page_says() -> None:
    said = float(re.findall(r"within a factor of ([\d.]+)\. ", page())[0])
    ratios = [
        float(found) for line in page().splitlines() if "Orin" in line for found in re.findall(r"\(([\d.]+)\)", line)
    ]
    assert len(ratios) == 16
    assert max(max(ratio, 1 / ratio) for ratio in ratios) <= said


def test_a_plan_leads_with_the_time_to_the_first_and_the_last_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published("7B")), encoding="utf-8")
    command = ["plan", "--model", "qwen25vl", "--checkpoint", str(tmp_path), "-t", "orin", "--ratio", "0.75"]
    main(command)
    first, header, nano, *_ = capsys.readouterr().out.splitlines()
    said = "to the first token, a token, and to the 64th; 1024 visual tokens"
    assert first == f"Forecast from data sheets, not measured: {said}"
    assert header.split() == ["ms", "vision", "first", "CAPA", "token", "CAPA", "64th", "CAPA"]
    assert nano.split() == ["Orin", "Nano", "4GB", "2,509", "8,932", "4,177", "523", "521", "41,878", "37,000"]
    main([*command, "--json"])
    found = {one["device"]: one for one in json.loads(capsys.readouterr().out)["forecast"]}
    large = found["AGX Orin 64GB"]
    assert large["dense"]["first"] / large["capa"]["first"] == pytest.approx(2.14, abs=0.01)
    main([*command, "--precision", "fp32"])
    assert "Forecast" not in capsys.readouterr().out
