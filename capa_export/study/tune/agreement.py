"""Measures how far a method is from dense along dense's own answer, in eager FP32."""

from collections.abc import Sequence

import torch

from capa_export.calibrate.sums import Calibration
from capa_export.config.schedule import Method
from capa_export.data.samples import Sample
from capa_export.model.agreement import Agreement, DenseAnswer, agreeing, answering
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerPlan
from capa_export.model.generation import eos_token_ids
from capa_export.model.model import Model
from capa_export.selectors.selector import SelectorChoice
from capa_export.study.tune.candidates import linear_layers

__all__ = ["Judge"]


class Judge:
    """Runs the model, dense and pruned, on samples."""

    def __init__(self, model: Model, calibration: Calibration, selectors: Sequence[str]) -> None:
        self.model, self.calibration = model, calibration
        self.eager = Eager(model.eager)
        self.stop = set(eos_token_ids(model.source.checkpoint.sidecars))
        # What all of them together read of a prompt.
        chosen = dict(enumerate(SelectorChoice(name) for name in selectors))
        self.every = EagerPlan(keep=dict.fromkeys(chosen, 0), selectors=chosen)

    @torch.inference_mode()
    def run_dense(self, sample: Sample) -> DenseAnswer:
        """Run dense; the end of its answer is a token too."""
        prompt = self.model.prompter.chat(sample.turns)
        return self.eager.run([answering(self.eager, self.model.family, prompt, self.every, self.stop)])[0]

    @torch.inference_mode()
    def agreement(self, method: Method, dense: DenseAnswer) -> Agreement:
        """Measure a method along dense's answer, whatever the method itself would say."""
        return self.eager.run([agreeing(self.eager, dense, self._plan(method, dense))])[0]

    def _plan(self, method: Method, dense: DenseAnswer) -> EagerPlan:
        min_keep = self.model.recipe.prune.min_keep_per_image
        prune = method.prune(min_keep)
        assert prune is not None
        kept = prune.num_keep(dense.prompt.image_lengths)
        return EagerPlan(
            keep={stage.layer: count for stage, count in zip(method.stages, kept, strict=True)},
            scales={
                layer: torch.from_numpy(self.calibration.layers[layer].alpha).float()
                for layer in linear_layers(method, self.model.recipe, self.calibration)
            },
            selectors=prune.selectors,
            min_keep_per_image=min_keep,
        )
