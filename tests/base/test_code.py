"""What code a result depends on, in packages of a few lines and in a copy of this one."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

import capa_export
from capa_export.base import code
from capa_export.base.code import digest_code, find_code, versions
from capa_export.calibrate import stage as calibrate_stage
from capa_export.export import stage as export_stage
from capa_export.parity import golden
from capa_export.parity.against_eager import AgainstEager
from capa_export.parity.against_golden import AgainstGolden
from capa_export.study.evaluate.bundle_answers import BundleAnswers
from capa_export.study.evaluate.eager_answers import EagerAnswers
from capa_export.trt import stage as trt_stage

STAGES: Mapping[str, tuple[str, ...]] = {
    "calibrate": calibrate_stage._CODE,
    "effect": calibrate_stage._EFFECT_CODE,
    "export": export_stage._CODE,
    "engine": trt_stage._ENGINE_CODE,
    "kit": trt_stage._KIT_CODE,
    "validate": (AgainstEager.__module__,),
    "validate --golden": (AgainstGolden.__module__,),
    "golden": (golden.__name__,),
    "answers of eager": (EagerAnswers.__module__,),
    "answers of a bundle": (BundleAnswers.__module__,),
}

Find = Callable[[Mapping[str, str]], dict[str, str]]

MODULE = '''"""A module."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sample import types

SIZE = 3


def double(x: "types.Number", by: int = 2) -> int:
    """Twice."""
    return x * by


class Pair:
    left: int
    right: int = 1
