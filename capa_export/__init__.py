"""Export vision-language models with CAPA pruning to ONNX and TensorRT.

As a library, nothing is printed: what is said on the way goes to the logger `capa_export`, and `progress` is called
with what is being done, how much of it is done, and how much there is. A user's mistake raises `CapaError`.

Examples:
    ```python
    import capa_export

    bundle = capa_export.build(
        recipe="tiny-qwen25vl", out="out/tiny", schedule="capa@2:0.75", target="onnx", samples=8, validation_samples=4
    )
    print(bundle.parity.passed)

    vlm = capa_export.open("out/tiny").load()
    for piece in vlm.stream("What color is the star?", images=["scene.png"]):
        print(piece, end="")
    ```
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capa_export.api.builds import build
    from capa_export.api.bundle import Bundle, open  # noqa: A004 - capa_export.open reads as it should.
    from capa_export.api.studies import evaluate, tune
    from capa_export.base.errors import CapaError
    from capa_export.model.generation import GenerationOptions
    from capa_export.report.schema import ParityReport
    from capa_export.run.answer import VisionLanguageModel

__version__ = "0.1.0"

# From 1.29 on ONNX Runtime tells Microsoft of each graph that is opened, unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "Bundle",
    "CapaError",
    "GenerationOptions",
    "ParityReport",
    "VisionLanguageModel",
    "build",
    "evaluate",
    "open",
    "tune",
]

_HOMES = {
    "Bundle": "api.bundle",
    "CapaError": "base.errors",
    "GenerationOptions": "model.generation",
    "ParityReport": "report.schema",
    "VisionLanguageModel": "run.answer",
    "build": "api.builds",
    "evaluate": "api.studies",
    "open": "api.bundle",
    "tune": "api.studies",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `capa-export --help` need not wait for ONNX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
