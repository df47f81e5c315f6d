"""The stage that validates a bundle: against the eager model, or against golden samples that it left behind."""

from dataclasses import replace

from capa_export.base.code import versions
from capa_export.base.progress import say
from capa_export.bundle.store import PARITY, REPORT, Bundle, run_stage
from capa_export.config.gates import with_gates
from capa_export.config.options import ValidationOptions
from capa_export.model.model import Model
from capa_export.parity.against_eager import AgainstEager
from capa_export.parity.against_golden import AgainstGolden
from capa_export.parity.golden import GOLDEN, store_golden
from capa_export.report.schema import ParityReport, read_parity
from capa_export.run.providers import require_provider

__all__ = ["validate"]


def validate(model: Model, bundle: Bundle, options: ValidationOptions) -> ParityReport:
    """Hold a bundle against the eager model, or against its stored results on the golden samples.

    Args:
        bundle: a bundle whose export is done.
        model: the model it was made from; with golden samples it is not opened, and its recipe alone counts.
        options: the user's wishes.

    Returns:
        The report that `parity.json` holds; the caller turns `passed` into an exit code.

    Raises:
        CapaError: a file of the bundle was changed, or the checkpoint is another.
    """
    require_provider(options.provider)
    bundle = replace(bundle, read_all=True)
    built = None
    if options.engine is not None:
        from capa_export.run.engine import require_engines

        built = require_engines(bundle, options.engine)
        bundle.verify(f"engine/{options.engine}")
    bundle.verify("export", *(["calibrate"] if "calibrate" in bundle.manifest["stages"] else []))
    recipe = model.recipe.model_copy(update={"parity": with_gates(model.recipe.parity, options.gate)})
    validation = (AgainstGolden if options.golden else AgainstEager)(model, bundle, recipe, options, built)
    key = [
        versions("onnxruntime", "torch", "transformers", code_of=[type(validation).__module__]),
        bundle.digest("export"),
        recipe.model_dump(mode="json"),
        [options.strict, options.seed, options.bisect, options.accept_method_loss, options.note],
        validation.key(),
        *([] if options.provider == "cpu" else [options.provider]),
        *([] if built is None else [bundle.digest(f"engine/{options.engine}"), built.gpu.name]),
    ]
    run_stage(bundle, "validate", key, [PARITY, REPORT], validation.run)
    parity = read_parity(bundle.folder / PARITY)
    if options.store_golden and parity.passed:
        store_golden(model, bundle, recipe, options, parity)
    elif options.store_golden:
        say(f"{GOLDEN:<14}not stored: they would vouch for a bundle that failed")
    return parity
