"""Every operator from its PTX for GPUs whose kernels differ: warpgroups multiply on 9.0, pairs of FP32 on 12.0."""

from types import ModuleType

import pytest
import torch

from capa_export.config.plugins import HEAD_SIZES
from capa_export.kernels import contribution_score, token_gather, topk_keep, visual_scale
from tests.kernels.ptx.run import outputs_of
from tests.kernels.ptx.test_operators import RTOL, as_reals
from tests.kernels.test_contribution_score import case as score_case
from tests.kernels.test_token_gather import bits as gather_bits
from tests.kernels.test_topk_keep import prompts
from tests.kernels.test_visual_scale import case as scale_case

REALS = [torch.float16, torch.bfloat16, torch.float32]


def check(
    module: ModuleType, capability: str, inputs: dict[str, torch.Tensor], rtol: float, **attributes: float
) -> None:
    found = list(outputs_of(module.OPERATOR, inputs, capability=capability, **attributes).values())
    expected = module.reference(**inputs, **attributes)
    for one, other in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["8.0", "9.0", "12.0"])
def test_every_operator(capability: str) -> None:
    for real in REALS:
        for head_size in HEAD_SIZES:
            inputs = score_case(6, 2, head_size, 150, 272, batch=2, num_text=40, real=real)
            check(contribution_score, capability, inputs, RTOL, scale=0.125)
            gathered = as_reals(gather_bits(2, 45, 272, 2, head_size, head_size // 2), real)
            kept = torch.tensor([[0, 1, 7, 15, 32], [5, 6, 9, 10, 44]])
            check(token_gather, capability, gathered | {"kept": kept}, 0)
        for tokens, num_text in ((1, 0), (37, 5), (150, 129)):
            check(visual_scale, capability, scale_case(tokens, 1040, 2, num_text, real), 0)
    for tokens, num_keep in ((1, 1), (300, 77), (4200, 4100)):
        inputs = {"scores": prompts(tokens, text=0.02), "num_keep": torch.tensor([num_keep])}
        check(topk_keep, capability, inputs, 0, min_keep_per_image=1)
