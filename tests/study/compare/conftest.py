"""Small bundles of the real pipeline, exported from a random checkpoint, and what is done to them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from capa_export.base.statistics import wilson
from capa_export.bundle.store import PARITY, Bundle, file_digest
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.report.schema import Method, MethodError, ParityReport, write_parity
from tests.building import Building
from tests.conftest import noise
from tests.recorded import record

Exported = Callable[..., Bundle]


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    data = load_recipe("qwen25vl").model_dump()
    data["prune"] = {"schedule": [{"layer": 2, "ratio": 0.75}]}
    data["parity"] |= {"steps": 2}
    return Recipe(**data)


@pytest.fixture(scope="session")
def exported(recipe: Recipe, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Exports, and notes a validation that passed; tests copy what they change."""

    def export(name: str = "", source: Path = checkpoint, **options: object) -> Bundle:
        chosen = recipe if not name else load_recipe(name)
        precision = options.pop("precision", "fp16")
        chosen = chosen.with_options(**options)  # pyright: ignore[reportArgumentType]
        bundle = Bundle(tmp_path_factory.mktemp("bundle") / "out")
        weights = chosen.checkpoint if name else str(source)
        Building.of(chosen, bundle, weights, ffn=False, precision=precision).export()
        note_validation(bundle)
        return bundle

    return export


@pytest.fixture(scope="session")
def reference(exported: Exported) -> Bundle:
    return exported()


@pytest.fixture
def spare(reference: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the reference, to be changed."""
    return Bundle(Path(shutil.copytree(reference.folder, tmp_path / "spare")))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate(((112, 112), (84, 140))):
        noise(*size, index).save(folder / f"{index}.png")
    return folder


def note_validation(bundle: Bundle, *failures: str, right: int | None = None, questions: int = 100) -> None:
    """As if the bundle had been validated."""
    methods = ()
    if right is not None:
        methods = (Method(name="capa", accuracy=wilson([index < right for index in range(questions)])),)
    report = ParityReport(
        passed=not failures,
        failures=failures,
        warnings=(),
        strict=False,
        oracle="eager",
        prompts="",
        num_prompts=0,
        seed=0,
        schedule=(),
        linear_layers=(),
        fp32_layers=(),
        export_error=(),
        selection=(),
        method_error=MethodError(questions=questions, methods=methods),
        notes=(),
    )
    write_parity(bundle.folder / PARITY, report)
    record(bundle.folder, "validate", [PARITY], result={}, seconds=0.0, peak_memory_bytes=0)


def rerecord(bundle: Bundle, file: str) -> None:
    """Make a file that was changed pass for what was built."""
    stages = bundle.manifest["stages"]
    stages["export"]["files"][file] = file_digest(bundle.folder / file)
    bundle.update(stages=stages)


def overwrite(bundle: Bundle, name: str, value: float) -> None:
    """Set a decoder weight of an FP16 bundle to one number."""
    model = ir.load(bundle.folder / "onnx/llm/prefill.onnx")
    tensor = model.graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None
    array = tensor.numpy().copy()
    array[:] = value
    with (bundle.folder / "onnx/llm/model.onnx.data").open("r+b") as file:
        file.seek(tensor.offset)
        file.write(array.tobytes())
    rerecord(bundle, "onnx/llm/model.onnx.data")
