"""Targets: the shipped ones load, and what a device cannot take is refused before anything is built."""

from pathlib import Path

import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import shipped, shipped_names
from capa_export.base.weight_types import NumberKind, PackedLayers
from capa_export.config.target import Target, load_target, version_parts


def test_every_shipped_target_loads() -> None:
    targets = {name: load_target(name) for name in shipped_names("engines")}
    assert set(targets) == {"onnx", "rtx", "spark", "orin", "thor", "h100", "ada", "ampere"}
    assert targets["onnx"].engine is None
    capabilities = {name: one.require_engine().compute_capabilities for name, one in targets.items() if one.engine}
    assert capabilities == {
        "rtx": ("8.0", "8.6", "8.9", "12.0"),
        "spark": ("12.1",),
        "orin": ("8.7",),
        "thor": ("11.0",),
        "h100": ("9.0",),
        "ada": ("8.9",),
        "ampere": ("8.0",),
    }
    built = {name: one.engine.built for name, one in targets.items() if one.engine}
    assert {name for name, where in built.items() if where == "on-device"} == {"orin", "thor"}
    assert {name for name, where in built.items() if where == "with-gpu"} == {"h100", "ada", "ampere"}


@pytest.mark.parametrize("name", ["rtx", "spark", "orin", "thor", "h100", "ada", "ampere"])
def test_limits_have_room_for_the_largest_picture(name: str) -> None:
    """With some text; and caches for the largest prompt, with some answer."""
    target = load_target(name)
    visual = target.dim("rows").max * target.dim("cols").max
    assert visual < target.dim("sequence").max < target.dim("past").max
    assert target.require_engine().values["num_keep"].max >= visual
    sizes = [device.memory for device in target.devices.values()]
    assert sizes and sizes == sorted(sizes)


def test_limits_are_those_of_another_target_but_for_its_own() -> None:
    orin, rtx = load_target("orin").require_engine(), load_target("rtx").require_engine()
    assert orin.dims["batch"].max == 1 < rtx.dims["batch"].max
    assert (orin.dims["tiles"], orin.dims["text"]) == (rtx.dims["tiles"], rtx.dims["text"])


def test_tensorrt_builds_on_the_device_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    text = (shipped("engines") / "orin.toml").read_text(encoding="utf-8")
    mine.write_text(text.replace('"on-device"', '"here"'), encoding="utf-8")
    with pytest.raises(
        CapaError, match=r'engine: TensorRT builds for the GPU that it finds: built must be "with-gpu" or "on-device"'
    ):
        load_target(str(mine))


def test_a_kit_is_for_targets_that_are_not_built_for_everywhere() -> None:
    h100 = load_target("h100")
    assert h100.for_kit().require_engine().built == load_target("orin").for_kit().require_engine().built == "on-device"
    assert h100.require_engine().built == "with-gpu"
    with pytest.raises(CapaError, match="--kit: engines for rtx are built here, without its GPU"):
        load_target("rtx").for_kit()
    with pytest.raises(CapaError, match="target onnx has no engine"):
        load_target("onnx").for_kit()


def test_a_device_builds_for_one_gpu(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    text = (shipped("engines") / "orin.toml").read_text(encoding="utf-8")
    mine.write_text(text.replace('["8.7"]', '["8.7", "9.0"]'), encoding="utf-8")
    with pytest.raises(CapaError, match=r"engine: a device builds for itself: compute_capabilities must name one"):
        load_target(str(mine))


def test_versions_compare_by_number() -> None:
    assert version_parts("10.3.0.30") < version_parts("10.13") < version_parts("11")


def test_an_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(CapaError, match=r"unknown target 'rxt'; known targets: .*onnx.*rtx") as caught:
        load_target("rxt")
    assert caught.value.code is ExitCode.USAGE


def _edited(tmp_path: Path, old: str, new: str) -> str:
    text = (shipped("engines") / "rtx.toml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("capability", ["7.5", "8.7", "9.0", "11.0"])
def test_a_gpu_the_builder_refuses_is_refused_first(tmp_path: Path, capability: str) -> None:
    target = load_target(_edited(tmp_path, '["8.0", "8.6", "8.9", "12.0"]', f'["8.9", "{capability}"]'))
    with pytest.raises(CapaError, match=rf"mine: .* capability {capability}; it can for 8.0, .*12.1") as caught:
        target.require_engine()
    assert caught.value.code is ExitCode.ENGINE


def test_a_range_must_rise(tmp_path: Path) -> None:
    with pytest.raises(CapaError, match=r"engine\.dims\.text: .*min <= opt <= max, not 1, 4096, 2048"):
        load_target(_edited(tmp_path, "text = { min = 1, opt = 128", "text = { min = 1, opt = 4096"))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("text = { min = 1,", "text = { min = 0,", r"dims\.text: TensorRT takes none of size 0"),
        ("text = { min = 1, opt = 128, max = 2048", f"text = {{ min = 1, opt = 128, max = {2**31}", r"dims\.text\.max"),
        ('["8.0", "8.6", "8.9", "12.0"]', '["8.9;x"]', r"compute_capabilities"),
        ("memory = 8", "memory = inf", "memory"),
    ],
)
def test_sizes_and_devices_that_there_cannot_be(tmp_path: Path, old: str, new: str, problem: str) -> None:
    with pytest.raises(CapaError, match=problem):
        load_target(_edited(tmp_path, old, new))


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CapaError, match=r"unknown key engine\.precision"):
        load_target(_edited(tmp_path, "[engine]", "[engine]\nprecision = 'fp16'"))


