"""Commands that look and change nothing: what is shipped, and what a bundle holds."""

from math import inf
from pathlib import Path
from typing import Annotated

import typer

from capa_export.base.errors import CapaError, ExitCode
from capa_export.cli.options import BundleArg, JsonOpt, MemoryOpt, TargetOpt, VerifyKeyOpt, VerifyOpt
from capa_export.cli.results import print_json

__all__ = ["doctor", "inspect", "models", "selectors", "targets"]


def inspect(
    bundle: BundleArg, verify: VerifyOpt = False, verify_key: VerifyKeyOpt = None, as_json: JsonOpt = False
) -> None:
    """Show what a bundle holds and what made it; check its files."""
    from capa_export.bundle.store import Bundle
    from capa_export.report.terminal import print_bundle

    opened = Bundle.open(bundle, read_all=verify, verify_key=verify_key)
    manifest = opened.manifest
    num_unread = opened.verify(*manifest["stages"])
    if as_json:
        print_json(manifest)
    else:
        print_bundle(opened.folder, manifest, num_unread)


def doctor(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder, to examine its graphs too.")] = None,
    target: TargetOpt = "rtx",
    memory: MemoryOpt = None,
    verify_key: VerifyKeyOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Say beforehand what would fail late. Tools, GPU, a bundle's graphs, profile, memory; exit code 3: a problem."""
    from dataclasses import asdict

    from capa_export.bundle.store import Bundle
    from capa_export.config.target import load_target
    from capa_export.report.terminal import print_line
    from capa_export.trt.doctor import examine

    device = load_target(target)
    if memory is not None and (bundle is None or device.engine is None):
        raise CapaError("--memory: give a bundle, and a target with engines, to hold against it", ExitCode.USAGE)
    if verify_key is not None and bundle is None:
        raise CapaError("--verify-key: give a bundle that it is to have signed", ExitCode.USAGE)
    found = examine(device, None if bundle is None else Bundle.open(bundle, verify_key=verify_key), memory)
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        for finding in found:
            print_line(
                f"{finding.verdict:<9}{finding.check}: {finding.detail}", "bold" if finding.verdict == "problem" else ""
            )
            if finding.remedy:
                print_line(f"{'':<9}{finding.remedy}")
    problems = [finding for finding in found if finding.verdict == "problem"]
    if problems:
        raise CapaError(f"{problems[0].check}: {problems[0].detail}")


_PLACES = {
    "attention": "after a layer's attention",
    "entry": "before a layer",
    "input": "before the decoder",
}


def models(as_json: JsonOpt = False) -> None:
    """List the shipped recipes, and the checkpoints each is for."""
    from capa_export.base.toml import shipped_names
    from capa_export.config.recipe import load_recipe
    from capa_export.config.schedule import schedule_text

    recipes = [load_recipe(name) for name in shipped_names("graphs")]
    if as_json:
        print_json([recipe.model_dump(mode="json") for recipe in recipes])
        return
    for recipe in recipes:
        others = f" (or at {', '.join(map(str, recipe.prune.alternatives))})" if recipe.prune.alternatives else ""
        where = "shipped with capa-export" if Path(recipe.checkpoint).is_dir() else recipe.checkpoint
        takes = f"; takes {', '.join(recipe.published)}" if recipe.published else ""
        print(f"{recipe.name:<16}{where:<32}prunes {schedule_text(recipe.prune.schedule)}{others}{takes}")


def selectors(as_json: JsonOpt = False) -> None:
    """List what can choose the visual tokens, and where each acts."""
    from capa_export.selectors.selector import SelectorChoice, load_selector, summary
    from capa_export.selectors.selector import selectors as names

    known = {name: load_selector(name) for name in names()}
    if as_json:
        print_json(
            [
                {
                    "name": name,
                    "place": one.place,
                    "layer": one.layer,
                    "least": SelectorChoice(name).least,
                    "reads": one.reads,
                    "options": {
                        option: {**setting._asdict(), "most": None if setting.most == inf else setting.most}
                        for option, setting in one.options.items()
                    },
                }
                for name, one in known.items()
            ]
        )
        return
    for name, one in known.items():
        print(f"{name:<14}{_PLACES[one.place]:<28}{summary(name)}")


def targets(as_json: JsonOpt = False) -> None:
    """List the shipped targets."""
    from capa_export.base.toml import shipped_names
    from capa_export.config.target import load_target

    known = [load_target(name) for name in shipped_names("engines")]
    if as_json:
        print_json([target.model_dump(mode="json") for target in known])
        return
    for target in known:
        made = target.engine
        where = f", built {made.built.replace('-', ' the ')}" if made else ""
        print(
            f"{target.name:<16}"
            + (
                f"SM {', '.join(made.compute_capabilities)}: {made.runtime} >={made.version_min},<{made.version_below}"
                + (f", JetPack {made.jetpack}" if made.jetpack else "")
                + where
                if made
                else "ONNX only"
            )
        )
