"""Small hand-made results of a validation, for what shows them."""

from typing import Any

from capa_export.base.statistics import Difference, Rate
from capa_export.report.schema import (
    Answers,
    Bisection,
    Check,
    ExportError,
    Kept,
    LayerError,
    Method,
    MethodError,
    ParityReport,
    Probe,
    Selection,
    Stage,
)

__all__ = ["BISECTION", "EVIL", "MANIFEST", "compared", "export_stage", "method_error", "parity_of", "selected"]

EVIL = '<script>alert(1)</script>" onload="x | `y` @z'

BISECTION = Bisection(
    artefact="fp16 ONNX",
    graph="llm/prefill.onnx",
    layer="layers.1",
    block="mlp",
    node="model/layers.1/mlp/down_proj/Gemm",
    sentence="fp16 ONNX leaves the oracle in layers.1, at down_proj: inputs good, output off by 42 %.",
    fp32_layers=("1.mlp", "residual"),
    probes=(
        Probe(name="model/layers.0", relative_error=1e-4, limit=2e-3, clean=True),
        Probe(name="model/layers.1", relative_error=float("nan"), limit=2e-3, clean=False),
    ),
)


def compared(artefact: str = "fp16 ONNX", *, failure: str = "", value: float = 0.9999, layers: int = 3) -> ExportError:
    """A comparison whose cosine fails where a failure is given."""
    return ExportError(
        artefact=artefact,
        reference="eager CAPA fp32",
        prompts=4,
        steps=16,
        noise=0.03,
        checks=(
            Check(name="relative error", value=2.5e-3),
            Check(name="cosine", value=value, at_least=0.999, healthy=0.99995, failure=failure),
            Check(name="times the noise", value=0.61, at_most=2.0, healthy=0.85),
            Check(name="top-1 wrong", value=0, at_most=0, of=16),
            Check(name="same tokens", value=3, of=4),
        ),
        layers=tuple(
            LayerError(layer=layer, relative_error=1e-3 * 10**layer, cosine=0.999, norm_ratio=1e-3, noise=2e-3)
            for layer in range(layers)
        ),
    )


def selected(artefact: str = "fp16 ONNX", *, layers: tuple[int, ...] = (1,), failure: str = "") -> Selection:
    """A selection at so many stages, the last of which fails where a failure is given."""
    stages = tuple(
        Kept(
            layer=layer,
            iou_mean=0.99,
            iou_min=0.875,
            iou_bound=0.95,
            margin_min=0.001,
            margin_median=0.02,
            score_noise=0.0005,
            flipped=2,
        )
        for layer in layers
    )
    checks: list[Check] = []
    for layer in layers:
        said = failure if layer == layers[-1] else ""
        checks += [
            Check(name="kept-set IoU", value=0.875, at_least=0.8),
            Check(name="furthest flip", value=0.004 + layer / 1000, at_most=0.02, healthy=0.003, failure=said),
        ]
    return Selection(artefact=artefact, reference="eager CAPA fp32", prompts=4, stages=stages, checks=tuple(checks))


def method_error(*, beats_random: bool = True, known: bool = True) -> MethodError:
    """Of a hundred questions."""

    def rate(value: float) -> Rate:
        return Rate(value=value, low=value - 0.05, high=value + 0.04)

    return MethodError(
        questions=100,
        methods=(
            Method(name="dense", accuracy=rate(0.95) if known else None),
            Method(
                name="capa",
                accuracy=rate(0.9) if known else None,
                top1=rate(0.92),
                top5=0.88,
                kl=0.05,
                same_answer=rate(0.91),
                diverges_at=1.25,
            ),
            Method(name="random", accuracy=rate(0.6) if known else None, top1=rate(0.7), top5=0.5, kl=0.25),
        ),
        kl_gain=Difference(value=0.2, low=0.15, high=0.25),
        accuracy_gain=Difference(value=0.3, low=0.2, high=0.4) if known else None,
        beats_random=beats_random,
        words=("CAPA beats random pruning.",) if beats_random else ("CAPA does not beat random pruning.",),
    )


def answers(same: int = 182, **changes: Any) -> Answers:
    """Of 200 questions, nine in ten of which must be as dense."""
    return Answers(same=same, questions=200, least_agreement=0.9, accepted=False).model_copy(update=changes)


def parity_of(*rows: ExportError, **changes: Any) -> ParityReport:
    """Passed where no check of it fails, and as the changes say."""
    rows = rows or (compared("fp32 ONNX, nothing removed", layers=0), compared("fp32 ONNX"), compared())
    selection = changes.get("selection", (selected(),))
    failures = tuple(check.failure for row in (*rows, *selection) for check in row.checks if check.failure)
    report = ParityReport(
        passed=not failures,
        failures=failures,
        warnings=(),
        strict=False,
        oracle="eager",
        prompts="built-in scenes",
        num_prompts=4,
        seed=7,
        prompts_sha256="ef" * 32,
        schedule=(Stage(layer=1, ratio=0.5),),
        linear_layers=(0, 1),
        fp32_layers=(),
        export_error=rows,
        selection=selection,
        method_error=method_error(),
        notes=("No engine was run & none < was asked for.",),
    )
    return report.model_copy(update=changes)


def export_stage(*files: str, **result: Any) -> dict[str, Any]:
    """A stage of a manifest."""
    return {"seconds": 1.5, "peak_memory_bytes": 0, "result": result, "files": dict.fromkeys(files, "ab" * 32)}


MANIFEST: dict[str, Any] = {
    "recipe": {"name": EVIL, "prune": {"schedule": [{"layer": 1, "ratio": 0.5}]}},
    "checkpoint": {
        "source": "https://example.org/model",
        "revision": None,
        "sha256": {"a.safetensors": "cd" * 32},
    },
    "command": ["build", "--model", EVIL],
    "tool": {"capa-export": "0.1.0"},
    "stages": {"export": export_stage("onnx/llm/prefill.onnx", precision="fp16")},
}
