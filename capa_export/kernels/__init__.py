"""The GPU kernels of the CAPA operators, one file each, in Triton; importing it needs triton."""

from capa_export.base.errors import CapaError, ExitCode, how_to_install

try:
    from capa_export.kernels import contribution_score, token_gather, topk_keep, visual_scale
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    raise CapaError(f"kernels need triton: {how_to_install('rtx')}", ExitCode.ENGINE) from error

__all__ = ["OPERATORS"]

OPERATORS = (contribution_score.OPERATOR, topk_keep.OPERATOR, token_gather.OPERATOR, visual_scale.OPERATOR)
