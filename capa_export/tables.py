"""Results as tables for people, on stdout."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from capa_export.doctor import Finding
from capa_export.dry_run import UNKNOWN
from capa_export.parity import restored
from capa_export.recipe import ranges, recipe_of

__all__ = ["bundle_table", "calibration_table", "doctor_table", "engine_table", "parity_table", "plan_table"]


def _console() -> Console:
    # Wide enough for every table where stdout is a file.
    return Console(highlight=False, width=None if Console().is_terminal else 120)


def _say(line: str, style: str = "") -> None:
    """One line, left to the terminal to wrap."""
    _console().print(line, style=style, markup=False, soft_wrap=True)


def _columns(*columns: str) -> Table:
    """The first column to the left, the others to the right; no headings where all of them are empty."""
    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _show(title: str, table: Table) -> None:
    _say(title, "bold")
    console = _console()
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        console.file.write(f"{line.rstrip()}\n")


def _gb(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"


def _gflops(number: float) -> str:
    return f"{number / 1e9:,.2f}"


def calibration_table(summary: dict[str, Any]) -> None:
    """Linearity per layer, then ranges and sinks."""
    table = _columns("layer", "cosine visual", "cosine text", "relative error", "sinks", "linear", "paper")
    for row in summary["layers"]:
        table.add_row(
            str(row["layer"]),
            f"{row['cosine_visual']:.4f}",
            f"{row['cosine_text']:.4f}",
            f"{row['relative_error']:.4f}",
            str(row["sink_tokens"]),
            "yes" if row["layer"] in summary["linear_layers"] else "",
            "yes" if row["layer"] in summary["paper_layers"] else "",
        )
    _show(f"Calibration on {summary['samples']} samples, {summary['visual_tokens']} visual tokens", table)
    largest = summary["largest"]
    _say(
        f"largest activation: {largest['absmax']:.4g} in {largest['block']} "
        f"({largest['of_fp16_max']:.1%} of FP16's range)"
    )
    _say(f"sink channels: {', '.join(map(str, summary['sink_channels'])) or 'none'}")


def doctor_table(found: Sequence[Finding]) -> None:
    """One line a look, and under it what would do."""
    for finding in found:
        _say(f"{finding.verdict:<9}{finding.check}: {finding.detail}", "bold" if finding.verdict == "problem" else "")
        if finding.remedy:
            _say(f"{'':<9}{finding.remedy}")


def engine_table(result: dict[str, Any]) -> None:
    """One row an engine, or where the kit is that builds them."""
    if not result["engines"]:
        _say(f"kit: {result['kit']} in the bundle; copy that folder to the device and run its build.sh there", "bold")
        return
    table = _columns("engine", "MB", "seconds", "peak GB", "layers", "custom", "weight copies")
    for name, row in result["engines"].items():
        peak = row["peak_memory_bytes"]
        table.add_row(
            name,
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['seconds']:.1f}",
            f"{peak / 1e9:.2f}" if peak else "",
            str(row["layers"]),
            str(row["custom_layers"]),
            str(row["weight_copies"]),
        )
    _show(f"Engines, weights {result['weights']}", table)


def parity_table(parity: dict[str, Any]) -> None:
    """Verdict first, then export error, then the method's own effect."""
    passed = parity["passed"]
    _say(f"parity: {'passed' if passed else 'FAILED'}", "bold green" if passed else "bold red")
    for failure in parity["failures"]:
        _say(f"  {failure}", "red")
    table = _columns("", "rel. error", "1 - cos", "norm", "kept IoU", "wrong", "same")
    for row in map(restored, parity["export_error"]):
        table.add_row(
            row["artefact"],
            f"{row['relative_error']:.1e}",
            f"{1 - row['cosine']:.1e}",
            f"{row['norm_ratio']:.1e}",
            f"{row['kept_iou_mean']:.4f}",
            f"{row['top1_wrong']}/{row['top1_counted']}",
            f"{row['same_tokens']}/{row['prompts']}",
        )
    _show('Export error: worst against eager CAPA in FP32 ("nothing removed": dense)', table)
    _say("wrong: top-1 tokens that differ; same: prompts whose tokens are all the same", "dim")
    effect = parity["method_error"]
    table = _columns("", "accuracy", "first token as dense", "KL from dense")
    for method in ("dense", "capa", "random"):
        accuracy = effect.get("accuracy", {}).get(method)
        same, divergence = effect["first_token_same_as_dense"].get(method), effect["kl_from_dense"].get(method)
        table.add_row(
            {"capa": "CAPA", "random": "random, same k"}.get(method, method),
            "" if accuracy is None else f"{accuracy:.1%}",
            "" if same is None else f"{same:.1%}",
            "" if divergence is None else f"{divergence:.4f}",
        )
    _show(f"Method error on {effect['questions']} questions, eager FP32", table)
    for note in parity["notes"]:
        _say(note, "dim")


def bundle_table(folder: Path, manifest: dict[str, Any]) -> None:
    """The stages of a bundle and what each left behind."""
    if "recipe" in manifest:
        recipe = recipe_of(manifest, folder)
        schedule = ", ".join(
            f"{stage.ratio:.0%} of visual tokens after layer {stage.layer}" for stage in recipe.prune.schedule
        )
        _say(f"{folder}: {recipe.name} from {manifest['checkpoint']['source']}, removes {schedule}")
    table = _columns("stage", "seconds", "peak GB", "files", "MB")
    for name, record in manifest["stages"].items():
        size = sum((folder / file).stat().st_size for file in record["files"])
        peak = record["peak_memory_bytes"] / 1e9
        table.add_row(name, f"{record['seconds']:.1f}", f"{peak:.2f}", str(len(record["files"])), f"{size / 1e6:.1f}")
    _show("Stages", table)
    _say("every file is as it was built")


def plan_table(plan: dict[str, Any]) -> None:
    """What a build would do."""
    for stage in plan["stages"]:
        _say(f"after layer {stage['layer']}: kept {stage['kept']} of {stage['visual']} visual tokens")
    basis = plan["linear_layers_from"]
    layers = basis if basis == UNKNOWN else f"in layers {ranges(plan['linear_layers'])} (from {basis})"
    _say(f"visual FFNs replaced: {layers}")
    prefill, kv, decode = plan["prefill"], plan["kv_cache"], plan["decode"]
    table = _columns("", "dense", "CAPA", "times less")
    rows = [
        ("prefill GFLOPs", prefill["dense"]["total"], prefill["capa"]["total"], _gflops),
        ("  visual tokens alone", prefill["dense_visual"]["total"], prefill["capa_visual"]["total"], _gflops),
        ("decode GFLOPs a token", decode["dense"], decode["capa"], _gflops),
        ("KV cache", kv["dense_bytes"], kv["capa_bytes"], _gb),
    ]
    for label, dense, capa, show in rows:
        table.add_row(label, show(dense), show(capa), f"{dense / capa:.2f}" if capa else "")
    table.add_row("vision tower GFLOPs", _gflops(plan["vision"]["total"]), _gflops(plan["vision"]["total"]), "1.00")
    _show(f"{plan['visual_tokens']} visual and {plan['text_tokens']} text tokens", table)
    for title, sizes in (("Files", plan["files"]), ("Memory, estimated", plan["memory"])):
        table = _columns("", "")
        for name, size in sizes.items():
            table.add_row(name, _gb(size))
        _show(title, table)
    if plan["refusal"]:
        _say(
            f"{plan['memory_available'] / 1e9:.1f} GB are available; a build would be refused: {plan['refusal']}", "red"
        )
