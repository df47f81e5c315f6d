"""The GPU kernels of the CAPA operators, one file each, in Triton, which is needed for these alone."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from capa_export.base.errors import CapaError, ExitCode, how_to_install

if TYPE_CHECKING:
    from capa_export.kernels.operator import Operator

    OPERATORS: tuple[Operator, ...]
    STEP_OPERATORS: tuple[Operator, ...]

__all__ = ["OPERATORS", "STEP_OPERATORS", "require_triton"]


def require_triton() -> None:
    """Hold that Triton is installed.

    Raises:
        CapaError: it is not.
    """
    if find_spec("triton") is None:
        raise CapaError(f"kernels need triton: {how_to_install('rtx')}", ExitCode.ENGINE)


def __getattr__(name: str) -> Any:
    """Operators, loaded when they are asked for: those of graphs, which are plugins, and those beside a decode step."""
    if name not in {"OPERATORS", "STEP_OPERATORS"}:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    require_triton()
    if name == "STEP_OPERATORS":
        from capa_export.kernels import token_choice, token_embedding

        return (token_embedding.OPERATOR, token_choice.LIKELIEST, token_choice.SAMPLED)
    from capa_export.kernels import contribution_score, token_gather, topk_keep, visual_scale

    return (contribution_score.OPERATOR, topk_keep.OPERATOR, token_gather.OPERATOR, visual_scale.OPERATOR)
