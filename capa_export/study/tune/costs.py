"""The costs of methods on the prompts at hand, in FLOPs of the decoder's prefill, text included."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from capa_export.base.dims import DecoderDims
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.progress import tracked
from capa_export.config.schedule import Method, Stage
from capa_export.data.samples import Samples
from capa_export.model.model import Model
from capa_export.plan.flops import PrefillFlops, flops

__all__ = ["Costs", "PromptShape", "prompt_shapes"]


class PromptShape(NamedTuple):
    """All that a prompt's cost depends on."""

    images: tuple[int, ...]
    """Visual tokens of each picture."""
    text: int
    """All other tokens."""


def prompt_shapes(model: Model, samples: Samples) -> Iterator[PromptShape]:
    """The shapes of the prompts that the samples make."""
    for sample in tracked(samples, "tune: prompts", samples.count, model.report):
        prompt = model.prompter.chat(sample.turns)
        yield PromptShape(tuple(prompt.image_lengths), len(prompt.input_ids) - prompt.num_visual)


class Costs:
    """FLOPs of methods, summed over some prompts."""

    def __init__(self, dims: DecoderDims, min_keep_per_image: int, shapes: Iterable[PromptShape]) -> None:
        self.dims, self.min_keep_per_image = dims, min_keep_per_image
        self.shapes = Counter(shapes)
        self.dense = self._sum(lambda shape: self._counted(shape, (), (), ()).dense.total)
        text = self._sum(lambda shape: self._counted(PromptShape((), shape.text), (), (), ()).dense.total)
        self.text = text / self.dense
        """Share of dense's FLOPs that is left where no visual token is."""

    def share(self, method: Method, linear: Sequence[int]) -> float:
        """A method's share of dense's FLOPs, where a scale stands for the visual FFNs of some layers.

        Raises:
            CapaError: a ratio leaves fewer tokens than a selector can choose.
        """
        prune = method.prune(self.min_keep_per_image)
        assert prune is not None

        def total(shape: PromptShape) -> int:
            return self._counted(shape, method.stages, prune.num_keep(shape.images), linear).capa.total

        return self._sum(total) / self.dense

    def share_of(self, budget: float) -> float:
        """A budget, given as a fraction of dense below 1 or as FLOPs a prompt, as a fraction.

        Raises:
            CapaError: it is no budget, dense itself meets it, or nothing can.
        """
        if not 0 < budget < float("inf"):
            raise CapaError(
                f"--budget {budget:g}: must be a fraction of dense, as 0.25 or 25%, or FLOPs a prompt, as 2.5e12",
                ExitCode.USAGE,
            )
        mean = self.dense / self.shapes.total()
        share = budget if budget < 1 else budget / mean
        if share >= 1:
            raise CapaError(
                f"--budget {budget:g}: dense takes {mean:.3g} FLOPs a prompt, which is no more; nothing is to be saved",
                ExitCode.USAGE,
            )
        if share <= self.text:
            raise CapaError(
                f"--budget {budget:g}: text alone takes {self.text * mean:.3g} FLOPs a prompt, {self.text:.4g} of "
                "dense, and no selector saves that; give more",
                ExitCode.USAGE,
            )
        return share

    def _sum(self, flops_of: Callable[[PromptShape], int]) -> int:
        return sum(times * flops_of(shape) for shape, times in self.shapes.items())

    def _counted(
        self, shape: PromptShape, stages: Sequence[Stage], kept: Sequence[int], linear: Sequence[int]
    ) -> PrefillFlops:
        return flops(
            self.dims,
            num_visual=sum(shape.images),
            num_text=shape.text,
            schedule=[(stage.layer, count) for stage, count in zip(stages, kept, strict=True)],
            linear_layers=linear,
            selectors={stage.layer: stage.chosen for stage in stages},
        )
