"""Runs the eager model on one prompt, once for every method.

N = visual tokens of the prompt.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.progress import tracked
from capa_export.base.statistics import kl_divergence
from capa_export.bundle.store import Bundle
from capa_export.calibrate.measure import measure
from capa_export.calibrate.sums import CALIBRATION, Calibration, scales_digest
from capa_export.config.schedule import Method, Stage, parse_method, schedule_text, stage_text
from capa_export.data.picture_files import open_picture
from capa_export.data.samples import Sample
from capa_export.model.eager import EagerPrefill
from capa_export.model.memory import require_eager_memory
from capa_export.model.model import Model
from capa_export.model.prompt import Prompt, Turn
from capa_export.selectors.selector import load_selector, selectors
from capa_export.study.evaluate.answers import DENSE, max_answer_tokens
from capa_export.study.evaluate.eager_answers import EagerAnswers, EagerMethods
from capa_export.study.evaluate.models import check_fits, parse_methods
from capa_export.study.explain.maps import maps_of, sinks_of
from capa_export.study.explain.schema import Explanation, MethodExplanation, SkippedMethod, StageTokens
from capa_export.study.explain.surfaces import Surface, surfaces_of

__all__ = ["explain"]

_LAYER = 2
"""Layer shown where the bundle chooses before the decoder: FastV's, and early enough for all families."""


@torch.inference_mode()
def explain(
    model: Model,
    bundle: Bundle,
    pictures: Sequence[Path],
    question: str,
    methods: Sequence[str] = (),
    *,
    layer: int | None = None,
    max_new_tokens: int = 64,
) -> tuple[Explanation, list[Surface]]:
    """Explain what each method keeps of a prompt and answers, in eager FP32; returns also where the tokens lie.

    Args:
        bundle: whose schedule is explained.
        model: that it was made from.
        pictures: files, in the order in which they are shown.
        question: asked behind them.
        methods: as `parse_method` reads them, beside dense and the bundle's own; all selectors where there is none.
        layer: whose contributions are shown, and where selectors in the decoder choose by default; the bundle's first
            where there is none.
        max_new_tokens: longest answer.

    Raises:
        CapaError: a picture does not load, a method does not fit the model or this prompt, the checkpoint or the
            calibration is not what the bundle was made from, or this machine's memory is too small for the model.
    """
    images = [open_picture(path) for path in pictures]
    named = parse_methods(methods) if methods else None
    require_eager_memory(model)
    linear, calibration = _calibrated(model, bundle)
    layer = _layer(model, layer)
    own = _own(model, linear, calibration)
    prompt = model.prompter.chat(turns := [Turn("user", [*images, question])])
    others, left_out = _others(model, bundle, own, named, layer, prompt, calibration)
    chosen = {DENSE: parse_method(DENSE), own.name: own, **others}

    runs = EagerMethods(
        EagerAnswers(model=model, methods=chosen, calibration=calibration, max_new_tokens=max_new_tokens)
    )
    inputs, is_visual = runs.inputs(prompt), torch.from_numpy(prompt.is_visual)
    dense, cosines = runs.dense(prompt, inputs)
    plans = {name: runs.plan(method, runs.num_keep(method, prompt), cosines) for name, method in chosen.items()}
    if calibration is None:
        where = "this prompt alone, since the bundle has no calibration"
        calibration = measure(model.eager, model.family, model.prompter, Sample(turns), "")
    else:
        where = f"{calibration.samples} calibration {'sample' if calibration.samples == 1 else 'samples'}"
    plan = plans[own.name]
    maps = maps_of(
        runs.eager,
        inputs,
        is_visual,
        plan,
        layer=layer,
        num_keep=plan.keep.get(layer, list(plan.keep.values())[-1]),
        channels=calibration.sink_channels,
    )
    limit = max_answer_tokens(model.prompter, prompt, max_new_tokens)

    def answered(name: str) -> tuple[EagerPrefill, list[int]]:
        run = dense if name == DENSE else runs.eager.prefill(inputs, is_visual, plans[name])
        return run, runs.greedy(run, limit)

    found = {name: answered(name) for name in tracked(chosen, "explain", len(chosen), model.report)}
    kept = {name: _kept(prompt, run) for name, (run, _) in found.items()}
    explained = tuple(
        MethodExplanation(
            method=name,
            own=name == own.name,
            answer=model.prompter.decode(tokens).strip(),
            same_answer=tokens == found[DENSE][1],
            stages=tuple(
                StageTokens(where=stage.where, selector=stage.selector, kept=plans[name].keep[stage.layer])
                for stage in chosen[name].stages
            ),
            kept=tuple(kept[name]),
            iou=_iou(kept[name], kept[own.name]),
            kl=kl_divergence(dense.logits, run.logits),
        )
        for name, (run, tokens) in found.items()
    )
    surfaces = surfaces_of(prompt, images, model.prompter.image_processor)
    return Explanation(
        bundle=str(bundle.folder),
        model=model.checkpoint_source,
        question=question,
        pictures=tuple(path.name for path in pictures),
        visual_tokens=prompt.num_visual,
        grids=tuple(surface.grid for surface in surfaces),
        linear_layers=linear,
        maps=maps,
        sinks=sinks_of(maps, calibration, where),
        methods=explained,
        left_out=tuple(left_out),
        max_new_tokens=max_new_tokens,
    ), surfaces


