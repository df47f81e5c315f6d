"""What a build was asked for, and what is opened on the way: checkpoint, eager model, prompts."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import capa_export
from capa_export.bundle import Bundle, digest_of
from capa_export.errors import CapaError
from capa_export.families import Family, load_family
from capa_export.progress import Report, silent
from capa_export.recipe import Recipe, Stage

__all__ = ["ONNX", "PARITY", "REPORT", "Job", "eos_token_ids", "say", "tool_versions"]

ONNX = "onnx"
PARITY = "parity.json"
REPORT = "report.html"


def say(line: str) -> None:
    """Talk to the person: stderr, since stdout is data."""
    print(line, file=sys.stderr, flush=True)


@dataclass
class Job:
    """What the user asked for, and what is opened on the way."""

    recipe: Recipe
    """The command line's ratio and layer already in it."""
    bundle: Bundle
    checkpoint: str
    revision: str | None = None
    images: Path | None = None
    calibration: Path | None = None
    """Finished elsewhere, in place of a run; a file, or a bundle folder."""
    samples: int | None = None
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    ffn: bool = True
    weights: Literal["embedded", "external"] = "embedded"
    command: Sequence[str] = ()
    report: Report = field(default=silent)

    @cached_property
    def family(self) -> Family:
        return load_family(self.recipe.family)

    @cached_property
    def source(self) -> Any:
        """The checkpoint, found to fit the recipe."""
        from capa_export.checkpoint import open_checkpoint
        from capa_export.export import Source

        return Source.of(open_checkpoint(self.checkpoint, revision=self.revision), self.family)

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the checkpoint's files."""

        def progress(_name: str, done: int, total: int) -> None:
            self.report("hash checkpoint (MB)", done >> 20, total >> 20)

        return self.source.checkpoint.sha256(progress)

    @property
    def checkpoint_digest(self) -> str:
        return digest_of(self.digests)

    @cached_property
    def eager_model(self) -> Any:
        """The Hugging Face model, dense, in FP32."""
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        architecture = getattr(transformers, self.family.ARCHITECTURE)
        folder = self.source.checkpoint.folder
        return architecture.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()

    @cached_property
    def prompter(self) -> Any:
        from capa_export.prompt import Prompter

        folder = self.source.checkpoint.folder
        return Prompter(folder, folder, self.family, self.source.dims)

    @property
    def schedule(self) -> tuple[Stage, ...]:
        return self.recipe.prune.schedule

    @property
    def prune_layers(self) -> tuple[int, ...]:
        return tuple(stage.layer for stage in self.schedule)

    def check_layers(self) -> None:
        """Refuse a schedule that does not fit the model, before anything is run."""
        num_layers = self.source.dims.decoder.num_layers
        for layer in self.prune_layers:
            if layer >= num_layers - 1:
                raise CapaError(
                    f"{self.recipe.name}: prune layer {layer}, but this checkpoint's decoder has layers 0 to "
                    f"{num_layers - 1} and the last one is too late; choose a smaller --prune-layer"
                )


def eos_token_ids(folder: Path) -> list[int]:
    """Tokens that end an answer, from `generation_config.json`, or from `config.json` where that is missing."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def tool_versions(*packages: str) -> dict[str, str]:
    """Versions that a stage's result depends on."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {"capa-export": capa_export.__version__, **{package: installed(package) for package in packages}}
