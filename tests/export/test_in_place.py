"""Weights in place: the numbers of a copy, no tensor written, and a checkpoint that no bundle changes."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle.store import Bundle, file_digest
from capa_export.cli import main
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.target import load_target
from capa_export.export.graphs import write_onnx
from capa_export.model.checkpoint import Checkpoint, open_checkpoint
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Prompter
from capa_export.model.source import Source
from capa_export.run.onnx import OnnxModel
from capa_export.trt.stage import build_engines
from tests.building import Building
from tests.conftest import noise
from tests.models.qwen25vl import random_model, save_model
from tests.products import once_each

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALES = {2: np.linspace(0.5, 1.5, 64)}


def checkpoint_of(folder: Path, precision: str, *, tied: bool = False) -> Path:
    """In several shards."""
    model = random_model()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return save_model(folder, model.to(DTYPES[precision]), max_shard_size="100KB")


def source_of(checkpoint: Path) -> Source:
    return Source.of(open_checkpoint(str(checkpoint)), qwen25vl)


def write(checkpoint: Path, precision: str, folder: Path, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"prune_layers": (2,), "scales": SCALES, **options}
    return write_onnx(source_of(checkpoint), precision, folder, **given)


def state(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Content, time and mode of every file."""
    status = {path.name: (path, path.stat()) for path in folder.iterdir()}
    return {name: (file_digest(path), one.st_mtime_ns, one.st_mode) for name, (path, one) in status.items()}


def shards(checkpoint: Path) -> set[tuple[int, int]]:
    return {(path.stat().st_dev, path.stat().st_ino) for path in checkpoint.glob("*.safetensors")}


def own_files(folder: Path, checkpoint: Path) -> dict[str, int]:
    """Bytes of the files that are no shard."""
    files = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: one.st_size for name, one in files.items() if (one.st_dev, one.st_ino) not in shards(checkpoint)}


def answers(folder: Path, prompter: Prompter) -> list[np.ndarray]:
    """Logits of a prefill and of two steps behind it, and the kept positions."""
    model = OnnxModel(folder)
    prompt = prompter("what color is the star ?", [noise(140, 196, 1)])
    run = model.prefill(prompt, [9])
    first, cache = model.step(run.cache, 5, prompt.next_position)
    second, _ = model.step(cache, 6, prompt.next_position + 1)
    return [run.logits, first, second, *run.kept]


@pytest.mark.parametrize(("precision", "head"), once_each(DTYPES, ["untied", "tied"]))
def test_the_same_numbers_as_a_copy_and_no_tensor_written(precision: str, head: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "checkpoint", precision, tied=head == "tied")
    source = source_of(checkpoint)
    prompter = Prompter(checkpoint, checkpoint, qwen25vl, source.dims)
    assert len(shards(checkpoint)) > 2 and source.dims.decoder.tie_word_embeddings is (head == "tied")
    before = state(checkpoint)
    for folder, in_place in ((tmp_path / "copied", False), (tmp_path / "linked", True)):
        write(checkpoint, precision, folder, in_place=in_place)
    copied, linked = (answers(tmp_path / folder, prompter) for folder in ("copied", "linked"))
    for one, other in zip(copied, linked, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not any(path.is_symlink() for path in (tmp_path / "linked").rglob("*"))
    own = own_files(tmp_path / "linked", checkpoint)
    assert set(own) == {
        "llm/prefill.onnx",
        "llm/decode.onnx",
        "llm/model.onnx.data",
        "llm/embedding.json",
        "visual/model.onnx",
    }
    assert own["llm/model.onnx.data"] == 64 * torch.finfo(DTYPES[precision]).bits // 8, "alpha, and nothing else"
    assert state(checkpoint) == before


def test_small_tensors_of_another_dtype_are_converted(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "checkpoint", "bf16")
    num_norms = 0
    for path in checkpoint.glob("*.safetensors"):
        tensors = load_file(path)
        norms = {name: tensor.float() for name, tensor in tensors.items() if "norm" in name}
        num_norms += sum(tensor.numel() for name, tensor in norms.items() if "visual" not in name)
        save_file({**tensors, **norms}, path, metadata={"format": "pt"})
    prompter = Prompter(checkpoint, checkpoint, qwen25vl, source_of(checkpoint).dims)
    for folder, in_place in ((tmp_path / "copied", False), (tmp_path / "linked", True)):
        write(checkpoint, "bf16", folder, in_place=in_place, scales={})
    for one, other in zip(*(answers(tmp_path / folder, prompter) for folder in ("copied", "linked")), strict=True):
        np.testing.assert_array_equal(one, other)
    assert own_files(tmp_path / "linked", checkpoint)["llm/model.onnx.data"] == 2 * num_norms


@pytest.mark.parametrize(("stored", "asked"), [("bf16", "fp16"), ("fp16", "fp32"), ("fp32", "bf16")])
def test_another_precision_is_refused(stored: str, asked: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "checkpoint", stored)
    with pytest.raises(CapaError, match=f"its weights are {stored}, .*build with --precision {stored}, or leave"):
        write(checkpoint, asked, tmp_path / "out", in_place=True)
    assert not list(tmp_path.glob("out/**/*.*"))


def test_a_build_refuses_another_precision_before_it_calibrates(building: Building) -> None:
    with pytest.raises(CapaError, match="its weights are fp32"):
        building.again(precision="fp16").build()
    assert not building.bundle.folder.exists()


def test_a_weight_that_starts_at_an_odd_byte_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "checkpoint", "fp16")
    path = min(checkpoint.glob("*.safetensors"))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    with pytest.raises(CapaError, match=r"starts at byte \d+, no multiple of its 2; re-save it"):
        write(checkpoint, "fp16", tmp_path / "out", in_place=True)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """The shipped one, made small."""
    data = load_recipe("qwen25vl").model_dump()
    data["prune"] = {"schedule": [{"layer": 2, "ratio": 0.75}]}
    data["ffn"] = {"eta": 0.5, "budget": 100}
    data["parity"] |= {"prompts": 2, "steps": 3, "accuracy_samples": 2}
    return Recipe(**data)


