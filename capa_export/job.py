"""What a build was asked for, and what is opened on the way: checkpoint, eager model, prompts."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import capa_export
from capa_export.base.errors import CapaError
from capa_export.base.files import fingerprint
from capa_export.base.progress import Report, say, silent
from capa_export.base.workers import Workers
from capa_export.bundle.store import Bundle, digest_of, file_digest
from capa_export.config.pixels import PixelBounds
from capa_export.config.plugins import PluginWish
from capa_export.config.recipe import Recipe, check_layers, recipe_of
from capa_export.config.schedule import Stage
from capa_export.model.families import Family, load_family, require_selection
from capa_export.model.hub import full_source
from capa_export.plan.device_memory import WeightsWish

__all__ = [
    "ONNX",
    "PARITY",
    "REPORT",
    "Job",
    "alpha_digest",
    "run_stage",
    "say",
    "say_weights",
    "tool_versions",
]

ONNX = "onnx"
PARITY = "parity.json"
REPORT = "report.html"


def say_weights(asked: str, weights: str, because: str) -> None:
    """Say where the engines' weights go and why, unless the user said it."""
    if asked == "auto":
        say(f"{'weights':<14}{weights}: {because}")


def run_stage(
    bundle: Bundle,
    name: str,
    key: object,
    outputs: Sequence[str],
    work: Callable[[Path], dict[str, Any]],
    *,
    outdates: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a stage of a bundle unless it is current, and say what it took; returns its result."""
    record, ran = bundle.run_stage(name, key, outputs, work, outdates=outdates)
    took = f"{record['seconds']:.1f} s, {record['peak_memory_bytes'] / 1e9:.2f} GB" if ran else "up to date"
    say(f"{name:<14}{took}")
    return record["result"]


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
    layer_by_layer: bool | None = None
    """Calibrate and validate with one layer's weights in memory; None where the models do not fit."""
    workers: Workers = field(default_factory=Workers)
    """Where the calibration runs."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    ffn: bool = True
    weights: WeightsWish = "auto"
    """Where engines find theirs."""
    memory: int | None = None
    """Bytes of the device that runs the bundle, where one of the target's is meant."""
    plugins: PluginWish = "auto"
    plugin_library: Path | None = None
    in_place: bool = False
    """Whether the ONNX files read the checkpoint's own shards instead of a copy."""
    trust_remote_code: bool = False
    """Whether the checkpoint's own Python may run, for its tokenizer and image processor."""
    command: Sequence[str] = ()
    report: Report = field(default=silent)
    _hashing: "Future[dict[str, str]] | None" = field(default=None, init=False, repr=False)

    @classmethod
    def of_bundle(
        cls,
        bundle: Bundle,
        *,
        checkpoint: str | None,
        revision: str | None,
        images: Path | None,
        layer_by_layer: bool | None = None,
        bounds: PixelBounds | None = None,
        trust_remote_code: bool = False,
        report: Report,
    ) -> "Job":
        """The request that made a bundle, from its manifest.

        A checkpoint or bounds that are given stand for the recorded ones.

        Raises:
            CapaError: nothing was exported, or the manifest is damaged.
        """
        bundle.stage("export")
        manifest = bundle.manifest
        recorded = manifest.get("checkpoint")
        if recorded is None:
            raise CapaError(f"{bundle.folder}: the export was interrupted; `capa-export export` finishes it")
        recipe = recipe_of(manifest, bundle.folder)
        return cls(
            recipe=recipe if bounds is None else recipe.model_copy(update={"pictures": bounds}),
            bundle=bundle,
            checkpoint=checkpoint or recorded["source"],
            revision=revision or (None if checkpoint else recorded["revision"]),
            images=images,
            layer_by_layer=layer_by_layer,
            trust_remote_code=trust_remote_code,
            report=report,
        )

    @cached_property
    def family(self) -> Family:
        return load_family(self.recipe.family)

    @cached_property
    def source(self) -> Any:
        """The checkpoint, found to fit the recipe."""
        from capa_export.model.checkpoint import open_checkpoint
        from capa_export.model.source import Source

        return Source.of(open_checkpoint(self.checkpoint, revision=self.revision), self.family)

    @property
    def checkpoint_source(self) -> str:
        """As `full_source` has it."""
        return full_source(self.checkpoint)

    @cached_property
    def fingerprints(self) -> dict[str, dict[str, int | str]]:
        """What tells the checkpoint's files from others without reading their weights."""
        checkpoint = self.source.checkpoint
        return {path.relative_to(checkpoint.folder).as_posix(): fingerprint(path) for path in checkpoint.files}

    @property
    def known_digests(self) -> dict[str, str]:
        """SHA-256 of the checkpoint's files, if the bundle has it and they have not changed since; else nothing."""
        hashed = self.bundle.manifest.get("hashed", {})
        return hashed["sha256"] if hashed.get("files") == self.fingerprints else {}

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the checkpoint's files."""
        if known := self.known_digests:
            return known
        if self._hashing is not None:
            return self._hashing.result()

        def progress(_name: str, done: int, total: int) -> None:
            self.report("hash checkpoint (MB)", done >> 20, total >> 20)

        return self.source.checkpoint.sha256(progress)

    def hash_meanwhile(self) -> None:
        """Take the digests beside other work that reads the checkpoint; who asks for them then waits.

        A thread of its own, and not a pool's, since those would keep a failed command from ending.
        """
        if self.known_digests or "digests" in vars(self):
            return
        hashing: Future[dict[str, str]] = Future()
        checkpoint = self.source.checkpoint

        def work() -> None:
            try:
                hashing.set_result(checkpoint.sha256())
            except OSError as error:
                hashing.set_exception(error)

        Thread(target=work, daemon=True).start()
        self._hashing = hashing

    @property
    def checkpoint_digest(self) -> str:
        """Of config and weights."""
        return digest_of(self.digests)

    @cached_property
    def sidecar_digests(self) -> dict[str, str]:
        """SHA-256 of tokenizer, chat template and processor files, on which prompts depend."""
        from capa_export.export.stage import sidecars

        folder = self.source.checkpoint.sidecars
        parts = sidecars(folder, code=self.trust_remote_code)
        paths = {path for part in parts.values() for path in part}
        return {path.relative_to(folder).as_posix(): file_digest(path) for path in sorted(paths)}

    @property
    def prompt_settings(self) -> list[Any]:
        """All that a prompt depends on beside what is asked."""
        return [self.sidecar_digests, self.recipe.pictures.model_dump(exclude_none=True)]

    @cached_property
    def eager_model(self) -> Any:
        """The Hugging Face model, dense, in FP32."""
        import torch
        import transformers

        from capa_export.model.eager_attention import ATTENTION

        transformers.utils.logging.disable_progress_bar()
        architecture = getattr(transformers, self.family.ARCHITECTURE)
        folder = self.source.checkpoint.folder
        if self.source.checkpoint.translation is not None:
            from capa_export.model.streamed import read_model

            return read_model(self.source)
        try:
            # Whatever attention the config asks for, from kernels that may not be here to none that there is.
            return architecture.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation=ATTENTION,
            ).eval()
        except (ImportError, OSError, ValueError) as error:
            raise CapaError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from error

    def forget_eager_model(self) -> None:
        """Give its memory back; whoever asks for it loads it anew."""
        vars(self).pop("eager_model", None)

    @cached_property
    def prompter(self) -> Any:
        from capa_export.model.prompt import Prompter

        folder = self.source.checkpoint.sidecars
        return Prompter(
            *(folder, folder, self.family, self.source.dims),
            bounds=self.recipe.pictures,
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def schedule(self) -> tuple[Stage, ...]:
        return self.recipe.prune.schedule

    @property
    def pruning(self) -> dict[str, Any]:
        """What the graphs need to know of the pruning."""
        prune = self.recipe.prune
        layers = tuple(stage.layer for stage in prune.schedule)
        return {
            "prune_layers": layers,
            "selectors": prune.selectors,
            "min_keep_per_image": prune.min_keep_per_image,
        }

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the picture that plans are made for."""
        from capa_export.model.visual_tokens import visual_tokens

        return visual_tokens(self.recipe, str(self.source.checkpoint.sidecars), self.source.dims)

    def check_pictures(self) -> None:
        """Refuse bounds of pictures that the model cannot keep, before anything is run."""
        _ = self.visual_tokens

    def check_files(self) -> None:
        """Hold weights, config, tokenizer, chat template and image processor against each other before any work.

        Raises:
            CapaError: one of them is missing, or does not belong to the others.
        """
        from capa_export.export.stage import check_tensors

        check_tensors(self.source)
        self.prompter.check()

    def check_layers(self) -> None:
        """Refuse a schedule that does not fit the model, before anything is run."""
        from capa_export.config.parts import check_units

        check_layers(self.recipe, self.source.dims.decoder.num_layers)
        for stage in self.schedule:
            if stage.chosen.reads_tower:
                require_selection(self.family, stage.selector)
        check_units(self.recipe.fp32_layers, self.source.dims)


def alpha_digest(scales: Mapping[int, Any]) -> str:
    """Of the scale [D] of every layer that has one."""
    return digest_of({layer: alpha.tolist() for layer, alpha in scales.items()})


@cache
def _code_digest() -> str:
    """Of this package's own source: a version number does not change while one works on it."""
    package = Path(capa_export.__file__).parent
    return digest_of({str(path.relative_to(package)): file_digest(path) for path in sorted(package.rglob("*.py"))})


def tool_versions(*packages: str) -> dict[str, str]:
    """Versions that a stage's result depends on."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    own = {"capa-export": capa_export.__version__, "code": _code_digest()}
    return {**own, **{package: installed(package) for package in packages}}
