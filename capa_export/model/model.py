"""A published checkpoint opened with a recipe: weights, prompts and the eager model, each when it is first used."""

from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any

from capa_export.base.errors import CapaError, refusing
from capa_export.base.files import file_digest, fingerprint
from capa_export.base.progress import Report, silent
from capa_export.bundle.store import Bundle, digest_of
from capa_export.config.parts import check_units
from capa_export.config.pixels import PixelBounds
from capa_export.config.recipe import Recipe, check_layers, recipe_of
from capa_export.config.schedule import Stage
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import Family, load_family, require_selection
from capa_export.model.hub import full_source
from capa_export.model.quantized.choice import CHOICE, QUANTIZE, WeightChoice
from capa_export.model.sidecars import sidecars
from capa_export.model.source import Source
from capa_export.model.visual_tokens import visual_tokens

__all__ = ["Model", "recorded_model"]


@dataclass(kw_only=True)
class Model:
    """A checkpoint and the recipe it is opened with; no bundle belongs to it."""

    recipe: Recipe
    checkpoint: str
    """Local folder or hub id."""
    revision: str | None = None
    """Revision of a hub id."""
    trust_remote_code: bool = False
    """Whether the checkpoint's own Python may run, for its tokenizer and image processor."""
    named_by: str | None = None
    """A file that names the checkpoint, where the user does not: it is then not fetched from the hub."""
    report: Report = field(default=silent)
    choice: WeightChoice | None = None
    """What samples decided of the weights that the recipe has rounded."""
    _hashing: "Future[dict[str, str]] | None" = field(default=None, init=False, repr=False)

    def with_recipe(self, recipe: Recipe) -> "Model":
        """The opened checkpoint under another recipe, which must see pictures alike."""
        model = copy(self)
        model.recipe = recipe
        return model

    def take(self, choice: WeightChoice) -> None:
        """Round the weights as samples decided; what was read of them is forgotten."""
        self.choice = choice
        for name in ("source", "eager"):
            vars(self).pop(name, None)

    def unopened(self) -> "Model":
        """A copy of the model for another process, which opens it anew and reports nothing."""
        return replace(self, checkpoint=self.checkpoint_source, report=silent)

    @cached_property
    def family(self) -> Family:
        """The module of the model's family."""
        return load_family(self.recipe.family)

    @cached_property
    def source(self) -> Source:
        """The checkpoint, found to fit the recipe.

        Raises:
            CapaError: it cannot be opened, or would have to be fetched, which nobody asked for.
        """
        if self.named_by is not None and not Path(self.checkpoint).expanduser().is_dir():
            revision = f" --revision {self.revision}" if self.revision else ""
            raise CapaError(
                f"{self.named_by}: names the checkpoint {self.checkpoint}, which is no folder here, and nothing is "
                f"fetched because a bundle names it; say --checkpoint {self.checkpoint}{revision} to use the hub's, or "
                "give a folder"
            )
        checkpoint = open_checkpoint(self.checkpoint, revision=self.revision)
        recipe = self.recipe
        return Source.of(
            *(checkpoint, self.family, recipe.quantize, self.choice),
            quantize_head=recipe.quantize_head,
            quantize_vision=recipe.quantize_vision,
        )

    @property
    def checkpoint_source(self) -> str:
        """The checkpoint as it is found from any folder: an absolute path or a hub id."""
        return full_source(self.checkpoint)

    @cached_property
    def fingerprints(self) -> dict[str, dict[str, int | str]]:
        """Size, time and header digest of the checkpoint's files, whose weights are not read."""
        checkpoint = self.source.checkpoint
        return {path.relative_to(checkpoint.folder).as_posix(): fingerprint(path) for path in checkpoint.files}

    def remember_digests(self, bundle: Bundle) -> bool:
        """Take the digests that a bundle recorded, if the files are still the same; returns whether they are known."""
        hashed = bundle.manifest.get("hashed", {})
        if "digests" not in vars(self) and hashed.get("files") == self.fingerprints:
            vars(self)["digests"] = hashed["sha256"]
        return "digests" in vars(self)

    def record_digests(self, bundle: Bundle) -> None:
        """Spare the next command on a bundle reading the whole checkpoint."""
        self.remember_digests(bundle)
        bundle.update(hashed=self.hashed)

    @property
    def hashed(self) -> dict[str, Any]:
        """What a manifest says of the digests, so that they can be remembered."""
        known = {"source": self.checkpoint_source, "revision": self.revision}
        return {**known, "files": self.fingerprints, "sha256": self.digests}

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the checkpoint's files."""
        if self._hashing is not None:
            return self._hashing.result()

        def progress(_name: str, done: int, total: int) -> None:
            self.report("hash checkpoint (MB)", done >> 20, total >> 20)

        return self.source.checkpoint.sha256(progress)

    def hash_meanwhile(self) -> None:
        """Take the digests beside other work that reads the checkpoint; who asks for them then waits.

        A thread of its own, and not a pool's, since those would keep a failed command from ending.
        """
        if "digests" in vars(self):
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
    def digest(self) -> str:
        """One digest of config and weights, and of what these are rounded to."""
        if not self.source.rounds:
            return digest_of(self.digests)
        decided: list[Any] = [] if self.choice is None else [self.choice.digest()]
        others = {"head": self.recipe.quantize_head, "vision": self.recipe.quantize_vision}
        decided += [{part: word} for part, word in others.items() if word != "none"]
        return digest_of([self.digests, self.recipe.quantize, *decided])

    def made(self, bundle: Bundle) -> bool:
        """Whether this is the checkpoint that a bundle was exported from."""
        recorded = bundle.manifest["checkpoint"]
        return recorded.get("files") == self.fingerprints or recorded["sha256"] == self.digests

    @cached_property
    def sidecar_digests(self) -> dict[str, str]:
        """SHA-256 of tokenizer, chat template and processor files, on which prompts depend."""
        folder = self.source.checkpoint.sidecars
        parts = sidecars(folder, code=self.trust_remote_code)
        paths = {path for part in parts.values() for path in part}
        return {path.relative_to(folder).as_posix(): file_digest(path) for path in sorted(paths)}

    @property
    def prompt_settings(self) -> list[Any]:
        """All settings that a prompt depends on beside the conversation."""
        return [self.sidecar_digests, self.recipe.pictures.model_dump(exclude_none=True)]

    @cached_property
    def eager(self) -> Any:
        """The Hugging Face model, dense, in FP32."""
        import torch
        import transformers

        from capa_export.model.eager_attention import ATTENTION

        transformers.utils.logging.disable_progress_bar()
        architecture = getattr(transformers, self.family.ARCHITECTURE)
        folder = self.source.checkpoint.folder
        if self.source.checkpoint.translation is not None or self.source.rounds:
            from capa_export.model.streamed import read_model

            return read_model(self.source)
        with refusing(f"{folder}: transformers cannot load it", "use the files that were published together"):
            # Whatever attention the config asks for, from kernels that may not be here to none that there is.
            return architecture.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation=ATTENTION,
            ).eval()

    @property
    def holds_eager(self) -> bool:
        """Whether the eager model is in memory."""
        return "eager" in vars(self)

    def forget_eager(self) -> None:
        """Give the eager model's memory back; whoever asks for it loads it anew."""
        vars(self).pop("eager", None)

    @cached_property
    def prompter(self) -> Any:
        """The checkpoint's tokenizer, chat template and image processor."""
        from capa_export.model.prompt import Prompter

        folder = self.source.checkpoint.sidecars
        return Prompter(
            *(folder, folder, self.family, self.source.dims),
            bounds=self.recipe.pictures,
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def schedule(self) -> tuple[Stage, ...]:
        """The recipe's stages of pruning."""
        return self.recipe.prune.schedule

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the picture that plans are made for."""
        return visual_tokens(self.recipe, str(self.source.checkpoint.sidecars), self.source.dims)

    def check_pictures(self) -> None:
        """Refuse bounds of pictures that the model cannot keep.

        Raises:
            CapaError: there are some.
        """
        _ = self.visual_tokens

    def check_layers(self) -> None:
        """Refuse a schedule, or parts in FP32, that do not fit the model.

        Raises:
            CapaError: the decoder has no such layer, or the family does not offer a selector.
        """
        check_layers(self.recipe, self.source.dims.decoder.num_layers)
        for stage in self.schedule:
            if stage.chosen.reads_tower:
                require_selection(self.family, stage.selector)
        check_units(self.recipe.fp32_layers, self.source.dims)


def recorded_model(
    bundle: Bundle,
    *,
    checkpoint: str | None = None,
    revision: str | None = None,
    bounds: PixelBounds | None = None,
    trust_remote_code: bool = False,
    report: Report = silent,
) -> Model:
    """The model that a bundle was exported from, as its manifest names it.

    Args:
        bundle: exported.
        checkpoint: in place of the recorded one, which may have moved.
        revision: of `checkpoint`.
        bounds: of pictures, in place of the recorded ones.
        trust_remote_code: whether the checkpoint's own Python may run.
        report: progress.

    Raises:
        CapaError: nothing was exported, or the manifest is damaged.
    """
    bundle.stage("export")
    manifest = bundle.manifest
    recorded = manifest.get("checkpoint")
    if recorded is None:
        raise CapaError(f"{bundle.folder}: the export was interrupted; `capa-export export` finishes it")
    recipe = recipe_of(manifest, bundle.folder)
    choice = None
    if recipe.decided_by_samples and QUANTIZE in manifest["stages"]:
        bundle.verify(QUANTIZE)
        choice = WeightChoice.load(bundle.folder / CHOICE)
    return Model(
        recipe=recipe if bounds is None else recipe.model_copy(update={"pictures": bounds}),
        checkpoint=checkpoint or recorded["source"],
        revision=revision or (None if checkpoint else recorded["revision"]),
        trust_remote_code=trust_remote_code,
        named_by=None if checkpoint else str(bundle.folder),
        choice=choice,
        report=report,
    )