@pytest.fixture
def building(recipe: Recipe, tmp_path: Path) -> Building:
    """An FP32 checkpoint in place, on pictures of its own."""
    (tmp_path / "pictures").mkdir()
    for index, size in enumerate(((224, 224), (140, 196))):
        noise(*size, index).save(tmp_path / "pictures" / f"{index}.png")
    checkpoint = checkpoint_of(tmp_path / "checkpoint", "fp32")
    return Building.of(
        recipe, Bundle(tmp_path / "out"), checkpoint, images=tmp_path / "pictures", precision="fp32", in_place=True
    )


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_another_disk_is_refused_and_nothing_left(
    building: Building, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(tmp_path / "checkpoint")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(
        CapaError, match=r"cannot be linked into .*choose an --out on the same disk, or leave"
    ) as raised:
        building.again(ffn=False).export()
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    assert state(tmp_path / "checkpoint") == before


def test_a_hub_cache_is_linked_behind_its_symbolic_links(building: Building, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "checkpoint").rename(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    building.again(checkpoint=str(snapshot), ffn=False).export()
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    prompter = Prompter(blobs, blobs, qwen25vl, source_of(blobs).dims)
    assert np.isfinite(answers(tmp_path / "out" / "onnx", prompter)[0]).all()


def test_whatever_becomes_of_the_bundle_the_checkpoint_stays(
    building: Building, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint"
    before = state(checkpoint)
    first = building.again(ffn=False)
    first.export()
    for options in ({"precision": "fp32", "in_place": False}, {}, {"precision": "fp16", "in_place": False}, {}):
        building.again(ffn=False, **options).export()
        assert state(checkpoint) == before
    (tmp_path / "out/onnx/llm/config.json").write_text("changed")
    building.again(ffn=False).export()
    with monkeypatch.context() as patch:
        patch.setattr("capa_export.export.stage.run_stage", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            building.again(ffn=False).export()
    assert state(checkpoint) == before
    shutil.rmtree(tmp_path / "out")
    assert state(checkpoint) == before
    assert all(path.stat().st_nlink == 1 for path in checkpoint.iterdir())


def said(bundle: Bundle, picture: Path, capsys: pytest.CaptureFixture[str]) -> str:
    command = ["run", str(bundle.folder), "--image", str(picture), "--prompt", "what color is the star ?", "--json"]
    capsys.readouterr()
    assert main([*command, "--max-new-tokens", "8"]) == ExitCode.OK
    return json.loads(capsys.readouterr().out)["answer"]


def test_a_whole_build_in_place(building: Building, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, picture = state(tmp_path / "checkpoint"), tmp_path / "pictures" / "1.png"
    assert building.build().passed
    Bundle.open(tmp_path / "out").verify("calibrate", "export", "validate")
    assert building.bundle.stage("export")["result"]["searched_for_nan"] is False
    copied = building.again(in_place=False, bundle=Bundle(tmp_path / "copied"))
    copied.calibrate()
    copied.export()
    assert copied.bundle.stage("export")["result"]["searched_for_nan"] is True
    both = [said(bundle, picture, capsys) for bundle in (building.bundle, copied.bundle)]
    assert both[0] == both[1] != ""
    assert state(tmp_path / "checkpoint") == before


def test_after_calibration_the_checkpoint_is_not_read_again(
    building: Building, monkeypatch: pytest.MonkeyPatch
) -> None:
    building.calibrate()

    def fail(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Checkpoint, "sha256", fail)
    building.again().export()
    stage = building.bundle.stage("export")
    assert stage["linked"] and all(link["sha256"] for link in stage["linked"].values())
    assert not set(stage["linked"]) & set(stage["files"])
    building.bundle.verify("export")


def test_without_calibration_nothing_but_headers_is_read(building: Building, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "sha256", lambda *_: pytest.fail("reads the weights"))
    building.again(ffn=False).export()
    assert {link["sha256"] for link in building.bundle.stage("export")["linked"].values()} == {None}
    Building.recorded(building.bundle, images=building.options.images).validate()


def test_a_changed_checkpoint_is_noticed(
    building: Building, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    building.again(ffn=False).export()
    shard = min((tmp_path / "checkpoint").glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(iter(tensors))
    # The same inode, size and header.
    saved = save({**tensors, name: tensors[name] + 1}, metadata={"format": "pt"})
    with shard.open("r+b") as file:
        file.write(saved)
    with pytest.raises(CapaError, match=r"changed since it was built \(size, time or header differ.*cp -a"):
        building.bundle.verify("export")
    capsys.readouterr()
    building.again(ffn=False).export()
    assert "up to date" not in capsys.readouterr().err
    building.bundle.verify("export")


def test_a_copied_bundle_is_known_by_its_times_or_its_digests(building: Building, tmp_path: Path) -> None:
    building.again(ffn=False).export()
    shutil.copytree(tmp_path / "out", tmp_path / "with times")
    Bundle.open(tmp_path / "with times").verify("export")
    without = shutil.copytree(tmp_path / "out", tmp_path / "without", copy_function=shutil.copyfile)
    with pytest.raises(CapaError, match="copy the bundle again, with its times"):
        Bundle.open(without).verify("export")
    building.again().calibrate()
    building.again().export()
    digested = shutil.copytree(tmp_path / "out", tmp_path / "digested", copy_function=shutil.copyfile)
    Bundle.open(digested).verify("export")
    link = min(digested.glob("onnx/llm/weights/*"))
    data = bytearray(link.read_bytes())
    data[-1] ^= 1
    link.write_bytes(data)
    with pytest.raises(CapaError, match="changed since it was built"):
        Bundle.open(digested).verify("export")


@pytest.mark.parametrize("weights", [pytest.param("embedded", marks=pytest.mark.exhaustive), "external"])
def test_engines_are_built_from_the_shards(building: Building, tmp_path: Path, weights: Any) -> None:
    before = state(tmp_path / "checkpoint")
    building = building.again(ffn=False)
    building.export()
    rtx = load_target("rtx")
    one_gpu = rtx.require_engine().model_copy(update={"compute_capabilities": ("8.6",)})
    target = rtx.model_copy(update={"engine": one_gpu})
    engines = build_engines(building.bundle, target, weights=weights, report=building.model.report)["engines"]
    assert set(engines) == {"visual/visual", "llm/prefill", "llm/decode"}
    assert all(engine["weight_copies"] == 0 for engine in engines.values())
    assert state(tmp_path / "checkpoint") == before


def test_the_command_line(building: Building, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", "--model", "qwen25vl", "--checkpoint", building.checkpoint, "--schedule", "capa@2:0.75/full"]
    command += ["--weights", "in-place", "--out", str(tmp_path / "out")]
    assert main(command) == ExitCode.PREFLIGHT
    assert "its weights are fp32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--precision", "fp32", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["result"]["precision"] == "fp32"
    assert main(["inspect", str(tmp_path / "out")]) == ExitCode.OK
    assert "every file is as it was built" in capsys.readouterr().out


def test_the_plan_counts_no_bytes(building: Building, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "plan",
        "--model",
        "qwen25vl",
        "--checkpoint",
        building.checkpoint,
        "--schedule",
        "capa@2:0.75",
        "--json",
    ]
    capsys.readouterr()
    assert main([*command, "--weights", "in-place"]) == ExitCode.OK
    plan = json.loads(capsys.readouterr().out)
    assert plan["files"] == {"onnx weights": 0, "embedding.safetensors": 0}
    assert main([*command, "--weights", "external"]) == ExitCode.OK
    external = json.loads(capsys.readouterr().out)
    assert plan["memory"] == external["memory"] and external["files"]["onnx weights"] > 0
