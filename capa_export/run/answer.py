"""Answers from a bundle alone."""

import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from secrets import randbits
from typing import Any

import numpy as np
from PIL import Image

from capa_export.base.errors import CapaError, first_line
from capa_export.base.progress import say, ticking
from capa_export.bundle.store import ONNX, Bundle
from capa_export.config.pixels import PixelBounds
from capa_export.config.provider import Provider
from capa_export.config.recipe import recipe_of
from capa_export.config.schedule import Prune
from capa_export.data.conversation import turns_of
from capa_export.data.picture_files import open_picture
from capa_export.model.generation import (
    Generation,
    GenerationOptions,
    eos_token_ids,
    read_generation,
)
from capa_export.model.prompt import Prompt, Prompter, Turn, Video
from capa_export.run.bundled import bundled_prompter, require_memory
from capa_export.run.decoding import TokenChooser, generate
from capa_export.run.onnx import OnnxModel
from capa_export.run.providers import require_one_runtime
from capa_export.run.runtime import PrefillRun, RuntimeModel

__all__ = ["VisionLanguageModel", "run_to_end", "runtime_errors"]


class VisionLanguageModel:
    """A bundle that is loaded once and asked as often as wished: graphs or engines, tokenizer and image processor.

    Args:
        bundle: with its `onnx` folder as it was built.
        engine: target whose engines are run on the GPU, in place of ONNX Runtime.
        provider: of ONNX Runtime.
        bounds: of pictures, in place of the bundle's.
        trust_remote_code: whether Python in the bundle may run, for its tokenizer and image processor.

    Raises:
        CapaError: a file of the bundle was changed, or its engines or this machine do not take it.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        engine: str | None = None,
        provider: Provider = "cpu",
        bounds: PixelBounds | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.bundle, self.bounds, self.trust_remote_code = bundle, bounds, trust_remote_code
        self.provider: Provider = provider
        require_one_runtime(engine, provider)
        self._built = None
        if engine is not None:
            from capa_export.run.engine import require_engines

            self._built = require_engines(bundle, engine)
        else:
            require_memory(bundle)
        bundle.verify("export", *([] if engine is None else [f"engine/{engine}"]))
        self.recipe = recipe_of(bundle.manifest, bundle.folder)
        self._text = bundle.folder / ONNX / "llm"

    @cached_property
    def prompter(self) -> Prompter:
        """The bundle's tokenizer, chat template and image processor."""
        return bundled_prompter(self.bundle, bounds=self.bounds, trust_remote_code=self.trust_remote_code)

    @cached_property
    def runtime(self) -> RuntimeModel[Any]:
        """The model in its runtime, loaded when the first prompt is there."""
        if self._built is None:
            return OnnxModel(self.bundle.folder / ONNX, provider=self.provider, exact=False)
        from capa_export.run.engine_model import EngineModel

        return EngineModel(self._built)

    def stream(
        self,
        question: str,
        images: "Sequence[str | Path | Image.Image]" = (),
        *,
        ratio: float | None = None,
        options: GenerationOptions = GenerationOptions(),  # noqa: B008 - frozen.
    ) -> Iterator[str]:
        """Answer a question about pictures; yields each new piece of the text.

        Args:
            question: asked behind the pictures.
            images: files, or pictures that are open.
            ratio: of visual tokens removed, in place of the bundle's.
            options: of generation, in place of what the bundle says.

        Raises:
            CapaError: a picture does not load, or the model or this machine does not take the prompt.
        """
        shown = [image if isinstance(image, Image.Image) else open_picture(Path(image)) for image in images]
        yield from filter(None, self.answers([[Turn("user", [*shown, question])]], ratio=ratio, options=options))

    def answer(
        self,
        question: str,
        images: "Sequence[str | Path | Image.Image]" = (),
        *,
        ratio: float | None = None,
        options: GenerationOptions = GenerationOptions(),  # noqa: B008 - frozen.
    ) -> str:
        """Answer a question about pictures, as `stream` does, in one piece."""
        return "".join(self.stream(question, images, ratio=ratio, options=options))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        folder: str | Path = ".",
        ratio: float | None = None,
        options: GenerationOptions = GenerationOptions(),  # noqa: B008 - frozen.
    ) -> str:
        """Go on with a conversation; returns the assistant's next turn.

        Args:
            messages: as chat templates take them; pictures by path, `file:` or `data:` URL.
            folder: that paths are relative to.
            ratio: of visual tokens removed, in place of the bundle's.
            options: of generation, in place of what the bundle says.

        Raises:
            CapaError: the messages are not in that format, or what they show does not load.
        """
        turns = turns_of(messages, Path(folder))
        return "".join(self.answers([turns], ratio=ratio, options=options))

    def answers(
        self,
        conversations: Sequence[Sequence[Turn]],
        *,
        ratio: float | None = None,
        options: GenerationOptions = GenerationOptions(),  # noqa: B008 - frozen.
    ) -> Generator[str, None, list[dict[str, Any]]]:
        """Generate as `generation_config.json` says; several conversations are prefilled in turn and decoded together.

        Args:
            conversations: turns of each, the user's last.
            ratio: of visual tokens removed, in place of the bundle's.
            options: of generation, in place of what the bundle says.

        Yields:
            Each new piece of the first answer's text.

        Returns:
            Every answer with what it took: `first_token_ms` and `answer_ms` from conversations whose pictures are
            open, on a model that is loaded; `processor_ms` for all of them, `vision_ms` and `prefill_ms` for each.

        Raises:
            CapaError: an option contradicts the bundle, or the model or this machine does not take a conversation.
        """
        prune = self.recipe.with_options(ratio=ratio).prune
        generation = read_generation(self._text).with_options(options)
        prompter = self.prompter
        began = time.perf_counter()
        prompts = [prompter.chat(turns) for turns in conversations]
        processed = time.perf_counter() - began
        for turns, prompt in zip(conversations, prompts, strict=True):
            if prompt.num_visual:
                say(_expected_tokens(turns, prompt, prune))
        limit = generation.longest(max(len(prompt.input_ids) for prompt in prompts))
        context = prompter.dims.decoder.longest
        limit = min(limit, *(context - prompt.next_position + 1 for prompt in prompts))
        model = self.runtime
        limit = self._limit(prompts, prune, limit, fixed=options.max_new_tokens is not None)
        stop = eos_token_ids(self._text)
        seed = randbits(32) if generation.do_sample and options.seed is None else options.seed
        choosers = _choosers(generation, prompts, stop, seed)
        if generation.ignored:
            say(f"{generation.source}: not supported, and without effect: {', '.join(generation.ignored)}")
        starts = [_prefill(model, prompt, prune) for prompt in prompts]
        first = processed + sum(facts["vision_ms"] + facts["prefill_ms"] for _, facts in starts) / 1e3

        answers = [_Answer(prompter) for _ in prompts]
        started = time.perf_counter()
        runs = [run for run, _ in starts]
        with runtime_errors(sum(prompt.num_visual for prompt in prompts)):
            for tokens in generate(model, prompts, runs, choosers, stop, limit):
                for said, token in zip(answers, tokens, strict=True):
                    if token is not None:
                        said.tokens.append(token)
                yield answers[0].news()
        seconds = time.perf_counter() - started
        yield answers[0].news(last=True)
        # Prefill gives the first token, and each step one more; the one that ends an answer is not among the tokens.
        steps = min(max(len(said.tokens) for said in answers), limit - 1)
        per_token = _milliseconds(seconds / steps) if steps else None
        return [
            {
                "answer": prompter.decode(said.tokens),
                "new_tokens": len(said.tokens),
                "generation": {
                    **generation.in_effect,
                    **({"seed": seed} if generation.do_sample else {}),
                    "max_new_tokens": limit,
                    "eos_token_id": stop,
                },
                "processor_ms": _milliseconds(processed),
                **facts,
                "first_token_ms": _milliseconds(first),
                "decode_ms_per_token": per_token,
                "answer_ms": _milliseconds(first + seconds),
                **model.device,
            }
            for said, (_, facts) in zip(answers, starts, strict=True)
        ]

    def _limit(self, prompts: Sequence[Prompt], prune: Prune, limit: int, *, fixed: bool) -> int:
        """The longest answer; on engines, which are found to take the prompts, theirs, if nobody fixed a longer one."""
        if self._built is None:
            return limit
        model: Any = self.runtime
        num_keep = [prune.num_keep(prompt.image_lengths) for prompt in prompts]
        limit = limit if fixed else min(limit, model.room(prompts, num_keep))
        model.check(prompts, num_keep, limit)
        return limit


