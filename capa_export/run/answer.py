"""Answers from a bundle alone."""

import re
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from secrets import randbits
from typing import TYPE_CHECKING, Any

import numpy as np

from capa_export.base.errors import CapaError
from capa_export.base.progress import say, ticking
from capa_export.bundle.store import Bundle
from capa_export.config.pixels import PixelBounds
from capa_export.config.recipe import recipe_of
from capa_export.config.schedule import Prune
from capa_export.job import ONNX
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
from capa_export.run.runtime import Model, PrefillRun

if TYPE_CHECKING:
    from capa_export.run.engine import BuiltEngines

__all__ = ["answer", "runtime_errors"]


def answer(
    bundle: Bundle,
    conversations: Sequence[Sequence[Turn]],
    *,
    ratio: float | None = None,
    options: GenerationOptions = GenerationOptions(),  # noqa: B008 - frozen.
    stream: Callable[[str], None] | None = None,
    engine: str | None = None,
    bounds: PixelBounds | None = None,
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Generate as `generation_config.json` says; several conversations are prefilled in turn and decoded side by side.

    Args:
        bundle: with its `onnx` folder as it was built.
        conversations: turns of each, the user's last.
        ratio: of visual tokens removed, in place of the bundle's.
        options: of generation, in place of what the bundle says.
        stream: told each new piece of the first answer.
        engine: target whose engines are run on the GPU, in place of ONNX Runtime on the CPU.
        bounds: of pictures, in place of the bundle's.
        trust_remote_code: whether Python in the bundle may run, for its tokenizer and image processor.

    Raises:
        CapaError: a file of the bundle was changed, an option contradicts it, the model does not take a conversation,
            or its engines or this machine do not.
    """
    built = None
    if engine is not None:
        from capa_export.run.engine import require_engines

        # Before anything that takes time.
        built = require_engines(bundle, engine)
    else:
        require_memory(bundle)
    bundle.verify("export", *([] if engine is None else [f"engine/{engine}"]))
    prune = recipe_of(bundle.manifest, bundle.folder).with_options(ratio=ratio).prune
    folder = bundle.folder / ONNX
    generation = read_generation(folder / "llm").with_options(options)
    prompter = bundled_prompter(bundle, bounds=bounds, trust_remote_code=trust_remote_code)
    prompts = [prompter.chat(turns) for turns in conversations]
    for turns, prompt in zip(conversations, prompts, strict=True):
        if prompt.num_visual:
            say(_expected(turns, prompt, prune))
    limit = generation.longest(max(len(prompt.input_ids) for prompt in prompts))
    if (context := prompter.dims.decoder.rope_limit) is not None:
        # From there on the rotary frequencies would be others.
        limit = min(limit, *(context - prompt.next_position + 1 for prompt in prompts))
    model: Model[Any] = OnnxModel(folder)
    if built is not None:
        model, limit = _engine_model(built, prompts, prune, limit, fixed=options.max_new_tokens is not None)
    stop = eos_token_ids(folder / "llm")
    seed = randbits(32) if generation.do_sample and options.seed is None else options.seed
    choosers = _choosers(generation, prompts, stop, seed)
    if generation.ignored:
        say(f"{generation.source}: not supported, and without effect: {', '.join(generation.ignored)}")
    starts = [_started(model, prompt, prune) for prompt in prompts]

    answers = [_Answer(prompter) for _ in prompts]
    started = time.perf_counter()
    runs = [run for run, _ in starts]
    with runtime_errors(sum(prompt.num_visual for prompt in prompts)):
        for tokens in generate(model, prompts, runs, choosers, stop, limit):
            for said, token in zip(answers, tokens, strict=True):
                if token is not None:
                    said.tokens.append(token)
            if stream:
                stream(answers[0].news())
    seconds = time.perf_counter() - started
    if stream:
        stream(answers[0].news(last=True))
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
            **facts,
            "decode_ms_per_token": per_token,
            **model.device,
        }
        for said, (_, facts) in zip(answers, starts, strict=True)
    ]


def _choosers(
    generation: Generation, prompts: Sequence[Prompt], stop: Sequence[int], seed: int | None
) -> list[TokenChooser]:
    """One for each answer, with random numbers of its own: what is sampled does not depend on the other answers."""
    streams = np.random.SeedSequence(seed).spawn(len(prompts))
    return [
        TokenChooser(generation, prompt.input_ids.tolist(), stop, np.random.default_rng(stream))
        for prompt, stream in zip(prompts, streams, strict=True)
    ]


def _engine_model(
    built: "BuiltEngines", prompts: Sequence[Prompt], prune: Prune, limit: int, *, fixed: bool
) -> tuple[Model[Any], int]:
    """The engines, found to take the prompts, and the longest answer; theirs, if nobody fixed a longer one."""
    from capa_export.run.engine_model import EngineModel

    model, num_keep = EngineModel(built), [prune.num_keep(prompt.image_lengths) for prompt in prompts]
    limit = limit if fixed else min(limit, model.room(prompts, num_keep))
    model.check(prompts, num_keep, limit)
    return model, limit


def _started(model: Model[Any], prompt: Prompt, prune: Prune) -> tuple[PrefillRun[Any], dict[str, Any]]:
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


def _expected(turns: Sequence[Turn], prompt: Prompt, prune: Prune) -> str:
    """What a prompt costs, picture by picture, before anything is spent on it."""
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
        """What to tell next; a character may need several tokens, and waits until it is whole."""
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
        problem = next(iter(str(error).splitlines()), type(error).__name__)
        if wanted := re.search(r"Failed to allocate memory for requested buffer of size (\d+)", problem):
            problem = f"it needs {int(wanted[1]) / 1e9:.0f} GB at once, which this machine does not give"
        raise CapaError(
            f"ONNX Runtime failed on a prompt of {num_visual} visual tokens ({problem}); use a smaller picture"
        ) from error