'''


@pytest.fixture
def find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Find:
    """What `sample.main` depends on, in a package `sample` of the given files."""
    monkeypatch.syspath_prepend(tmp_path)

    def find(files: Mapping[str, str]) -> dict[str, str]:
        shutil.rmtree(tmp_path / "sample", ignore_errors=True)
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / "sample" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        code._files.cache_clear()
        code._read.cache_clear()
        return find_code("sample.main")

    return find


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SIZE = 3\n", "# Of three.\nSIZE = 3  # Three.\n"),
        ("SIZE = 3\n", 'SIZE = 3\n"""Three."""\n'),
        ('    """Twice."""\n', '    """Two times."""\n'),
        ('    """Twice."""\n', ""),
        ("    left: int\n", '    left: int\n    """The first."""\n'),
        ("    return x * by\n", "    return (\n        x\n        * by\n    )\n"),
        ("    from sample import types\n", "    from sample import types, other\n"),
    ],
)
def test_comments_docstrings_layout_and_types_change_nothing(find: Find, old: str, new: str) -> None:
    assert old in MODULE
    assert find({"main.py": MODULE.replace(old, new, 1), "types.py": ""}) == find({"main.py": MODULE, "types.py": ""})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SIZE = 3", "SIZE = 4"),
        ("SIZE = 3", "SIZE = 3.0"),
        ("SIZE = 3", 'SIZE = "3"'),
        ("x * by", "x + by"),
        ("x * by", "by * x"),
        ("by: int = 2", "*, by: int = 2"),
        ("right: int = 1", "right: int"),
        ("double", "twice"),
        ("    return x * by\n", "    return x * by\n    yield\n"),
        ("class Pair:\n    left: int\n", "class Pair:\n    left: int\n\n\nif SIZE:\n"),
    ],
)
def test_other_code_is_another_digest(find: Find, old: str, new: str) -> None:
    assert old in MODULE
    before, after = find({"main.py": MODULE}), find({"main.py": MODULE.replace(old, new, 1)})
    assert before.keys() == after.keys() == {"sample.main"}
    assert before != after


@pytest.mark.parametrize(
    ("text", "imported"),
    [
        ("import sample.part", {"part"}),
        ("from sample import part", {"part"}),
        ("from sample.part import thing", {"part"}),
        ("def work():\n    from sample.part import thing\n", {"part"}),
        ("from sample.inner.deep import thing", {"inner", "inner.deep", "part"}),
        ('COMMAND = ["python", "-m", "sample.part"]', {"part"}),
        ('def load(name):\n    return import_module(f"{__package__}.{name}")\n', {"inner", "inner.deep", "part"}),
        ("import json, numpy", set[str]()),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sample.part\n", set[str]()),
        ("from typing import TYPE_CHECKING\nif not TYPE_CHECKING:\n    import sample.part\n", {"part"}),
    ],
)
def test_what_a_module_imports_counts(find: Find, text: str, imported: set[str]) -> None:
    others = {"part.py": "thing = 1", "inner/__init__.py": "", "inner/deep.py": "from sample import part as thing"}
    found = find({"main.py": text, **others})
    assert found.keys() == {"sample.main", *(f"sample.{name}" for name in imported)}


def test_circles_of_imports_end(find: Find) -> None:
    found = find({"main.py": "import sample.part", "part.py": "import sample.main"})
    assert found.keys() == {"sample.main", "sample.part"}


def test_a_package_of_another_name_brings_what_it_imports_of_this_one(find: Find) -> None:
    found = find({"main.py": "from capa_export.base.statistics import kl_divergence"})
    assert found.keys() == {"sample.main", "capa_export.base", "capa_export.base.statistics"}


def test_data_files_count_with_the_module_that_reads_them(find: Find) -> None:
    reads = {"main.py": "from pathlib import Path\nTEMPLATE = Path(__file__).with_name('page.html')\n"}
    assert find({**reads, "page.html": "<p>"}) != find({**reads, "page.html": "<div>"})
    plain = {"main.py": "SIZE = 3"}
    assert find({**plain, "page.html": "<p>"}) == find({**plain, "page.html": "<div>"})


def test_a_module_that_is_not_there_is_a_defect() -> None:
    with pytest.raises(AssertionError, match=r"no such module: \['capa_export.calibrate.mesure'\]"):
        find_code("capa_export.calibrate.mesure")


def test_versions() -> None:
    found = versions("pytest", "no-such-package", code_of=["capa_export.base.dims"])
    digest = digest_code("capa_export.base.dims")
    assert found == {"code": digest, "pytest": pytest.__version__, "no-such-package": "not installed"}


def test_all_that_is_left_out_is_there() -> None:
    modules = code._files("capa_export").keys()
    assert {name.removesuffix(".") for name in code._APART} <= modules


# This package.


@pytest.fixture(scope="module")
def digests() -> Mapping[str, str]:
    return {stage: digest_code(*names) for stage, names in STAGES.items()}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, as an installation has it: by itself."""
    source = Path(capa_export.__file__).parent
    return shutil.copytree(source, tmp_path / "capa_export", ignore=shutil.ignore_patterns("__pycache__"))


def test_an_installed_package_has_the_digests_of_the_checkout(package: Path, digests: Mapping[str, str]) -> None:
    script = (
        "import json, sys; from capa_export.base.code import digest_code; "
        "json.dump({stage: digest_code(*names) for stage, names in json.load(sys.stdin).items()}, sys.stdout)"
    )
    command = [sys.executable, "-c", script]
    output = subprocess.check_output(command, input=json.dumps(STAGES), cwd=package.parent, text=True)
    assert json.loads(output) == digests


@pytest.fixture
def rerun(
    package: Path, digests: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], set[str]]]:
    """The stages that the copy as it is would run again."""
    where = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(code, "find_spec", lambda _: where)

    def forget() -> None:
        for cached in (code.digest_code, code._files, code._read):
            cached.cache_clear()

    def rerun() -> set[str]:
        forget()
        return {stage for stage, names in STAGES.items() if digest_code(*names) != digests[stage]}

    yield rerun
    forget()


def edit(path: Path, old: str = "__all__ =", new: str = "ADDED = 1\n__all__ =") -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_a_comment_reruns_nothing(package: Path, rerun: Callable[[], set[str]]) -> None:
    for path in package.rglob("*.py"):
        path.write_text(path.read_text(encoding="utf-8") + "\n# A comment.\n", encoding="utf-8")
    assert rerun() == set()


def test_code_that_makes_no_result_reruns_nothing(package: Path, rerun: Callable[[], set[str]]) -> None:
    """Stages look whether a result is current, and leave making it to others."""
    stages = [package / name / "stage.py" for name in ("calibrate", "export", "trt", "parity")]
    others = [*package.glob("study/explain/*.py"), *package.glob("cli/*.py"), *package.glob("api/*.py")]
    for path in (*stages, *others, package / "model" / "files.py", package / "base" / "errors.py"):
        path.write_text(path.read_text(encoding="utf-8") + "\nADDED = 1\n", encoding="utf-8")
    edit(package / "__init__.py", "__version__ =", "ADDED = 1\n__version__ =")
    assert rerun() == set()


ANSWERS, VALIDATIONS = {"answers of eager", "answers of a bundle"}, {"validate", "validate --golden"}


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("calibrate/layerwise.py", {"calibrate"}),
        ("calibrate/measurement.py", {"calibrate"}),
        ("export/folder.py", {"export"}),
        ("trt/engines.py", {"engine"}),
        ("trt/kit.py", {"kit"}),
        ("parity/golden.py", {"golden", "validate --golden"}),
        ("parity/against_golden.py", {"validate --golden"}),
        ("parity/against_eager.py", {"validate"}),
        ("model/model.py", STAGES.keys() - {"export", "engine"}),
        ("export/genai.py", {"export"}),
        ("trt/worker.py", {"engine", "kit"}),
        ("passes/lower.py", {"engine", "kit"}),
        ("parity/bisect.py", {"validate"}),
        ("study/evaluate/eager_answers.py", {"answers of eager"}),
        ("study/evaluate/bundle_answers.py", {"answers of a bundle"}),
        ("selectors/dart.py", STAGES.keys() - {"engine"}),
        ("model/families/llava15/vision.py", STAGES.keys() - {"engine"}),
    ],
)
def test_a_changed_module_reruns_what_it_makes(
    package: Path, rerun: Callable[[], set[str]], file: str, stages: set[str]
) -> None:
    edit(package / file)
    assert rerun() == stages


def test_a_changed_constant_of_a_kernel_rebuilds_engines(package: Path, rerun: Callable[[], set[str]]) -> None:
    edit(package / "kernels" / "topk_keep.py", "= 4096, 16", "= 4096, 8")
    again = rerun()
    assert {"engine", "kit"} <= again
    assert not again & {"calibrate", "export"}


def test_a_changed_page_validates_again(package: Path, rerun: Callable[[], set[str]]) -> None:
    edit(package / "report" / "html" / "charts.html", 'height="220"', 'height="230"')
    assert rerun() >= VALIDATIONS
    assert not rerun() & {"calibrate", "export", "engine"}
