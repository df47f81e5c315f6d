"""Maps against the model's own attention weights, head by head."""

from typing import Any

import pytest
import torch

from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Prompter
from capa_export.study.explain.maps import maps_of
from tests.conftest import noise

LAYER = 3


@pytest.mark.parametrize("channels", [(), (4, 17)])
@torch.no_grad()
def test_what_a_layer_makes_of_every_token(model: Any, prompter: Prompter, channels: tuple[int, ...]) -> None:
    prompt = prompter("What?", [noise(84, 112)])
    is_visual = torch.from_numpy(prompt.is_visual)
    inputs = EagerInputs.of(qwen25vl.eager_inputs(model, prompt))
    alpha = torch.linspace(0.5, 1.5, 64)
    plan = EagerPlan(keep={1: 3}, scales={1: alpha})
    maps = maps_of(Eager(model), inputs, is_visual, plan, layer=LAYER, num_keep=4, channels=channels)

    text, states, weights = model.model.language_model, {}, {}

    def replace(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        """The scale, in transformers' own forward."""
        return torch.where(is_visual[:, None], states["x1"] * (alpha - 1), output)

    def note(name: str) -> Any:
        return lambda _module, given: states.update({name: given[0]})

    handles = [
        text.layers[1].post_attention_layernorm.register_forward_pre_hook(note("x1")),
        text.layers[1].mlp.register_forward_hook(replace),
        text.layers[LAYER].input_layernorm.register_forward_pre_hook(note("in")),
        text.layers[LAYER].post_attention_layernorm.register_forward_pre_hook(note("x")),
        text.layers[LAYER].self_attn.register_forward_hook(lambda _m, _g, out: weights.update(A=out[1])),
    ]
    text.set_attn_implementation("eager")
    try:
        text(**inputs.arguments(is_visual), use_cache=False)
    finally:
        text.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()
    attention, layer = text.layers[LAYER].self_attn, text.layers[LAYER]
    A_HT = weights["A"][0, :, -1]
    value_TGd = attention.v_proj(layer.input_layernorm(states["in"]))[0].unflatten(-1, (2, 16))
    output_DHd = attention.o_proj.weight.unflatten(-1, (4, 16))
    written_HTD = torch.stack([value_TGd[:, h // 2] @ output_DHd[:, h].T for h in range(4)])

    def close(found: Any, wanted_T: torch.Tensor) -> None:
        assert found == pytest.approx(wanted_T[is_visual].tolist(), rel=1e-4)

    close(maps.attention, A_HT.mean(0))
    close(maps.value_norm, written_HTD.sum(0).norm(dim=-1))
    contribution_T = (A_HT[:, :, None] * written_HTD).sum(0).norm(dim=-1)
    close(maps.contribution, contribution_T)
    x_TD = states["x"][0]
    phi_TD = (x_TD / x_TD.square().mean(-1, keepdim=True).sqrt()).abs()
    close(maps.phi, (phi_TD[:, list(channels)] if channels else phi_TD).amax(-1))
    kept = contribution_T[is_visual].topk(4)
    assert maps.kept == tuple(kept.indices.sort().values.tolist())
    assert maps.cut == pytest.approx(float(kept.values[-1]), rel=1e-4)
