"""The folder of graphs, weights and the files beside them that are needed to run them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capa_export.base.precision import Precision
from capa_export.base.progress import Report, silent
from capa_export.config.schedule import Prune
from capa_export.export.graphs import pruning, write_onnx
from capa_export.export.packing import packing
from capa_export.model.generation import eos_token_ids
from capa_export.model.sidecars import copy_sidecars
from capa_export.model.source import Source

__all__ = ["write_folder"]


def write_folder(
    source: Source,
    processors: tuple[Any, Any],
    prune: Prune,
    precision: Precision,
    folder: Path,
    *,
    scales: Mapping[int, Any],
    fp32_layers: Sequence[str],
    in_place: bool,
    code: bool,
    report: Report = silent,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write graphs, weights and the files beside them.

    Args:
        source: the checkpoint.
        processors: its tokenizer and its image processor.
        prune: the schedule.
        precision: of weights and activations.
        folder: takes the files.
        scales: layer -> alpha [D], where a scale stands for the visual FFN.
        fp32_layers: parts in FP32.
        in_place: whether the files read the checkpoint's own shards instead of a copy.
        code: whether the checkpoint's own Python is copied, too.
        report: progress.

    Returns:
        An entry a file, and what else is to be recorded.

    Raises:
        CapaError: a file does not fit the model, or the disk or a dtype is too small for the weights.
    """
    from capa_export.export.genai import reason_against, write_genai
    from capa_export.model.processors.resolved import PROCESSORS, write_processors

    files = write_onnx(
        *(source, precision, folder),
        **pruning(prune),
        scales=scales,
        fp32_layers=fp32_layers,
        in_place=in_place,
        report=report,
    )
    copy_sidecars(source.checkpoint, folder, code=code)
    needs_transformers = write_processors(*processors, folder / PROCESSORS)
    not_genai = reason_against(source, prune.selectors)
    if not_genai is None:
        files |= write_genai(
            *(source, precision, folder),
            selectors=prune.selectors,
            linear_layers=sorted(scales),
            eos_token_ids=eos_token_ids(folder / "llm"),
            min_keep_per_image=prune.min_keep_per_image,
            fp32_layers=fp32_layers,
        )
    return files, {
        "precision": precision,
        "not_for_genai": not_genai,
        "needs_transformers": needs_transformers,
        "packing": packing(source, folder),
        "searched_for_nan": not in_place,
    }
