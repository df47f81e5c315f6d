"""Maps the visual tokens at one layer, and finds the sinks among them.

T = prompt tokens, N = visual ones among them, D = hidden size, H = query heads, G = KV heads, d = head size.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from capa_export.calibrate.measure import watching_ffns
from capa_export.calibrate.sums import SINK_THRESHOLD, Calibration
from capa_export.model.eager import Eager, best_rows
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.selectors.selector import CAPA, SelectorChoice
from capa_export.study.explain.schema import Maps, Sinks

__all__ = ["maps_of", "sinks_of"]


@torch.inference_mode()
def maps_of(
    eager: Eager,
    inputs: EagerInputs,
    is_visual: Tensor,
    plan: EagerPlan,
    *,
    layer: int,
    num_keep: int,
    channels: Sequence[int],
) -> Maps:
    """Scores of all visual tokens at a layer, before which nothing is dropped.

    Args:
        eager: the model.
        inputs: the prompt.
        is_visual: [T] bool.
        plan: its scales stand in for visual FFNs, and its quota is each picture's.
        layer: whose attention is looked at.
        num_keep: how many CAPA keeps there.
        channels: that mark sinks; none for all.
    """
    whole = replace(plan, keep={layer: int(is_visual.sum())})
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with watching_ffns(eager.text.layers, seen), _values_written(eager.text.layers[layer].self_attn) as written:
        scores_T = _scores(eager, inputs, is_visual, whole, CAPA)
    attention_T = _scores(eager, inputs, is_visual, whole, SelectorChoice("attention"))
    x_ND = seen[layer][0][is_visual].double()
    normed_ND = (x_ND / (x_ND.square().mean(-1, keepdim=True) + 1e-6).sqrt()).abs()
    phi_N = (normed_ND[:, list(channels)] if channels else normed_ND).amax(-1)
    rows = best_rows(scores_T, is_visual, num_keep, plan)
    rows = rows[is_visual[rows]]
    order = is_visual.cumsum(0) - 1
    return Maps(
        layer=layer,
        contribution=tuple(scores_T[is_visual].tolist()),
        attention=tuple(attention_T[is_visual].tolist()),
        value_norm=tuple(written[0][is_visual].tolist()),
        phi=tuple(phi_N.tolist()),
        kept=tuple(order[rows].tolist()),
        cut=float(scores_T[rows].min()),
    )


def _scores(eager: Eager, inputs: EagerInputs, is_visual: Tensor, whole: EagerPlan, chosen: SelectorChoice) -> Tensor:
    ((layer, _),) = whole.keep.items()
    return eager.prefill(inputs, is_visual, replace(whole, selectors={layer: chosen})).scores[layer]


@contextmanager
def _values_written(attention: Any) -> "Generator[list[Tensor]]":
    """|| sum_h v W_O,h || [T] FP32 of each call of an attention; query heads share the values of their group."""
    norms: list[Tensor] = []

    def project(_module: Any, _inputs: Any, value_1TGd: Tensor) -> None:
        weight = attention.o_proj.weight.float()
        value_TGd = value_1TGd[0].float().unflatten(-1, (-1, attention.head_dim))
        heads = weight.shape[1] // attention.head_dim
        value_THd = value_TGd.repeat_interleave(heads // value_TGd.shape[1], dim=1)
        norms.append(torch.linalg.vector_norm(value_THd.flatten(1) @ weight.T, dim=-1))

    handle = attention.v_proj.register_forward_hook(project)
    try:
        yield norms
    finally:
        handle.remove()


def sinks_of(maps: Maps, calibration: Calibration, where: str) -> Sinks:
    """Visual tokens of the prompt that are sinks, by whether CAPA drops them.

    Args:
        maps: measured on the calibration's sink channels.
        calibration: which channels mark sinks.
        where: they were looked for, as `the calibration's 500 samples`.
    """
    channels = calibration.sink_channels
    found = [token for token, phi in enumerate(maps.phi) if channels and (phi or 0) > SINK_THRESHOLD]
    kept = set(maps.kept)
    dumps = tuple(token for token in found if token not in kept)
    anchors = tuple(token for token in found if token in kept)
    return Sinks(
        threshold=SINK_THRESHOLD,
        channels=channels,
        dumps=dumps,
        anchors=anchors,
        words=tuple(_words(maps, calibration, where, len(dumps), len(anchors))),
    )


def _words(maps: Maps, calibration: Calibration, where: str, dumps: int, anchors: int) -> Iterator[str]:
    channels, size = calibration.sink_channels, len(calibration.layers[0].xx)
    looked = f"in a quarter of the layers, over {calibration.layers[0].visual_tokens:,} visual tokens of {where}"
    largest = max((phi for phi in maps.phi if phi is not None), default=float("nan"))
    if not channels:
        yield f"No channel of a visual token exceeds {SINK_THRESHOLD:g} times its RMS {looked}: no sinks in this model."
        if sqrt(size) <= SINK_THRESHOLD:
            yield f"At hidden size {size} none can: a channel is at most sqrt({size}) = {sqrt(size):.1f} times the RMS."
        yield f"The largest that this prompt shows at layer {maps.layer} is {largest:.1f}."
        return
    yield (
        f"A token is a sink where channel {' or '.join(map(str, channels))} exceeds {SINK_THRESHOLD:g} times its RMS; "
        f"so found {looked}."
    )
    if not dumps + anchors:
        yield f"None of this prompt's visual tokens is one at layer {maps.layer}: the largest phi is {largest:.1f}."
        return
    yield (
        f"At layer {maps.layer} this prompt has {dumps + anchors}. CAPA drops {dumps}, the probability dumps, and "
        f"keeps {anchors}, the structural anchors. The line between the two is ours: CAPA's paper calls sinks of low "
        f"contribution dumps and those of high contribution anchors, and the cut here is what keeps {len(maps.kept)} "
        "visual tokens."
    )
