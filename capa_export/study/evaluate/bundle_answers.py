"""Answers of a bundle's graphs on ONNX Runtime, at any ratio of the schedule that they were exported with."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from capa_export.base.errors import CapaError
from capa_export.base.statistics import kl_divergence
from capa_export.bundle.store import ONNX, Bundle, digest_of
from capa_export.config.pixels import PixelBounds
from capa_export.config.provider import Provider
from capa_export.config.recipe import recipe_of
from capa_export.config.schedule import Method
from capa_export.data.questions import Question
from capa_export.model.generation import eos_token_ids
from capa_export.model.prompt import Prompt
from capa_export.run.answer import runtime_errors
from capa_export.run.bundled import bundled_prompter
from capa_export.run.decoding import greedy
from capa_export.run.onnx import OnnxModel
from capa_export.study.evaluate.answers import Answer, Answerer, answerer, max_answer_tokens

__all__ = ["BundleAnswers", "digest_to_ask"]


@dataclass(frozen=True, kw_only=True)
class BundleAnswers:
    """A picklable recipe of an answerer: a call opens the graphs in the process that it is made in."""

    folder: Path
    digest: str
    """Digest of the bundle, which another machine of a cluster might hold another of."""
    methods: Mapping[str, Method]
    max_new_tokens: int
    bounds: PixelBounds | None = None
    """Bounds of pictures, in place of the bundle's."""
    provider: Provider = "cpu"
    """Of ONNX Runtime."""
    trust_remote_code: bool = False

    def __call__(self) -> Answerer:
        return answerer(_OpenBundle(self).answers)


class _OpenBundle:
    def __init__(self, given: BundleAnswers) -> None:
        self.given = given
        bundle = Bundle.open(given.folder)
        bundle.verify("export")
        if digest_to_ask(bundle) != given.digest:
            raise CapaError(
                f"{given.folder}: on {platform.node()} it holds another bundle than where the evaluation was started; "
                "copy that there"
            )
        self.prune = recipe_of(bundle.manifest, bundle.folder).prune
        self.prompter = bundled_prompter(bundle, bounds=given.bounds, trust_remote_code=given.trust_remote_code)
        self.model = OnnxModel(given.folder / ONNX, threads=_threads(), provider=given.provider, exact=False)
        self.stop = eos_token_ids(given.folder / ONNX / "llm")

    def answers(self, question: Question, wanted: Sequence[str]) -> list[Answer]:
        prompt = self.prompter.chat(question.open())
        keeps = {name: self._keep(self.given.methods[name], prompt) for name in wanted}
        with runtime_errors(prompt.num_visual):
            self.model.load(prompt)
            embeds = self.model.embed(prompt)
            everything = [prompt.num_visual] * len(self.prune.schedule)
            dense = self.model.prefill(prompt, everything, embeds)
            answers: list[Answer] = []
            for name in wanted:
                run = dense if keeps[name] == everything else self.model.prefill(prompt, keeps[name], embeds)
                limit = max_answer_tokens(self.prompter, prompt, self.given.max_new_tokens)
                steps = greedy(self.model, [prompt], [run], self.stop, limit)
                tokens = [token for step in steps for token in step if token is not None]
                text = self.prompter.decode(tokens).strip()
                kl = kl_divergence(dense.logits, run.logits)
                answers.append(Answer(name, text, len(tokens), keeps[name][-1], prompt.num_visual, kl))
        return answers

    def _keep(self, method: Method, prompt: Prompt) -> list[int]:
        """Visual tokens after each stage; dense keeps them all."""
        prune = method.prune(self.prune.min_keep_per_image)
        if prune is None:
            return [prompt.num_visual] * len(self.prune.schedule)
        return prune.num_keep(prompt.image_lengths)


def digest_to_ask(bundle: Bundle) -> str:
    """Digest of all of a bundle that answers depend on."""
    return digest_of([bundle.manifest.get("recipe"), bundle.digest("export")])


def _threads() -> int:
    """The first number of OMP_NUM_THREADS, which has one for each level of nesting; 0, for the default, without one."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0
