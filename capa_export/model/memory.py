"""The memory of this machine that eager models take, which are held in FP32."""

from capa_export.base.errors import CapaError
from capa_export.base.machine import available_memory
from capa_export.base.progress import say
from capa_export.base.workers import Workers
from capa_export.model.model import Model

__all__ = ["LIBRARIES", "calibration_bytes", "exceeds_memory", "require_eager_memory", "validation_bytes"]

LIBRARIES = 500 << 20
"""Bytes of Python with its libraries."""


def calibration_bytes(num_parameters: int) -> int:
    """Peak of a calibration with the whole eager model in memory, in FP32, and the shards mapped that it came from.

    22.6 GB was measured for the 3.8 billion parameters of a Qwen2.5-VL-3B in bf16.
    """
    return LIBRARIES + (4 + 2) * num_parameters


def validation_bytes(num_parameters: int, precision: str) -> int:
    """Peak of a validation with all models in memory.

    The eager model and its half copy; prefill and decode in ONNX Runtime, which computes in FP32 whatever the graphs'
    precision, as they are and opened up.
    """
    return LIBRARIES + (4 + (0 if precision == "fp32" else 2) + 4 * 4) * num_parameters


def require_eager_memory(model: Model, workers: Workers | None = None) -> None:
    """Refuse, before it is loaded, a model that this machine has no room for, once in every worker.

    Raises:
        CapaError: it takes more memory than is available.
    """
    if workers is not None and workers.ray is not None:
        return
    count = (workers and workers.count) or 1
    needed, available = count * calibration_bytes(model.source.checkpoint.num_parameters), available_memory()
    if needed > available:
        what, remedy = f"{model.checkpoint}: the model takes", "end other programs, or use a machine with more"
        if count > 1:
            what, remedy = f"--workers {count}: so many copies of the model take", "use fewer"
        raise CapaError(f"{what} {needed / 1e9:.1f} GB in FP32, {available / 1e9:.1f} GB are free; {remedy}")


def exceeds_memory(what: str, needed: int, *, told: bool = False) -> bool:
    """Whether something takes more bytes than are available; if so, says that layers go one by one.

    Args:
        what: a sentence about it with `{}` in the place of the gigabytes.
        needed: bytes.
        told: whether the user knows already.
    """
    available = available_memory()
    if (exceeds := needed > available) and not told:
        takes = what.format(f"{needed / 1e9:.1f} GB")
        say(f"{'':<14}layer by layer: {takes}, {available / 1e9:.1f} GB are free; --in-memory tries all the same")
    return exceeds
