"""A checkpoint's files, held against each other."""

from capa_export.model.model import Model
from capa_export.model.tensors import check_tensors

__all__ = ["check_files"]


def check_files(model: Model) -> None:
    """Hold weights, config, tokenizer, chat template and image processor against each other before any work.

    Raises:
        CapaError: one of them is missing, or does not belong to the others.
    """
    check_tensors(model.source)
    model.prompter.check()
