"""Whether this machine has room for the eager model, which is held in FP32."""

from capa_export.base.errors import CapaError
from capa_export.base.machine import available_memory
from capa_export.base.progress import say
from capa_export.job import Job
from capa_export.plan.plan import calibration_bytes

__all__ = ["exceeds_memory", "require_eager_memory"]


def require_eager_memory(job: Job) -> None:
    """Refuse, before it is loaded, a model that this machine has no room for, once in every worker.

    Raises:
        CapaError: it takes more memory than is available.
    """
    if job.workers.ray is not None:
        return
    count = job.workers.count or 1
    needed, available = count * calibration_bytes(job.source.checkpoint.num_parameters), available_memory()
    if needed > available:
        what, remedy = f"{job.checkpoint}: the model takes", "end other programs, or use a machine with more"
        if count > 1:
            what, remedy = f"--workers {count}: so many copies of the model take", "use fewer"
        raise CapaError(f"{what} {needed / 1e9:.1f} GB in FP32, {available / 1e9:.1f} GB are free; {remedy}")


def exceeds_memory(job: Job) -> bool:
    """Whether a model in this process does not fit, which is then said."""
    needed, available = calibration_bytes(job.source.checkpoint.num_parameters), available_memory()
    if exceeds := needed > available:
        say(
            f"{'':<14}layer by layer: the model takes {needed / 1e9:.1f} GB in FP32, "
            f"{available / 1e9:.1f} GB are free; --in-memory tries all the same"
        )
    return exceeds
