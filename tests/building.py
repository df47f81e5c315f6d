"""A build whose stages tests run one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from capa_export import pipeline
from capa_export.base.progress import Report, silent
from capa_export.bundle.store import Bundle
from capa_export.calibrate.stage import calibrate
from capa_export.calibrate.sums import Calibration
from capa_export.config.options import BuildOptions, ValidationOptions
from capa_export.config.recipe import Recipe
from capa_export.config.target import Target, load_target
from capa_export.export.stage import export
from capa_export.model.generation import GenerationOptions
from capa_export.model.model import Model, recorded_model
from capa_export.model.prompt import Turn
from capa_export.parity.stage import validate
from capa_export.report.schema import ParityReport
from capa_export.run.answer import VisionLanguageModel, run_to_end

__all__ = ["Building", "answer"]


@dataclass(kw_only=True)
class Building:
    """A recipe, a checkpoint, a bundle, and options by their names in `BuildOptions`."""

    recipe: Recipe
    bundle: Bundle
    checkpoint: str
    trust_remote_code: bool = False
    report: Report = silent
    options: BuildOptions = field(default_factory=BuildOptions)

    @classmethod
    def of(cls, recipe: Recipe, bundle: Bundle, checkpoint: str | Path, **options: Any) -> "Building":
        own = {name: options.pop(name) for name in ("trust_remote_code", "report") if name in options}
        return cls(recipe=recipe, bundle=bundle, checkpoint=str(checkpoint), options=BuildOptions(**options), **own)

    @classmethod
    def recorded(cls, bundle: Bundle, checkpoint: str | Path | None = None, **options: Any) -> "Building":
        """The build that made a bundle, by its manifest."""
        bounds = options.pop("bounds", None)
        model = recorded_model(bundle, checkpoint=checkpoint and str(checkpoint), bounds=bounds)
        return cls.of(model.recipe, bundle, model.checkpoint, **options)

    def again(self, **changes: Any) -> "Building":
        """The same with changes, and with nothing opened yet."""
        about = {name: changes.pop(name, getattr(self, name)) for name in ("recipe", "bundle", "checkpoint")}
        options = {entry.name: getattr(self.options, entry.name) for entry in fields(self.options)}
        others = {"trust_remote_code": self.trust_remote_code, "report": self.report}
        return Building.of(**about, **{**options, **others, **changes})

    @cached_property
    def model(self) -> Model:
        return Model(
            recipe=self.recipe,
            checkpoint=self.checkpoint,
            trust_remote_code=self.trust_remote_code,
            report=self.report,
        )

    def calibrate(self) -> Calibration:
        return calibrate(self.model, self.bundle, self.options)

    def export(self) -> None:
        export(self.model, self.bundle, self.options)

    def validate(self, **options: Any) -> ParityReport:
        return validate(self.model, self.bundle, self._validation(**options))

    def build(self, target: Target | None = None, **validation: Any) -> ParityReport:
        target = target or load_target("onnx")
        return pipeline.build(self.model, self.bundle, target, self.options, self._validation(**validation))

    def _validation(self, **options: Any) -> ValidationOptions:
        own = {"images": self.options.images, "layer_by_layer": self.options.layer_by_layer}
        return ValidationOptions(**{**own, **options})


def answer(
    bundle: Bundle,
    conversations: Sequence[Sequence[Turn]],
    *,
    options: GenerationOptions = GenerationOptions(),  # noqa: B008 - frozen.
    stream: Callable[[str], None] | None = None,
    engine: str | None = None,
) -> list[dict[str, Any]]:
    """Load a bundle and ask it once."""
    return run_to_end(VisionLanguageModel(bundle, engine=engine).answers(conversations, options=options), stream)
