"""What methods are worth on a checkpoint: measured on questions, or searched for under a budget."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from capa_export.api.bundle import AnyPath, path_of
from capa_export.api.models import find_model
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.progress import Report, silent
from capa_export.base.workers import Workers
from capa_export.bundle import store
from capa_export.config.options import BuildOptions

if TYPE_CHECKING:
    from capa_export.study.evaluate.schema import Evaluation
    from capa_export.study.tune.schema import Tuning

__all__ = ["evaluate", "tune"]


def evaluate(
    checkpoint: str | None = None,
    *,
    data: AnyPath,
    out: AnyPath,
    recipe: str | None = None,
    revision: str | None = None,
    methods: Sequence[str] = (),
    benchmark: str | None = None,
    split: str | None = None,
    instruction: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 32,
    images: AnyPath | None = None,
    samples: int | None = None,
    calibration: AnyPath | None = None,
    quantize: str | None = None,
    quantize_head: str | None = None,
    quantize_vision: str | None = None,
    auto_precision: bool = False,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    workers: int | None = None,
    ray: str | None = None,
    trust_remote_code: bool = False,
    progress: Report = silent,
) -> "Evaluation":
    """Ask a checkpoint's model the same questions by every method, and compare the answers with the dense model's.

    Args:
        checkpoint: local folder or hub id; None for the recipe's own.
        data: questions with pictures, a .jsonl file or a dataset's folder; or pictures alone.
        out: folder that takes the answers and `evaluation.json`; what it holds already is not asked again.
        recipe: a name that `capa-export models` lists, or the path of a .toml; None for the checkpoint's.
        revision: of a hub id.
        methods: as `capa@2:0.75` or `divprune:0.9/full`; the recipe's own where there is none.
        benchmark: how rows are read and scored, as `vqav2`; None to tell by the columns.
        split: part of a dataset that has several.
        instruction: said behind every question; None for the benchmark's own.
        limit: rows, drawn at random; None for all.
        seed: of the rows drawn, and of the intervals.
        max_new_tokens: longest answer.
        images: pictures and questions of the calibration; the recipe's scenes where there are none.
        samples: prompts of the calibration, in place of the recipe's number.
        calibration: a finished one, a file or a bundle, in place of a run.
        quantize: what the weights of the decoder's layers are to be, as `build` takes it; dense is then the dense model
            with these weights.
        quantize_head: what the weight of the LM head is to be: `none`, `int8`, `int4[:GROUP]` or `fp8`.
        quantize_vision: what the weights of the vision tower's blocks are to be: `none`, `int8` or `fp8`.
        auto_precision: whether the fewest decoder layers stay as they are that bring what `quantize` costs within the
            recipe's budget.
        min_pixels: least area that a picture is resized to.
        max_pixels: largest area.
        workers: processes that share the questions.
        ray: address of a cluster that does.
        trust_remote_code: whether the checkpoint's own Python may run.
        progress: told how far the work is.

    Returns:
        Every method's scores, dense first. Rows that cannot be asked raise nothing: `skipped` lists them.

    Raises:
        CapaError: a method does not fit the model, or the model this machine; there is nothing to ask; or `out` is of
            another model.
    """
    from capa_export.data.questions import questions_from
    from capa_export.study.evaluate.models import eager_model, parse_methods, product_of_methods
    from capa_export.study.evaluate.stage import evaluate as ask

    model = find_model(
        *(checkpoint, recipe),
        revision=revision,
        quantize=quantize,
        quantize_head=quantize_head,
        quantize_vision=quantize_vision,
        auto_precision=auto_precision,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    parsed = parse_methods(methods or product_of_methods(model.recipe))
    given = {"--calibration": calibration, "--images": images, "--samples": samples}
    unread = next((option for option, value in given.items() if value is not None), None)
    samples_decide = model.recipe.decided_by_samples or any(method.ffn != "full" for method in parsed.values())
    if unread and not samples_decide:
        raise CapaError(f"{unread}: no method replaces visual FFNs; name one with /scale, or drop it", ExitCode.USAGE)
    questions = questions_from(
        Path(data),
        benchmark=benchmark,
        split=split,
        instruction=instruction,
        question=model.recipe.calibration.prompt,
        limit=limit,
        seed=seed,
    )
    options = BuildOptions(
        images=path_of(images),
        samples=samples,
        calibration=path_of(calibration),
        workers=Workers(count=workers, ray=ray),
    )
    evaluated = eager_model(model, store.Bundle(Path(out) / "calibration"), options, parsed, max_new_tokens)
    return ask(evaluated, questions, Path(out), workers=options.workers, seed=seed, report=progress)


def tune(
    checkpoint: str | None = None,
    *,
    budget: float,
    out: AnyPath,
    recipe: str | None = None,
    revision: str | None = None,
    images: AnyPath | None = None,
    samples: int = 128,
    calibration: AnyPath | None = None,
    quantize: str | None = None,
    quantize_head: str | None = None,
    quantize_vision: str | None = None,
    auto_precision: bool = False,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
    command: Sequence[str] = (),
    progress: Report = silent,
) -> "Tuning":
    """Find the schedule that agrees best with the dense model within a budget of FLOPs, and write it as a recipe.

    Args:
        checkpoint: local folder or hub id; None for the recipe's own.
        budget: FLOPs of the decoder's prefill, text included: below 1, a fraction of dense; or those of a prompt.
        out: the recipe that is written, a .toml file.
        recipe: a name that `capa-export models` lists, or the path of a .toml; None for the checkpoint's.
        revision: of a hub id.
        images: pictures and questions; the recipe's scenes where there are none.
        samples: prompts to tune on.
        calibration: a finished one, a file or a bundle, in place of a run.
        quantize: what the weights of the decoder's layers are to be, as `build` takes it; schedules are held against
            the dense model with these weights, and the recipe that is written says so.
        quantize_head: what the weight of the LM head is to be: `none`, `int8`, `int4[:GROUP]` or `fp8`.
        quantize_vision: what the weights of the vision tower's blocks are to be: `none`, `int8` or `fp8`.
        auto_precision: whether the fewest decoder layers stay as they are that bring what `quantize` costs within the
            recipe's budget.
        min_pixels: least area that a picture is resized to.
        max_pixels: largest area.
        trust_remote_code: whether the checkpoint's own Python may run.
        command: a command line, for the recipe's first line.
        progress: told how far the work is.

    Returns:
        What was found, and what the recipe's own schedule is worth beside it.

    Raises:
        CapaError: no schedule meets the budget, there are too few samples, this machine has no room for the model, or
            the recipe cannot be written.
    """
    if Path(out).suffix != ".toml":
        raise CapaError(f"{out}: a recipe is a .toml file", ExitCode.USAGE)
    from tempfile import TemporaryDirectory

    from capa_export.study.tune.recipe_file import write_recipe
    from capa_export.study.tune.stage import tune as find

    model = find_model(
        *(checkpoint, recipe),
        revision=revision,
        quantize=quantize,
        quantize_head=quantize_head,
        quantize_vision=quantize_vision,
        auto_precision=auto_precision,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    options = BuildOptions(images=path_of(images), samples=samples, calibration=path_of(calibration))
    with TemporaryDirectory() as scratch:
        tuned, found = find(model, store.Bundle(Path(scratch)), options, budget)
    best = next(row for row in found.finalists if row.method == found.chosen)
    figures = f"{best.flops:.3f} of dense's FLOPs, KL {best.kl:.3g} nats, top-1 {best.top1:.3f}"
    comment = f"Made by capa-export {shlex.join(command)}\n{found.chosen}: {figures}\n{found.verdict}"
    write_recipe(Path(out), tuned.for_any_target(), comment)
    return found
