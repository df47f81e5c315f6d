"""The stage that validates a bundle: against the eager model, or against golden samples that it left behind."""

from dataclasses import replace

from capa_export.base.code import versions
from capa_export.base.progress import say
from capa_export.config.gates import with_gates
from capa_export.job import PARITY, REPORT, Job, run_stage
from capa_export.parity.against_eager import AgainstEager
from capa_export.parity.against_golden import GOLDEN, AgainstGolden, store_golden
from capa_export.parity.validation import Wanted
from capa_export.report.schema import ParityReport, read_parity

__all__ = ["validate"]


def validate(job: Job, wanted: Wanted | None = None) -> ParityReport:
    """Hold the bundle against the eager model, or against what that made of the golden samples.

    Returns:
        What is also in `parity.json`; the caller turns `passed` into an exit code.

    Raises:
        CapaError: a file of the bundle was changed, or the checkpoint is another.
    """
    wanted = wanted or Wanted()
    bundle = replace(job.bundle, read_all=True)
    built = None
    if wanted.engine is not None:
        from capa_export.run.engine import require_engines

        built = require_engines(bundle, wanted.engine)
        bundle.verify(f"engine/{wanted.engine}")
    bundle.verify("export", *(["calibrate"] if "calibrate" in bundle.manifest["stages"] else []))
    recipe = job.recipe.model_copy(update={"parity": with_gates(job.recipe.parity, wanted.gate)})
    validation = (AgainstGolden if wanted.golden else AgainstEager)(job, recipe, wanted, built)
    key = [
        versions("onnxruntime", "torch", "transformers", code_of=[type(validation).__module__]),
        bundle.digest("export"),
        recipe.model_dump(mode="json"),
        [wanted.strict, wanted.seed, wanted.bisect],
        validation.key(),
        *([] if built is None else [bundle.digest(f"engine/{wanted.engine}"), built.gpu.name]),
    ]
    run_stage(bundle, "validate", key, [PARITY, REPORT], validation.run)
    parity = read_parity(bundle.folder / PARITY)
    if wanted.store_golden and parity.passed:
        store_golden(job, recipe, wanted, parity)
    elif wanted.store_golden:
        say(f"{GOLDEN:<14}not stored: they would vouch for a bundle that failed")
    return parity
