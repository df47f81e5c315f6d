"""What the doctor finds: planted traps of the parser, and pictures that a profile does not take."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from capa_export.base.errors import CapaError
from capa_export.bundle.store import Bundle
from capa_export.cli import main
from capa_export.config.recipe import load_recipe
from capa_export.config.target import Device, DimRange, Target, load_target
from capa_export.trt import doctor
from capa_export.trt.doctor import Finding, examine
from tests.building import Building


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    recipe = load_recipe("tiny-qwen25vl")
    building = Building.of(recipe, Bundle(tmp_path_factory.mktemp("bundle")), checkpoint, ffn=False)
    building.export()
    return building.bundle


def found(findings: list[Finding], check: str) -> Finding:
    return next(finding for finding in findings if finding.check == check)


def with_engine(target: Target, **changes: Any) -> Target:
    return target.model_copy(update={"engine": target.require_engine().model_copy(update=changes)})


def saved(tmp_path: Path, text: str) -> list[Finding]:
    ir.save(ir.from_onnx_text(text), tmp_path / "one.onnx")
    return list(doctor._graph(tmp_path / "one.onnx", tmp_path))


HEAD = '<ir_version: 10, opset_import: ["": 24, "capa": 1, "own": 1]>'


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        (
            HEAD
            + "g (float[T] x) => (float[K] y) { k = Constant <value = int64[1] {4000}> () "
            + "y, i = TopK <axis = 0> (x, k) }",
            "K is 4000, TensorRT's TopK ends at 3840",
        ),
        (
            HEAD
            + 'g (float[T] x) => (float[T] y) { y = own.Relu (x) } <domain: "own", opset_import: ["": 24]> '
            + "Relu (x) => (y) { y = Neg (x) }",
            "function Relu: TensorRT takes the ONNX operator of that name",
        ),
        (
            HEAD
            + "g (float[T, D] x, float[D] a) => (float[T, D] y) { y = own.Outer (x, a) } "
            + '<domain: "own", opset_import: ["": 24, "capa": 1]> '
            + "Outer (x, a) => (y) { y = capa.VisualScale (x, a, x, a) }",
            "VisualScale inside Outer: TensorRT takes no plugin there",
        ),
        (
            HEAD + "g (float[T, D] x, float[D] a) => (float[T, D] y) { y = capa.VisualScale (x, a, x, a) }",
            "lacks plugin_namespace, so that no plugin is found",
        ),
    ],
    ids=["topk", "collision", "nested", "attributes"],
)
def test_a_trap_of_the_parser_is_named(tmp_path: Path, text: str, detail: str) -> None:
    first, *_ = saved(tmp_path, text)
    assert first.verdict == "problem"
    assert detail in first.detail


def test_a_shipped_graph_has_no_traps(bundle: Bundle) -> None:
    path = bundle.folder / "onnx/llm/prefill.onnx"
    assert [finding.verdict for finding in doctor._graph(path, bundle.folder)] == ["ok"]


def test_pictures_are_held_against_the_profile(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PICTURES", {"smallest": (8, 8), "largest": (600, 600), "widest": (9000, 8)})
    rtx = load_target("rtx")
    wide = {name: DimRange(min=1, opt=64, max=20000) for name in rtx.require_engine().dims}
    findings = examine(with_engine(rtx, dims=wide), bundle)
    pictures = {finding.check: finding.verdict for finding in findings if finding.check.endswith("picture")}
    # The image processor refuses a strip of 1,125 : 1 by itself.
    assert pictures == {"smallest picture": "ok", "largest picture": "ok"}
    narrow = {**wide, "sequence": DimRange(min=1, opt=8, max=64)}
    largest = found(examine(with_engine(rtx, dims=narrow), bundle), "largest picture")
    assert largest.verdict == "warning"
    assert "the profile of rtx takes 1 to 64" in largest.detail
    assert "--max-pixels" in largest.remedy


def test_what_is_missing_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    rtx = load_target("rtx")
    old = found(examine(with_engine(rtx, version_min="1.99"), None), "runtime")
    assert old.verdict == "problem"
    assert "the target takes >=1.99,<2" in old.detail
    assert 'pip install "tensorrt-rtx>=1.99,<2"' in old.remedy
    exotic = found(examine(with_engine(rtx, compute_capabilities=("7.5",)), None), "kernels")
    assert (exotic.verdict, exotic.detail) == ("note", "no cubin for SM 7.5: the driver compiles the PTX there")
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert "pip install" in found(examine(rtx, None), "kernels").remedy


def test_a_device_too_small_for_the_weights(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PICTURES", {})
    small = load_target("rtx").model_copy(update={"devices": {"Toy": Device(memory=1e-6)}})
    memory = found(examine(small, bundle), "run memory")
    assert memory.verdict == "problem"
    assert "a smaller model" in memory.remedy


def test_every_shipped_target_can_be_examined() -> None:
    for name in ("onnx", "rtx", "spark", "orin", "thor", "h100", "ada", "ampere"):
        assert not [finding for finding in examine(load_target(name), None) if finding.verdict == "problem"]


def test_a_servers_tensorrt_is_known_by_its_module_and_its_plugins_need_no_headers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "read_version", lambda *_: "10.13.3")
    server = examine(load_target("h100"), None)
    assert (found(server, "runtime").verdict, found(server, "runtime").remedy) == ("ok", "")
    assert found(server, "native plugins").detail == "--plugins native needs TensorRT's headers and g++"
    assert "its build.sh needs" in found(examine(load_target("orin"), None), "native plugins").detail
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert "[tensorrt]" in found(examine(load_target("h100"), None), "kernels").remedy


def test_no_gpu_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise CapaError("no GPU: the NVIDIA driver (libcuda) is not installed")

    monkeypatch.setattr("capa_export.kernels.cuda.require_gpu", none)
    gpu = found(examine(load_target("rtx"), None), "gpu")
    assert (gpu.verdict, gpu.detail[:39]) == ("note", "engines can be built here, not run: no ")


def test_a_problem_is_exit_code_3(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "capa_export.trt.doctor.examine", lambda *_: [Finding("build memory", "problem", "too little", "buy more")]
    )
    assert main(["doctor", str(bundle.folder)]) == 3
    output = capsys.readouterr()
    assert output.out.splitlines() == ["problem  build memory: too little", "         buy more"]
    assert output.err == "error: build memory: too little\n"


def test_a_device_is_held_against_the_bundle(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_PICTURES", {})
    memory = found(examine(load_target("rtx"), bundle, 500_000_000), "run memory")
    assert (memory.verdict, memory.detail[-16:]) == ("problem", "0.5 GB are given")
    assert found(examine(load_target("rtx"), bundle, 8_000_000_000), "run memory").verdict == "ok"
    for options in (["--memory", "8GB"], [str(bundle.folder), "-t", "onnx", "--memory", "8GB"]):
        assert main(["doctor", *options]) == 2
        assert "--memory: give a bundle, and a target with engines" in capsys.readouterr().err