def run_to_end(
    answers: Generator[str, None, list[dict[str, Any]]], stream: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """Run answers to their end; `stream` is told each new piece of the first."""
    while True:
        try:
            piece = next(answers)
        except StopIteration as end:
            return end.value
        if stream:
            stream(piece)


def _choosers(
    generation: Generation, prompts: Sequence[Prompt], stop: Sequence[int], seed: int | None
) -> list[TokenChooser]:
    """A token chooser an answer, with random numbers of its own: no sample depends on the other answers."""
    streams = np.random.SeedSequence(seed).spawn(len(prompts))
    return [
        TokenChooser(generation, prompt.input_ids.tolist(), stop, np.random.default_rng(stream))
        for prompt, stream in zip(prompts, streams, strict=True)
    ]


def _prefill(model: RuntimeModel[Any], prompt: Prompt, prune: Prune) -> tuple[PrefillRun[Any], dict[str, Any]]:
    """The prefill of one prompt, and what there is to say about it."""
    num_keep = prune.num_keep(prompt.image_lengths)
    with runtime_errors(prompt.num_visual):
        model.load(prompt)
        started = time.perf_counter()
        with ticking(f"vision tower, {prompt.num_visual} visual tokens"):
            embeds = model.embed(prompt)
        seen = time.perf_counter()
        with ticking(f"prefill, {len(prompt.input_ids)} tokens"):
            run = model.prefill(prompt, num_keep, embeds)
        filled = time.perf_counter()
    return run, {
        "prompt_tokens": len(prompt.input_ids),
        "stages": [
            {"layer": stage.layer, "where": stage.where, "kept": kept, "visual": prompt.num_visual}
            for stage, kept in zip(prune.schedule, num_keep, strict=True)
        ],
        "vision_ms": _milliseconds(seen - started),
        "prefill_ms": _milliseconds(filled - seen),
    }


def _expected_tokens(turns: Sequence[Turn], prompt: Prompt, prune: Prune) -> str:
    """A line that tells the cost of a prompt, picture by picture, before anything is spent on it."""
    shown = [part for turn in turns for part in turn.content if not isinstance(part, str)]
    of_each = [
        f"{tokens} ({'video' if isinstance(part, Video) else 'picture'} of {size[0]} x {size[1]})"
        for part, tokens in zip(shown, (picture.num_tokens for picture in prompt.pictures), strict=True)
        for size in [part.frames[0].size if isinstance(part, Video) else part.size]
    ]
    kept = ", ".join(
        f"{count} {stage.where}"
        for stage, count in zip(prune.schedule, prune.num_keep(prompt.image_lengths), strict=True)
    )
    return f"visual tokens: {' + '.join(of_each)}; keeping {kept}; {len(prompt.text_positions)} of text"


class _Answer:
    """The tokens of an answer, and how much of its text has been told."""

    def __init__(self, prompter: Prompter) -> None:
        self.prompter = prompter
        self.tokens: list[int] = []
        self.told = ""

    def news(self, *, last: bool = False) -> str:
        """The text to tell next; a character may need several tokens, and waits until it is whole."""
        text = self.prompter.decode(self.tokens)
        if text.endswith("\ufffd") and not last:
            return ""
        fresh, self.told = text[len(self.told) :], text
        return fresh


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)


@contextmanager
def runtime_errors(num_visual: int) -> Generator[None]:
    """Turn a failure of ONNX Runtime, or a lack of memory, into one line."""
    try:
        yield
    except Exception as error:  # ONNX Runtime's exceptions share no public base class.
        if not isinstance(error, MemoryError) and not type(error).__module__.startswith("onnxruntime"):
            raise
        problem = first_line(error)
        if wanted := re.search(r"Failed to allocate memory for requested buffer of size (\d+)", problem):
            problem = f"it needs {int(wanted[1]) / 1e9:.0f} GB at once, which this machine does not give"
        raise CapaError(
            f"ONNX Runtime failed on a prompt of {num_visual} visual tokens ({problem}); use a smaller picture"
        ) from error