def _calibrated(model: Model, bundle: Bundle) -> tuple[tuple[int, ...], Calibration | None]:
    """Layers whose visual FFNs the bundle replaces, and its calibration, both found to belong to the checkpoint."""
    model.remember_digests(bundle)
    if not model.made(bundle):
        raise CapaError(
            f"{model.checkpoint}: is not the checkpoint this bundle was made from; pass it with --checkpoint"
        )
    exported = bundle.stage("export")["result"]
    path = bundle.folder / CALIBRATION
    calibration = Calibration.load(bundle.folder) if path.exists() else None
    layers = calibration.layers if calibration else []
    scales = {layer: layers[layer].alpha for layer in exported["linear_layers"]} if layers else {}
    if exported["alpha"] != scales_digest(scales):
        raise CapaError(f"{path}: missing or changed since the export; run `capa-export export` again")
    return tuple(exported["linear_layers"]), calibration


def _layer(model: Model, asked: int | None) -> int:
    last = model.source.dims.decoder.num_layers - 2
    if asked is None:
        return next((stage.layer for stage in model.schedule if stage.layer >= 0), min(_LAYER, last))
    if asked > last:
        raise CapaError(f"--layer {asked}: what is dropped at layers 0 to {last} makes a difference", ExitCode.USAGE)
    return asked


def _own(model: Model, linear: tuple[int, ...], calibration: Calibration | None) -> Method:
    """The bundle's own method; `full` where it keeps the FFNs that a calibration finds linear, or has none."""
    stages = schedule_text(model.schedule)
    ffn = model.recipe.ffn
    if calibration is not None and calibration.measured(ffn) and calibration.scaled_layers(ffn) == linear:
        return Method(stages, model.schedule, "scale")
    return Method(f"{stages}/full", model.schedule, "full")


def _others(
    model: Model,
    bundle: Bundle,
    own: Method,
    named: Mapping[str, Method] | None,
    layer: int,
    prompt: Prompt,
    calibration: Calibration | None,
) -> tuple[dict[str, Method], list[SkippedMethod]]:
    """The methods named, beside dense and the bundle's own; without a name every selector that can be run."""
    if named is not None:
        for method in named.values():
            _check(model, bundle, method, prompt, calibration)
        same = (own.stages, own.ffn, own.eta)
        return {key: one for key, one in named.items() if (one.stages, one.ffn, one.eta) != same}, []
    every = {method.name: method for method in _every_selector(own, layer)}
    refused = {name: _refusal(model, bundle, method, prompt, calibration) for name, method in every.items()}
    left_out = [SkippedMethod(method=name, reason=reason) for name, reason in refused.items() if reason]
    return {name: method for name, method in every.items() if not refused[name]}, left_out


def _every_selector(own: Method, layer: int) -> list[Method]:
    """Every selector's method at the bundle's ratio and its own place; `random` first, since others have to beat it."""
    found: list[Method] = []
    for name in sorted(selectors(), key=lambda name: (name != "random", name)):
        # What acts where a layer begins is scored by the one before.
        places = {"attention": layer, "entry": max(layer, 1), "input": -1}
        stage = Stage(layer=places[load_selector(name).place], ratio=own.stages[-1].ratio, selector=name)
        text = stage_text(stage)
        if (stage,) != own.stages:
            found.append(Method(text if own.ffn == "scale" else f"{text}/{own.ffn}", (stage,), own.ffn))
    return found


def _refusal(model: Model, bundle: Bundle, method: Method, prompt: Prompt, calibration: Calibration | None) -> str:
    """The reason why a method cannot be run; empty if it can."""
    try:
        _check(model, bundle, method, prompt, calibration)
    except CapaError as error:
        return str(error).removeprefix(f"method {method.name}: ")
    return ""


def _check(model: Model, bundle: Bundle, method: Method, prompt: Prompt, calibration: Calibration | None) -> None:
    """Refuse a method that cannot be run, before the model is loaded."""
    check_fits(model, method)
    if method.ffn != "full" and calibration is None:
        raise CapaError(
            f"method {method.name}: {bundle.folder} has no calibration to replace visual FFNs from; "
            f"write {method.name.partition('/')[0]}/full",
            ExitCode.USAGE,
        )
    if prune := method.prune(model.recipe.prune.min_keep_per_image):
        try:
            prune.num_keep(prompt.image_lengths)
        except CapaError as error:
            raise CapaError(f"method {method.name}: {error}") from error


def _kept(prompt: Prompt, run: EagerPrefill) -> list[int]:
    """Visual tokens that are left at the end; all where nothing is dropped."""
    order = prompt.is_visual.cumsum() - 1
    positions = list(run.kept.values())[-1].tolist() if run.kept else range(len(order))
    return [int(order[position]) for position in positions if prompt.is_visual[position]]


def _iou(kept: Sequence[int], others: Sequence[int]) -> float:
    return len({*kept} & {*others}) / len({*kept} | {*others})
