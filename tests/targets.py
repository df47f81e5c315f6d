"""Targets that build faster than the shipped ones."""

from typing import Any

from capa_export.config.target import Target, load_target

__all__ = ["one_gpu"]


def one_gpu(**changes: Any) -> Target:
    """The target rtx for one GPU, with other engine settings changed too."""
    target = load_target("rtx")
    engine = target.require_engine().model_copy(update={"compute_capabilities": ("8.6",), **changes})
    return target.model_copy(update={"engine": engine})
