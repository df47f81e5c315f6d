"""Processes that begin with the libraries imported: forks of a server that imported them and did nothing else."""

import multiprocessing

__all__ = ["FORKED"]

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "capa_export.calibrate.effect",
        "capa_export.calibrate.layerwise",
        "capa_export.cli.stages",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        "transformers.models.qwen2_vl.image_processing_qwen2_vl",
    ]
)
