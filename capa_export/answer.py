"""Answers from a bundle alone."""

import re
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from capa_export.bundle import Bundle
from capa_export.bundled import bundled_prompter, require_memory
from capa_export.errors import CapaError
from capa_export.job import ONNX, eos_token_ids
from capa_export.prompt import Prompt, Prompter, Turn
from capa_export.recipe import Prune, recipe_of
from capa_export.runtime import Model, OnnxModel, PrefillRun, greedy

if TYPE_CHECKING:
    from capa_export.execution import BuiltEngines

__all__ = ["answer", "runtime_errors"]


def answer(
    bundle: Bundle,
    conversations: Sequence[Sequence[Turn]],
    *,
    ratio: float | None = None,
    max_new_tokens: int = 64,
    stream: Callable[[str], None] | None = None,
    engine: str | None = None,
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Generate greedily; several conversations are prefilled in turn and decoded side by side.

    Args:
        bundle: with its `onnx` folder as it was built.
        conversations: turns of each, the user's last.
        ratio: of visual tokens removed, in place of the bundle's.
        max_new_tokens: longest answer.
        stream: told each new piece of the first answer.
        engine: target whose engines are run on the GPU, in place of ONNX Runtime on the CPU.
        trust_remote_code: whether Python in the bundle may run, for its tokenizer and image processor.

    Raises:
        CapaError: a file of the bundle was changed, the model does not take a conversation, or its engines or this
            machine do not.
    """
    built = None
    if engine is not None:
        from capa_export.execution import require_engines

        # Before anything that takes time.
        built = require_engines(bundle, engine)
    else:
        require_memory(bundle)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    bundle.verify("export", *([] if engine is None else [f"engine/{engine}"]))
    prune = recipe_of(bundle.manifest, bundle.folder).with_options(ratio=ratio).prune
    folder = bundle.folder / ONNX
    prompter = bundled_prompter(bundle, trust_remote_code=trust_remote_code)
    prompts = [prompter.chat(turns) for turns in conversations]
    if (context := prompter.dims.decoder.rope_limit) is not None:
        # From there on the rotary frequencies would be others.
        max_new_tokens = min(max_new_tokens, *(context - prompt.next_position + 1 for prompt in prompts))
    model: Model[Any] = OnnxModel(folder) if built is None else _engine_model(built, prompts, prune, max_new_tokens)
    starts = [_started(model, prompt, prune) for prompt in prompts]

    answers = [_Answer(prompter) for _ in prompts]
    started = time.perf_counter()
    runs, stop = [run for run, _ in starts], eos_token_ids(folder / "llm")
    with runtime_errors(sum(prompt.num_visual for prompt in prompts)):
        for tokens in greedy(model, prompts, runs, stop, max_new_tokens):
            for said, token in zip(answers, tokens, strict=True):
                if token is not None:
                    said.tokens.append(token)
            if stream:
                stream(answers[0].news())
    seconds = time.perf_counter() - started
    if stream:
        stream(answers[0].news(last=True))
    # Prefill gives the first token, and each step one more; the one that ends an answer is not among the tokens.
    steps = min(max(len(said.tokens) for said in answers), max_new_tokens - 1)
    per_token = _milliseconds(seconds / steps) if steps else None
    return [
        {
            "answer": prompter.decode(said.tokens),
            "new_tokens": len(said.tokens),
            **facts,
            "decode_ms_per_token": per_token,
            **model.device,
        }
        for said, (_, facts) in zip(answers, starts, strict=True)
    ]


def _engine_model(built: "BuiltEngines", prompts: Sequence[Prompt], prune: Prune, max_new_tokens: int) -> Model[Any]:
    from capa_export.engine_runtime import EngineModel

    model = EngineModel(built)
    model.check(prompts, [prune.num_keep(prompt.image_lengths) for prompt in prompts], max_new_tokens)
    return model


def _started(model: Model[Any], prompt: Prompt, prune: Prune) -> tuple[PrefillRun[Any], dict[str, Any]]:
    """The prefill of one prompt, and what there is to say about it."""
    num_keep = prune.num_keep(prompt.image_lengths)
    with runtime_errors(prompt.num_visual):
        model.load(prompt)
        started = time.perf_counter()
        embeds = model.embed(prompt)
        seen = time.perf_counter()
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
