"""Engines that cannot run are refused in one line, and weights are on the GPU once."""

import ctypes
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle.store import Bundle
from capa_export.kernels import cuda
from capa_export.model.source import Source
from capa_export.run import engine as execution
from capa_export.run.engine import require_engines
from capa_export.run.engine_model import EngineModel
from tests.fake_driver import FakeDriver, has_driver
from tests.fake_tensorrt import GRAPHS, FakeTensorRT, write_bundle


@pytest.fixture(scope="module")
def built(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(source, tmp_path_factory.mktemp("bundle"))


def changed(bundle: Bundle, folder: Path, **entries: Any) -> Bundle:
    """A copy whose engine stage says something else."""
    copy = Bundle(shutil.copytree(bundle.folder, folder / "changed"))
    stages = copy.manifest["stages"]
    stages["engine/rtx"]["result"] |= entries
    copy.update(stages=stages)
    return copy


def refused(built: Bundle, driver: FakeDriver) -> CapaError:
    with pytest.raises(CapaError) as error:
        EngineModel(require_engines(built, "rtx"))
    assert "\n" not in str(error.value)
    assert not driver.named("cuMemAlloc", "executeAsync")
    return error.value


def test_engines_that_were_not_built(built: Bundle, trt: FakeTensorRT) -> None:
    with pytest.raises(CapaError, match="stage 'engine/orin' has not run"):
        require_engines(built, "orin")


def test_engines_that_a_device_built_from_a_kit(
    built: Bundle, driver: FakeDriver, trt: FakeTensorRT, tmp_path: Path
) -> None:
    """A kit has the graphs in a folder as the bundle has, and counts its files from outside of it."""
    engines = built.stage("engine/rtx")["result"]["engines"]
    of_kit = {name: {**entry, "onnx": f"onnx/{entry['onnx']}"} for name, entry in engines.items()}
    EngineModel(require_engines(changed(built, tmp_path, engines=of_kit), "rtx"))


def test_another_version_of_tensorrt(built: Bundle, driver: FakeDriver, trt: FakeTensorRT) -> None:
    trt.__version__ = "9.9.0"
    error = refused(built, driver)
    assert error.code == ExitCode.ENGINE
    assert "visual.engine: built by tensorrt-rtx 9.8.7, and 9.9.0 is installed; install that version" in str(error)


def test_no_tensorrt(built: Bundle, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    error = refused(built, driver)
    assert error.code == ExitCode.ENGINE
    assert "its engines need tensorrt-rtx, which is not installed" in str(error)


def test_a_kit_whose_engines_were_not_built(
    built: Bundle, driver: FakeDriver, trt: FakeTensorRT, tmp_path: Path
) -> None:
    kit = changed(built, tmp_path / "device", kit="engines/rtx", engines={})
    error = refused(kit, driver)
    assert error.code == ExitCode.ENGINE
    remedy = f"capa-export engine {kit.folder}/engines/rtx --on-device"
    assert str(error).endswith(f"is a kit whose engines were not built here: {remedy}")
    # What may have plugins in Python is built in its bundle alone.
    kit = changed(built, tmp_path / "server", kit="engines/rtx", built="with-gpu", engines={})
    assert str(refused(kit, driver)).endswith(f"capa-export engine {kit.folder} --target rtx")


def test_engines_of_an_older_release(built: Bundle, driver: FakeDriver, trt: FakeTensorRT, tmp_path: Path) -> None:
    older = changed(built, tmp_path)
    stages = older.manifest["stages"]
    del stages["engine/rtx"]["result"]["runtime"]
    older.update(stages=stages)
    assert "built by an older capa-export: build the engines again" in str(refused(older, driver))


def test_another_gpu(built: Bundle, driver: FakeDriver, trt: FakeTensorRT) -> None:
    driver.capability = (9, 0)
    error = refused(built, driver)
    assert error.code == ExitCode.ENGINE
    assert "for compute capability 8.6, 8.9, and Fake has 9.0; build them for a target that lists it" in str(error)


def test_an_engine_that_does_not_load(built: Bundle, driver: FakeDriver, trt: FakeTensorRT) -> None:
    trt.refuses = "magicTag assertion failed\nmore of it"
    error = refused(built, driver)
    assert error.code == ExitCode.ENGINE
    assert str(error).endswith(
        "visual.engine: cannot be loaded; build the engines again (tensorrt_rtx: magicTag assertion failed)"
    )


def test_a_second_model_hears_of_its_own_failures(built: Bundle, driver: FakeDriver, trt: FakeTensorRT) -> None:
    """TensorRT speaks to the first logger of a process, whoever brings another."""
    loggers: list[Any] = []
    runtime = trt.Runtime
    trt.Runtime = lambda logger: loggers.append(logger) or runtime(loggers[0])  # type: ignore[method-assign]
    for reason in ("first", "second"):
        trt.refuses = reason
        assert f"(tensorrt_rtx: {reason})" in str(refused(built, driver))


def test_a_driver_that_is_too_old(built: Bundle, driver: FakeDriver, trt: FakeTensorRT) -> None:
    trt.refuses = "cudaError 35: CUDA driver version is insufficient for CUDA runtime version"
    error = refused(built, driver)
    assert error.code == ExitCode.PREFLIGHT
    assert str(error) == (
        "the NVIDIA driver supports CUDA 13.1 and tensorrt_rtx 9.8.7 needs a newer one; update the driver"
    )


def test_an_empty_or_missing_engine(built: Bundle, driver: FakeDriver, trt: FakeTensorRT, tmp_path: Path) -> None:
    copy = changed(built, tmp_path)
    path = copy.folder / "engines/rtx/visual/visual.engine"
    path.write_bytes(b"")
    assert "visual.engine: not a readable engine (cannot mmap an empty file)" in str(refused(copy, driver))
    path.unlink()
    assert "visual.engine: not a readable engine" in str(refused(copy, driver))


@pytest.mark.trt
def test_tensorrt_itself_refuses_what_is_no_engine(built: Bundle, driver: FakeDriver, tmp_path: Path) -> None:
    """The real TensorRT-RTX reads the mapped file, and its reason is in the line."""
    version = importlib.import_module("tensorrt_rtx").__version__
    copy = changed(built, tmp_path, engines={name: {"onnx": o, "runtime": version} for name, o in GRAPHS.items()})
    error = refused(copy, driver)
    if has_driver():
        assert "magicTag" in str(error)
    else:
        # Without a driver it says that, too, and it is what to mend first.
        assert "supports CUDA 13.1 and tensorrt_rtx" in str(error)


def test_plugins_are_known_before_an_engine_is_loaded(
    built: Bundle, driver: FakeDriver, trt: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capa_export.kernels.plugins import python_plugins

    registered: list[Any] = []
    monkeypatch.setattr(python_plugins, "register", registered.append)
    copy = changed(built, tmp_path, plugins={"kind": "python", "library_sha256": None})
    EngineModel(require_engines(copy, "rtx"))
    EngineModel(require_engines(copy, "rtx"))
    # TensorRT refuses a second plugin of the same name.
    assert registered == [trt]
    assert not trt.runtime.engine_host_code_allowed


def test_a_library_inside_the_engines_may_run(
    built: Bundle, driver: FakeDriver, trt: FakeTensorRT, tmp_path: Path
) -> None:
    copy = changed(built, tmp_path, plugins={"kind": "native", "library_sha256": "0"})
    EngineModel(require_engines(copy, "rtx"))
    assert trt.runtime.engine_host_code_allowed


def test_weights_are_uploaded_once_for_both_decoder_engines(
    source: Source, driver: FakeDriver, trt: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "_UPLOAD_BYTES", 1000)
    engines = EngineModel(require_engines(write_bundle(source, tmp_path, external_weights=True), "rtx"))
    tables = {name: tmp_path / "engines/rtx" / f"{name}.weights.json" for name in GRAPHS}
    entries = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in tables.items()}
    shared = set(entries["llm/prefill"]) & set(entries["llm/decode"])
    # Seven matrices in each of five layers, and the head.
    assert len(shared) >= 36
    engines._decode.execution(engines._stream, engines._activations)
    addresses = {name: trt.contexts[name].addresses for name in GRAPHS}
    for weight in shared:
        assert addresses["llm/prefill"][weight] == addresses["llm/decode"][weight]
    unique = {(one["file"], one["offset"]): one["length"] for table in entries.values() for one in table.values()}
    uploads = driver.named("cuMemcpyHtoDAsync")
    assert sum(num_bytes for *_, num_bytes, _ in uploads) == sum(unique.values()) == engines.memory["weights"]
    # In pieces, each right behind the one before.
    assert max(num_bytes for *_, num_bytes, _ in uploads) == 1000
    targets = sorted((target, num_bytes) for _, target, _, num_bytes, _ in uploads)
    covered = [target for target, _ in targets if target not in driver.buffers]
    assert covered and all(any(a + n == target for a, n in targets) for target in covered)


def test_the_bytes_uploaded_are_those_of_the_file(driver: FakeDriver, tmp_path: Path) -> None:
    seen: list[bytes] = []

    def copied(target: int, source: int, num_bytes: int, stream: Any) -> tuple[()]:
        seen.append(ctypes.string_at(source, num_bytes))
        return ()

    driver._cuMemcpyHtoDAsync = copied  # type: ignore[method-assign]
    data = np.random.default_rng(0).bytes(5000)
    (tmp_path / "data").write_bytes(data)
    entry = {"file": "data", "offset": 100, "length": 4000}
    (tmp_path / "x.weights.json").write_text(json.dumps({"w": entry}), encoding="utf-8")
    weights = execution.DeviceWeights(cuda.Stream())
    assert weights.of(tmp_path / "x.engine")["w"].num_bytes == 4000
    assert b"".join(seen) == data[100:4100]


def test_weights_that_are_cut_off(driver: FakeDriver, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(99))
    table = {"w": {"file": "data", "offset": 50, "length": 50}}
    (tmp_path / "x.weights.json").write_text(json.dumps(table), encoding="utf-8")
    weights = execution.DeviceWeights(cuda.Stream())
    with pytest.raises(CapaError, match=r"data: ends before byte 100; build the bundle again"):
        weights.of(tmp_path / "x.engine")
    (tmp_path / "data").unlink()
    with pytest.raises(CapaError, match=r"data: No such file or directory; build"):
        weights.of(tmp_path / "x.engine")


def test_embedded_weights_are_in_the_plans(built: Bundle, driver: FakeDriver, trt: FakeTensorRT) -> None:
    memory = EngineModel(require_engines(built, "rtx")).memory
    plans = [built.folder / "engines/rtx" / f"{name}.engine" for name in GRAPHS]
    assert memory == {
        "weights": 0,
        "plans": sum(path.stat().st_size for path in plans),
        "contexts": 3000,  # Of the tower, which needs the most.
        "kv_cache": 0,
    }


def test_why_no_context_can_be_made_is_said(built: Bundle, driver: FakeDriver, trt: FakeTensorRT) -> None:
    trt.refuses_context = "no kernel image is available\nmore of it"
    with pytest.raises(CapaError) as error:
        EngineModel(require_engines(built, "rtx"))
    assert str(error.value).endswith(
        "visual.engine: no execution context can be made (tensorrt_rtx: no kernel image is available)"
    )
    assert error.value.code == ExitCode.ENGINE


def test_an_engine_that_allocates_for_itself_would_be_refused(
    built: Bundle, driver: FakeDriver, trt: FakeTensorRT
) -> None:
    """As TensorRT-RTX refuses it, of engines that our builder makes; so the stand-in has to."""
    engines = EngineModel(require_engines(built, "rtx"))
    engine = engines._decode._engine
    assert engine.create_execution_context() is None
    assert engine.create_execution_context(engine.create_runtime_config()) is None
    assert "requires ExecutionContextAllocationStrategy::kUSER_MANAGED" in engine.logger.errors[-1]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kernels_of(decode: Any) -> Any:
    """The kernels of a decode engine, which are kept anew."""
    decode.kernels.cache.compiled.append("shapes")
    decode.save_kernels()
    return decode.kernels


@pytest.mark.parametrize("stored", [b"", b"of another", b'{"gpu": "Other", "compiled": []}'])
def test_compiled_kernels_are_kept_in_the_users_cache(
    built: Bundle, driver: FakeDriver, trt: FakeTensorRT, tmp_path: Path, stored: bytes, cached: Path
) -> None:
    copy = changed(built, tmp_path)
    before = set(copy.folder.rglob("*"))

    def load() -> Any:
        return EngineModel(require_engines(copy, "rtx"))._decode

    path = load().kernels.path
    path.parent.mkdir(parents=True)
    path.write_bytes(stored)
    decode = load()
    assert decode.kernels.cache.compiled == []
    assert kernels_of(decode).path == path and path.is_relative_to(cached)
    assert load().kernels.cache.compiled == ["shapes"]
    written = path.stat().st_mtime_ns
    load().save_kernels()
    assert path.stat().st_mtime_ns == written
    assert set(copy.folder.rglob("*")) == before
    # Of an engine that took the place of the one that they are of.
    (copy.folder / "engines/rtx/llm/decode.engine").touch()
    assert load().kernels.cache.compiled == []


def test_compiled_kernels_that_come_with_a_bundle_are_not_loaded(
    built: Bundle, driver: FakeDriver, trt: FakeTensorRT, tmp_path: Path, cached: Path
) -> None:
    copy = changed(built, tmp_path)
    stored = kernels_of(EngineModel(require_engines(copy, "rtx"))._decode).path
    shutil.copyfile(stored, copy.folder / "engines/rtx/llm/decode.kernels")
    shutil.rmtree(cached)
    assert EngineModel(require_engines(copy, "rtx"))._decode.kernels.cache.compiled == []


def test_kernels_that_cannot_be_kept_are_said_and_no_error(
    built: Bundle,
    driver: FakeDriver,
    trt: FakeTensorRT,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    cached: Path,
) -> None:
    copy = changed(built, tmp_path)
    decode = EngineModel(require_engines(copy, "rtx"))._decode
    decode.kernels.path.mkdir(parents=True)
    decode.save_kernels()
    assert f"{decode.kernels.path}: compiled kernels are not kept for the next time (Is a" in capsys.readouterr().err
