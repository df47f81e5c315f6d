"""What is evaluated: an eager model or a bundle, the methods that it can do, and what its answers depend on."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import capa_export
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.progress import silent
from capa_export.base.workers import Workers
from capa_export.bundle.store import Bundle, digest_of, file_digest
from capa_export.calibrate.sums import Calibration
from capa_export.config.pixels import PixelBounds
from capa_export.config.recipe import Recipe, ranges, recipe_of
from capa_export.config.schedule import Method, parse_method, schedule_text, stage_text
from capa_export.job import Job, tool_versions
from capa_export.pipeline import calibrate, note_digests
from capa_export.plan.eager_memory import require_eager_memory
from capa_export.run.bundled import require_memory
from capa_export.selectors.selector import load_selector
from capa_export.study.evaluate.answers import DENSE, Ask

__all__ = ["Subject", "bundle_subject", "check_fits", "code_files", "eager_subject", "methods_from", "product"]

_PACKAGE = Path(capa_export.__file__).parent
_CODE = (
    "bundled.py",
    "calibrate.py",
    "calibration.py",
    "chat_template.py",
    "checkpoint.py",
    "conversation.py",
    "decoding.py",
    "dims.py",
    "eager.py",
    "eager_attention.py",
    "evaluate/answers.py",
    "evaluate/bundle_answers.py",
    "evaluate/eager_answers.py",
    "export.py",
    "families",
    "generation.py",
    "in_place.py",
    "job.py",
    "lockstep.py",
    "methods.py",
    "onnx_model.py",
    "parity/statistics.py",
    "picture_files.py",
    "picture_sizes.py",
    "picture_sources.py",
    "pixels.py",
    "processors",
    "prompt.py",
    "recipe.py",
    "runtime.py",
    "selectors",
    "sliced.py",
    "streamed.py",
    "target.py",
    "tiled.py",
    "widen.py",
)
"""What decides how a question is answered: where one of these changes, all is asked again."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with what is done to it."""

    source: str
    """Where it is from, for people."""
    model: str
    """Digest of all files that its answers depend on."""
    runs: Literal["eager fp32", "onnx"]
    keys: Mapping[str, str]
    """Method -> digest of what it does, dense first."""
    prepare: Callable[[], Ask]
    """Opens the model in whatever process."""
    max_new_tokens: int
    notes: tuple[str, ...] = ()


def methods_from(texts: Sequence[str]) -> dict[str, Method]:
    """By name, dense first whether it was named or not.

    Raises:
        CapaError: one reads otherwise than a method does, or there is none.
    """
    methods = {text: parse_method(text) for text in texts if text != DENSE}
    if not methods and DENSE not in texts:
        raise CapaError("name what to evaluate: --method capa@2:0.75, as often as there are methods", ExitCode.USAGE)
    return {DENSE: parse_method(DENSE), **methods}


def product(
    recipe: Recipe, selectors: Sequence[str], layers: Sequence[int], ratios: Sequence[float], ffns: Sequence[str]
) -> list[str]:
    """Every selector at every layer and ratio, with every treatment of the visual FFNs; the recipe's own where empty.

    Raises:
        CapaError: the recipe's own is a schedule of several stages, of which no part can be changed alone.
    """
    own, *later = recipe.prune.schedule
    if not (selectors or layers or ratios):
        texts = [schedule_text(recipe.prune.schedule)]
    elif later:
        raise CapaError(
            f"{recipe.name}: has a schedule of {1 + len(later)} stages; name methods with --method instead of "
            "--selector, --layer and --ratio",
            ExitCode.USAGE,
        )
    else:
        names = list(selectors) or [own.selector]
        if layers and all(load_selector(name).place == "input" for name in names):
            raise CapaError(f"--layer: {', '.join(names)} acts before the decoder and takes none", ExitCode.USAGE)
        texts = list[str]()
        for name in names:
            selector = load_selector(name)
            usual = own.layer if selector.layer is None or name == own.selector else selector.layer
            places = [-1] if selector.place == "input" else layers or [usual]
            options = own.options if name == own.selector else {}
            for layer, ratio in itertools.product(places, ratios or [own.ratio]):
                changes = {"selector": name, "layer": layer, "ratio": ratio, "options": options}
                texts.append(stage_text(own.model_copy(update=changes)))
    return [f"{text}/{ffn}" if ffn else text for text in texts for ffn in ffns or [""]]