def test_a_numbered_dimension_has_the_limits_of_its_kind() -> None:
    target = load_target("rtx")
    assert target.dim("past_kept_1") == target.require_engine().dims["past_kept"]
    assert target.dim("past") != target.dim("past_kept_1")
    engine = target.require_engine()
    own = engine.dims["past_kept"].model_copy(update={"max": 7})
    with_own = target.model_copy(
        update={"engine": engine.model_copy(update={"dims": {**engine.dims, "past_kept_1": own}})}
    )
    assert (with_own.dim("past_kept_1"), with_own.dim("past_kept_2")) == (own, engine.dims["past_kept"])
    with pytest.raises(CapaError, match="target rtx: no limits for dimension rings"):
        target.dim("rings")


def test_a_target_without_engine_says_so() -> None:
    with pytest.raises(CapaError, match="target onnx has no engine") as caught:
        load_target("onnx").require_engine()
    assert caught.value.code is ExitCode.USAGE


def test_a_precision_the_target_does_not_list_is_refused() -> None:
    engine = load_target("rtx").require_engine().model_copy(update={"precisions": ("fp16",)})
    target = Target(name="t", engine=engine)
    target.require_precision("fp16")
    with pytest.raises(CapaError, match="target t does not take bf16; it takes fp16"):
        target.require_precision("bf16")


REFUSED = [
    ("rtx", "fp8", r"does not take FP8 weights: compute capability 8\.0, 8\.6 has none; build with --quantize int4 or"),
    (
        "orin",
        "int8",
        r"does not take INT8 weights; build with --quantize int4 or --quantize none, or say in its \[engine\]",
    ),
    (
        "thor",
        "nvfp4",
        r"does not take NVFP4 weights, which TensorRT dequantizes at every run; build with .* --target onnx",
    ),
]


@pytest.mark.parametrize(("name", "kind", "problem"), REFUSED)
def test_weights_of_a_type_that_a_target_lacks_are_refused(name: str, kind: NumberKind, problem: str) -> None:
    packed = PackedLayers(kind=kind, group=None)
    with pytest.raises(CapaError, match=f"target {name} {problem}"):
        load_target(name).require_packed_weights({"--quantize": packed})
    for other in ("onnx", "spark"):
        if kind != "nvfp4" or other == "onnx":
            load_target(other).require_packed_weights({"--quantize": packed})


def test_a_target_of_gpus_without_a_type_cannot_list_it(tmp_path: Path) -> None:
    text = (shipped("engines") / "rtx.toml").read_text(encoding="utf-8")
    path = tmp_path / "mine.toml"
    path.write_text(text.replace('"int8"]', '"fp8"]'), encoding="utf-8")
    with pytest.raises(CapaError, match=r"fp8 needs compute capability 8\.9, not 8\.0, 8\.6"):
        load_target(str(path))
    path.write_text(path.read_text(encoding="utf-8").replace('["8.0", "8.6", "8.9", "12.0"]', '["8.9", "12.0"]', 1))
    load_target(str(path)).require_packed_weights({"--quantize": PackedLayers(kind="fp8", group=None)})
