"""A built bundle, to be loaded, validated, compared and explained."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capa_export.api.signing import signer_of
from capa_export.base.progress import Report, silent
from capa_export.base.toml import read_toml
from capa_export.base.workers import Workers
from capa_export.bundle import store
from capa_export.config.gates import GateFile, Limits
from capa_export.config.plugins import PluginWish
from capa_export.config.provider import Provider
from capa_export.config.target import load_target
from capa_export.config.weights import WeightsWish
from capa_export.model.model import recorded_model
from capa_export.report.schema import ParityReport, read_parity
from capa_export.run.bundled import bundled_bounds

if TYPE_CHECKING:
    from capa_export.run.answer import VisionLanguageModel
    from capa_export.study.compare.schema import BundleComparison
    from capa_export.study.evaluate.schema import Evaluation
    from capa_export.study.explain.schema import Explanation

__all__ = ["AnyPath", "Bundle", "open", "path_of"]

AnyPath = str | Path


def path_of(given: AnyPath | None) -> Path | None:
    """The path that a caller gave, if any."""
    return None if given is None else Path(given)


class Bundle:
    """A folder that a build left: graphs, weights, engines, and the report on them.

    Args:
        folder: with a manifest.
        verify_key: file of the Ed25519 public key that must have signed it; every file is then read when it is used.

    Raises:
        CapaError: it is no bundle, or its manifest is damaged, or not signed with that key.
    """

    def __init__(self, folder: AnyPath, *, verify_key: AnyPath | None = None) -> None:
        self._verify_key = path_of(verify_key)
        self._store = store.Bundle.open(Path(folder), verify_key=self._verify_key)

    def __repr__(self) -> str:
        return f"Bundle({str(self.folder)!r})"

    @property
    def folder(self) -> Path:
        """Where the bundle lies."""
        return self._store.folder

    @property
    def manifest(self) -> dict[str, Any]:
        """What made the bundle, stage by stage, as `capa_manifest.json` has it."""
        return self._store.manifest

    @property
    def parity(self) -> ParityReport:
        """The last validation's report, as `parity.json` has it.

        Raises:
            CapaError: the bundle was not validated, or the report was changed since.
        """
        self._store.verify("validate")
        return read_parity(self.folder / store.PARITY)

    def load(
        self,
        *,
        engine: str | None = None,
        provider: Provider = "cpu",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        trust_remote_code: bool = False,
        verify: bool = False,
    ) -> "VisionLanguageModel":
        """Load graphs or engines, tokenizer and image processor, to be asked as often as wished.

        Args:
            engine: target whose engines are run on the GPU; None for ONNX Runtime.
            provider: of ONNX Runtime, as `cuda`.
            min_pixels: least area that a picture is resized to, in place of the bundle's.
            max_pixels: largest area, in place of the bundle's.
            trust_remote_code: whether Python in the bundle may run, for its tokenizer and image processor.
            verify: whether to read also the files that have not changed since they were read last.

        Raises:
            CapaError: a file of the bundle was changed, or its engines or this machine do not take it.
        """
        from capa_export.run.answer import VisionLanguageModel

        opened = store.Bundle.open(self.folder, read_all=verify, verify_key=self._verify_key)
        bounds = bundled_bounds(opened, min_pixels, max_pixels, engine=engine)
        return VisionLanguageModel(
            opened, engine=engine, provider=provider, bounds=bounds, trust_remote_code=trust_remote_code
        )

    def build_engines(
        self,
        target: str = "rtx",
        *,
        weights: WeightsWish = "auto",
        kit: bool = False,
        plugins: PluginWish = "auto",
        plugin_library: AnyPath | None = None,
        sign: AnyPath | None = None,
        progress: Report = silent,
    ) -> dict[str, Any]:
        """Build the engines for a target, or the kit that builds them on the device; returns what became of them.

        Args:
            target: a name that `capa-export targets` lists, or the path of a .toml.
            weights: where engines find theirs.
            kit: whether to write a kit where engines are otherwise built with the GPU that is here.
            plugins: what computes the CAPA nodes.
            plugin_library: the library of native plugins.
            sign: file of the Ed25519 private key that signs the bundle, and a kit in it, when it is done.
            progress: told how far the work is.

        Raises:
            CapaError: the target cannot be built for here, or a build failed.
        """
        from capa_export.trt.stage import build_engines

        bundle, signer = signer_of(self._store, sign, self._verify_key)
        built = build_engines(
            *(bundle, load_target(target).for_kit() if kit else load_target(target)),
            weights=weights,
            plugins=plugins,
            plugin_library=path_of(plugin_library),
            report=progress,
        )
        if signer is not None:
            signer.sign()
        return built

    def validate(
        self,
        *,
        checkpoint: str | None = None,
        revision: str | None = None,
        images: AnyPath | None = None,
        samples: int | None = None,
        seed: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        layer_by_layer: bool | None = None,
        recipe: str | None = None,
        gate: AnyPath | None = None,
        strict: bool = False,
        accept_method_loss: bool = False,
        bisect: bool = False,
        store_golden: int = 0,
        engine: str | None = None,
        provider: Provider = "cpu",
        trust_remote_code: bool = False,
        sign: AnyPath | None = None,
        progress: Report = silent,
    ) -> ParityReport:
        """Hold the bundle against the eager model; where nothing is asked, against golden samples if there are any.

        Args:
            checkpoint: where the eager model is, in place of where the bundle found it.
            revision: of a hub id.
            images: pictures and questions; the recipe's scenes where there are none.
            samples: prompts to compare and questions to ask, in place of the recipe's numbers.
            seed: of other samples than the usual ones.
            min_pixels: least area that a picture is resized to, in place of the bundle's.
            max_pixels: largest area, in place of the bundle's.
            layer_by_layer: whether to hold one layer's weights in memory; None where the models do not fit.
            recipe: whose gates and bounds hold, a name or the path of a .toml; None for the shipped one of the
                bundle's name, or else the bundle's own, which the report then says.
            gate: TOML file with bounds in place of the recipe's.
            strict: whether warnings are failures.
            accept_method_loss: whether the bundle is fit to ship however many answers the method changes.
            bisect: whether to find the operator at fault where the gates fail.
            store_golden: samples to leave in the bundle, to validate without a checkpoint.
            engine: target whose engines are run on the GPU, too.
            provider: of ONNX Runtime, which runs the graphs.
            trust_remote_code: whether the checkpoint's own Python may run.
            sign: file of the Ed25519 private key that signs the bundle where it is found fit to ship.
            progress: told how far the work is.

        Raises:
            CapaError: a file of the bundle was changed, or the checkpoint is another. Gates that do not hold raise
                nothing: the report says so.
        """
        from capa_export.config.options import ValidationOptions
        from capa_export.config.recipe import judging_recipe, recipe_of
        from capa_export.parity.golden import GOLDEN
        from capa_export.parity.stage import validate

        bundle, signer = signer_of(self._store, sign, self._verify_key)
        judge, note = judging_recipe(recipe_of(self.manifest, self.folder), recipe)
        given = (checkpoint, revision, images, samples, seed, min_pixels, max_pixels)
        live = bisect or store_golden or any(option is not None for option in given)
        options = ValidationOptions(
            images=path_of(images),
            layer_by_layer=layer_by_layer,
            engine=engine,
            golden=not live and GOLDEN in self.manifest["stages"],
            samples=samples,
            seed=seed,
            gate=path_of(gate),
            note=note,
            strict=strict,
            accept_method_loss=accept_method_loss,
            bisect=bisect,
            store_golden=store_golden,
            provider=provider,
        )
        bounds = bundled_bounds(bundle, min_pixels, max_pixels, engine=engine)
        model = recorded_model(
            bundle,
            checkpoint=checkpoint,
            revision=revision,
            bounds=bounds,
            trust_remote_code=trust_remote_code,
            report=progress,
        )
        judged = model.recipe.model_copy(update={"parity": judge.parity, "method": judge.method})
        parity = validate(model.with_recipe(judged), bundle, options)
        if signer is not None:
            signer.sign(fit=parity.fit)
        return parity

    def compare(
        self,
        candidate: "Bundle | AnyPath",
        *,
        images: AnyPath | None = None,
        samples: int | None = None,
        gate: AnyPath | None = None,
        trust_remote_code: bool = False,
        progress: Report = silent,
    ) -> "BundleComparison":
        """Say what a candidate would change: recipe, kept tokens, logits, answers, size and speed.

        Args:
            candidate: the bundle that is to take this one's place; a folder must have been signed as this one was.
            images: pictures and questions; where neither these nor `samples` are given, a bundle's golden samples.
            samples: how many to ask about.
            gate: TOML file with a table [compare] of what may be lost.
            trust_remote_code: whether Python in the bundles may run.
            progress: told how far the work is.

        Raises:
            CapaError: a bundle was changed, or the two cannot be compared. A regression raises nothing: the comparison
                says so.
        """
        from capa_export.study.compare.bundles import compare

        other = candidate if isinstance(candidate, Bundle) else Bundle(candidate, verify_key=self._verify_key)
        return compare(
            *(self._store, other._store),  # noqa: SLF001 - its own kind.
            images=path_of(images),
            samples=samples,
            limits=Limits() if gate is None else read_toml(Path(gate), GateFile).compare,
            trust_remote_code=trust_remote_code,
            report=progress,
        )

    def evaluate(
        self,
        data: AnyPath,
        *,
        out: AnyPath,
        methods: Sequence[str] = (),
        benchmark: str | None = None,
        split: str | None = None,
        instruction: str | None = None,
        limit: int | None = None,
        seed: int = 0,
        max_new_tokens: int = 32,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        provider: Provider = "cpu",
        workers: int | None = None,
        ray: str | None = None,
        trust_remote_code: bool = False,
        progress: Report = silent,
    ) -> "Evaluation":
        """Ask the bundle's graphs the same questions at several ratios, and compare the answers with dense's.

        Args:
            data: questions with pictures, a .jsonl file or a dataset's folder; or pictures alone.
            out: folder that takes the answers and `evaluation.json`; what it holds already is not asked again.
            methods: the bundle's schedule at other ratios, as `capa@2:0.9`; its own where there is none.
            benchmark: how rows are read and scored, as `vqav2`; None to tell by the columns.
            split: part of a dataset that has several.
            instruction: said behind every question; None for the benchmark's own.
            limit: rows, drawn at random; None for all.
            seed: of the rows drawn, and of the intervals.
            max_new_tokens: longest answer.
            min_pixels: least area that a picture is resized to, in place of the bundle's.
            max_pixels: largest area, in place of the bundle's.
            provider: of ONNX Runtime.
            workers: processes that share the questions.
            ray: address of a cluster that does.
            trust_remote_code: whether Python in the bundle may run, for its tokenizer and image processor.
            progress: told how far the work is.

        Returns:
            Every method's scores, dense first. Rows that cannot be asked raise nothing: `skipped` lists them.

        Raises:
            CapaError: the graphs do not do a method, a file of the bundle was changed, there is nothing to ask, or
                `out` is of another model.
        """
        from capa_export.config.recipe import recipe_of
        from capa_export.data.questions import questions_from
        from capa_export.study.evaluate.models import bundle_model, parse_methods, product_of_methods
        from capa_export.study.evaluate.stage import evaluate

        recipe = recipe_of(self.manifest, self.folder)
        bounds = recipe.pictures.for_bundle(min_pixels, max_pixels)
        parsed = parse_methods(methods or product_of_methods(recipe))
        questions = questions_from(
            Path(data),
            benchmark=benchmark,
            split=split,
            instruction=instruction,
            question=recipe.calibration.prompt,
            limit=limit,
            seed=seed,
        )
        processes = Workers(count=workers, ray=ray)
        evaluated = bundle_model(
            *(self._store, parsed, max_new_tokens),
            bounds=bounds,
            provider=provider,
            workers=processes,
            trust_remote_code=trust_remote_code,
        )
        return evaluate(evaluated, questions, Path(out), workers=processes, seed=seed, report=progress)

    def explain(
        self,
        question: str,
        images: Sequence[AnyPath],
        *,
        page: AnyPath | None = None,
        methods: Sequence[str] = (),
        layer: int | None = None,
        checkpoint: str | None = None,
        revision: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_new_tokens: int = 64,
        trust_remote_code: bool = False,
        progress: Report = silent,
    ) -> "Explanation":
        """Run the eager model on one prompt, once for every method, and draw what each keeps.

        Args:
            question: asked behind the pictures.
            images: picture files.
            page: HTML file to write.
            methods: as `capa@2:0.75`; all selectors where there is none.
            layer: that is looked at, in place of the bundle's first.
            checkpoint: where the eager model is, in place of where the bundle found it.
            revision: of a hub id.
            min_pixels: least area that a picture is resized to, in place of the bundle's.
            max_pixels: largest area, in place of the bundle's.
            max_new_tokens: longest answer.
            trust_remote_code: whether the checkpoint's own Python may run.
            progress: told how far the work is.

        Raises:
            CapaError: a picture does not load, a method does not fit, or the checkpoint is another.
        """
        from capa_export.study.explain.page import write_page
        from capa_export.study.explain.stage import explain

        model = recorded_model(
            self._store,
            checkpoint=checkpoint,
            revision=revision,
            bounds=bundled_bounds(self._store, min_pixels, max_pixels),
            trust_remote_code=trust_remote_code,
            report=progress,
        )
        pictures = [Path(image) for image in images]
        found, surfaces = explain(
            *(model, self._store, pictures, question, methods), layer=layer, max_new_tokens=max_new_tokens
        )
        if page is not None:
            write_page(Path(page), found, surfaces)
        return found


def open(folder: AnyPath, *, verify_key: AnyPath | None = None) -> Bundle:  # noqa: A001 - capa_export.open reads as it should.
    """Open a bundle.

    Args:
        folder: with a manifest.
        verify_key: file of the Ed25519 public key that must have signed it.

    Raises:
        CapaError: there is none in the folder, or its manifest is damaged, or not signed with that key.
    """
    return Bundle(folder, verify_key=verify_key)