def eager_subject(job: Job, methods: Mapping[str, Method], max_new_tokens: int) -> Subject:
    """The Hugging Face model; where a method replaces visual FFNs, it is calibrated into the job's bundle first.

    Raises:
        CapaError: a method does not fit the model, or the model this machine's memory, before anything is run.
    """
    from capa_export.study.evaluate.eager_answers import EagerAnswers

    for method in methods.values():
        check_fits(job, method)
    require_eager_memory(job)
    job.check_files()
    calibration = calibrate(job) if any(method.ffn != "full" for method in methods.values()) else None
    note_digests(job)
    # Each worker opens it again.
    opened = job if job.workers.here else replace(job, checkpoint=job.checkpoint_source, report=silent)

    def key(method: Method) -> str:
        prune = method.prune(job.recipe.prune.min_keep_per_image)
        ffn: list[Any] = [method.ffn]
        if calibration is not None and method.ffn != "full":
            ffn += [method.eta or job.recipe.ffn.eta, calibration.digest()]
        return _key(prune and prune.model_dump(), ffn, max_new_tokens, job.recipe.pictures)

    return Subject(
        source=job.checkpoint_source,
        model=digest_of([job.checkpoint_digest, job.sidecar_digests]),
        runs="eager fp32",
        keys={name: key(method) for name, method in methods.items()},
        prepare=EagerAnswers(job=opened, methods=methods, calibration=calibration, max_new_tokens=max_new_tokens),
        max_new_tokens=max_new_tokens,
        notes=_of_ffns(job, calibration),
    )


def _of_ffns(job: Job, calibration: Calibration | None) -> tuple[str, ...]:
    if calibration is None:
        return ()
    eta = job.recipe.ffn.eta
    return (f"visual FFNs are linear (cosine > {eta:g}) in layers {ranges(calibration.linear_layers(eta))}",)


def check_fits(job: Job, method: Method) -> None:
    """Refuse a method that the job's model cannot do.

    Raises:
        CapaError: a layer that the decoder does not have, or a selector that the family does not offer.
    """
    prune = method.prune(job.recipe.prune.min_keep_per_image)
    if prune is None:
        return
    asked = copy(job)
    asked.recipe = job.recipe.model_copy(update={"prune": prune})
    try:
        asked.check_layers()
    except CapaError as error:
        raise CapaError(f"method {method.name}: {error}", ExitCode.USAGE) from error


def bundle_subject(
    bundle: Bundle,
    methods: Mapping[str, Method],
    max_new_tokens: int,
    *,
    bounds: PixelBounds | None = None,
    workers: Workers | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """A bundle's graphs, which know one schedule; every ratio of it is theirs.

    Raises:
        CapaError: a method is none of them, a file of the bundle was changed, or this machine's memory is too small.
    """
    from capa_export.study.evaluate.bundle_answers import BundleAnswers

    if workers is None or workers.ray is None:
        require_memory(bundle, copies=(workers and workers.count) or 1)

    bundle.verify("export")
    recipe = recipe_of(bundle.manifest, bundle.folder)
    bounds = recipe.pictures if bounds is None else bounds
    linear = bundle.stage("export")["result"]["linear_layers"]
    own = [(stage.layer, stage.chosen) for stage in recipe.prune.schedule]
    for method in methods.values():
        if method.name == DENSE:
            continue
        if [(stage.layer, stage.chosen) for stage in method.stages] != own:
            written = "+".join(stage_text(stage, "RATIO") for stage in recipe.prune.schedule)
            raise CapaError(
                f"method {method.name}: the graphs of {bundle.folder} do {written} at any ratio, and no other; "
                "evaluate the model itself, with --model",
                ExitCode.USAGE,
            )
        if method.eta is not None or method.ffn not in (("scale",) if linear else ("scale", "full")):
            raise CapaError(
                f"method {method.name}: what stands for visual FFNs is part of the graphs of {bundle.folder}; "
                "leave out what comes after the slash",
                ExitCode.USAGE,
            )
    note = "the scales of the bundle's visual FFNs are part of its graphs: its dense keeps all tokens, and has them too"
    return Subject(
        source=str(bundle.folder.resolve()),
        model=bundle.digest("export"),
        runs="onnx",
        keys={
            name: _key([stage.ratio for stage in method.stages], [], max_new_tokens, bounds, "onnxruntime")
            for name, method in methods.items()
        },
        prepare=BundleAnswers(
            folder=bundle.folder.resolve(),
            methods=methods,
            max_new_tokens=max_new_tokens,
            bounds=bounds,
            trust_remote_code=trust_remote_code,
        ),
        max_new_tokens=max_new_tokens,
        notes=(note,) if linear else (),
    )


def _key(prune: object, ffn: object, max_new_tokens: int, bounds: PixelBounds, *packages: str) -> str:
    versions = tool_versions("numpy", "pillow", "tokenizers", "torch", "transformers", *packages)
    seen = bounds.model_dump(exclude_none=True)
    return digest_of([prune, ffn, max_new_tokens, seen, {**versions, "code": _code_digest()}])


def code_files() -> list[Path]:
    """The modules that decide how a question is answered."""
    roots = [_PACKAGE / name for name in _CODE]
    return sorted(path for root in roots for path in ([root] if root.is_file() else root.rglob("*.py")))


def _code_digest() -> str:
    return digest_of({str(path.relative_to(_PACKAGE)): file_digest(path) for path in code_files()})
