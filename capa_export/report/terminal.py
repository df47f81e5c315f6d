"""Results as tables for people, on stdout."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from capa_export.base.errors import harmless
from capa_export.base.statistics import Rate
from capa_export.config.recipe import ranges, recipe_of
from capa_export.report.schema import Check, MethodError, ParityReport
from capa_export.report.words import (
    by_stage,
    check_of,
    decimals,
    describe_check,
    open_warnings,
    percent,
    quantization_words,
)

__all__ = ["print_bundle", "print_calibration", "print_engines", "print_parity", "print_plan"]


def _console() -> Console:
    # Wide enough for every table where stdout is a file.
    return Console(highlight=False, width=None if Console().is_terminal else 120)


def print_line(line: str, style: str = "") -> None:
    """Print one line, left to the terminal to wrap."""
    _console().print(harmless(line), style=style, markup=False, emoji=False, soft_wrap=True)


class _Table(Table):
    """A table whose cells are shown as they are: a name from a file is no markup, and steers no terminal."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row of texts."""
        plain = [
            Text(harmless(cell.plain), cell.style) if isinstance(cell, Text) else Text(harmless(cell)) for cell in cells
        ]
        super().add_row(*plain, **options)


def make_table(*headings: str) -> Table:
    """A table with its first column to the left, the others to the right; headings that are all empty are not shown."""
    table = _Table(box=None, pad_edge=False, show_header=any(headings))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right")
    return table


def print_table(title: str, table: Table) -> None:
    """Print a title and a table, without blanks at the ends of lines."""
    print_line(title, "bold")
    console = _console()
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        console.file.write(f"{line.rstrip()}\n")


def _gb(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"


def _gflops(number: float) -> str:
    return f"{number / 1e9:,.2f}"


def print_calibration(summary: dict[str, Any]) -> None:
    """Print linearity per layer, then ranges and sinks."""
    table = make_table("layer", "cosine visual", "cosine text", "relative error", "sinks", "linear", "scale", "paper")
    for row in summary["layers"]:
        table.add_row(
            str(row["layer"]),
            f"{row['cosine_visual']:.4f}",
            f"{row['cosine_text']:.4f}",
            f"{row['relative_error']:.4f}",
            str(row["sink_tokens"]),
            "yes" if row["layer"] in summary["linear_layers"] else "",
            "yes" if row["layer"] in (summary["scaled_layers"] or ()) else "",
            "yes" if row["layer"] in summary["paper_layers"] else "",
        )
    print_table(f"Calibration on {summary['samples']} samples, {summary['visual_tokens']} visual tokens", table)
    largest = summary["largest"]
    print_line(
        f"largest activation: {largest['absmax']:.4g} in {largest['block']} "
        f"({largest['of_fp16_max']:.1%} of FP16's range)"
    )
    print_line(f"sink channels: {', '.join(map(str, summary['sink_channels'])) or 'none'}")


def print_engines(result: dict[str, Any]) -> None:
    """Print a row per engine, or where the kit is that builds them."""
    if not result["engines"]:
        print_line(
            f"kit: {result['kit']} in the bundle; copy that folder to the device and run its build.sh there", "bold"
        )
        return
    table = make_table("engine", "MB", "seconds", "peak GB", "layers", "custom", "weight copies")
    for name, row in result["engines"].items():
        peak = row["peak_memory_bytes"]
        table.add_row(
            name,
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['seconds']:.1f}",
            f"{peak / 1e9:.2f}" if peak else "",
            str(row["layers"]),
            f"{row['custom_layers']} of {row['capa_nodes']}" if "capa_nodes" in row else str(row["custom_layers"]),
            str(row["weight_copies"]),
        )
    print_table(f"Engines, weights {result['weights']}", table)


def print_parity(parity: ParityReport) -> None:
    """Print the verdict, then export error, selection, and the method's own effect."""
    print_line(f"parity: {'passed' if parity.passed else 'FAILED'}", "bold green" if parity.passed else "bold red")
    if parity.answers is not None:
        print_line(f"answers: {parity.answers.words}", "bold green" if parity.answers.passed else "bold red")
    for failure in parity.failures:
        print_line(f"  {failure}", "red")
    for warning in open_warnings(parity):
        print_line(f"  warning: {warning}", "red" if parity.strict else "yellow")
    if parity.bisection is not None:
        print_line(f"  {parity.bisection.sentence}", "bold")
    figures = {
        "relative error": "rel. error",
        "cosine": "1 - cos",
        "hidden cosine": "hidden",
        "KL": "KL",
        "top-1 wrong": "wrong",
        "same tokens": "same",
    }
    table = make_table("", *figures.values())
    for row in parity.export_error:
        cells = [_cell(check_of(row.checks, figure)) for figure in figures]
        other = row.reference.removeprefix("eager CAPA ")
        if any(cells):
            table.add_row(Text(row.artefact if other.endswith("fp32") else f"{row.artefact}, {other}"), *cells)
    print_table("Export error: worst of all prompts and steps, against eager FP32 or what is named", table)
    print_line(
        "hidden: 1 - cos of hidden states; wrong: top-1 tokens that differ; same: prompts with the same tokens", "dim"
    )
    table = make_table("", "layer", "mean IoU", "bound", "flipped", "furthest flip")
    for row in parity.selection:
        for stage, checks in by_stage(row):
            bad = "red" if any(check.failure for check in checks if check.name.startswith("kept-set IoU")) else ""
            table.add_row(
                Text(row.artefact),
                str(stage.layer) if stage.layer >= 0 else "input",
                Text(decimals(stage.iou_mean), bad),
                decimals(stage.iou_bound),
                f"{stage.flipped}/{row.prompts}",
                _cell(check_of(checks, "furthest flip")),
            )
    if parity.selection:
        print_table("Selection: visual tokens kept, as the reference does", table)
    _print_method(parity.method_error)
    if parity.quantization_error is not None:
        print_line(quantization_words(parity.quantization_error))
    for note in parity.notes:
        print_line(note, "dim")


def _print_method(found: MethodError) -> None:
    table = make_table("", "accuracy", "first token", "answer", "KL from dense")
    for method in found.methods:
        shares = [_share(share) for share in (method.accuracy, method.top1, method.same_answer)]
        table.add_row(found.label(method.name), *shares, "" if method.name == "dense" else decimals(method.kl))
    if found.methods:
        print_table(
            f"Method error on {found.questions} questions, eager FP32: right, and as dense (95% interval)", table
        )
    for sentence in found.words:
        print_line(sentence)


def _share(found: Rate | None) -> str:
    if found is None:
        return ""
    return f"{percent(found.value)} ({100 * found.low:.0f}-{100 * found.high:.0f})"


def _cell(check: Check | None) -> Text:
    """A check's figure, red where it fails; blank where it was not measured."""
    if check is None:
        return Text("")
    found = describe_check(check)
    return Text(found.value.replace(" of ", "/"), style="red" if found.failed else "")


def print_bundle(folder: Path, manifest: dict[str, Any], num_unread: int = 0) -> None:
    """Print the stages of a bundle and the files of each; `num_unread` of all were checked by size and time alone."""
    if "recipe" in manifest:
        recipe = recipe_of(manifest, folder)
        schedule = ", ".join(
            f"{stage.ratio:.0%} of visual tokens {stage.where} by {stage.selector}" for stage in recipe.prune.schedule
        )
        source = (manifest.get("checkpoint") or {}).get("source", "a checkpoint that is not recorded")
        print_line(f"{folder}: {recipe.name} from {source}, removes {schedule}")
    table = make_table("stage", "seconds", "peak GB", "files", "MB")
    for name, record in manifest["stages"].items():
        size = sum((folder / file).stat().st_size for file in record["files"])
        peak = record.get("peak_memory_bytes", 0) / 1e9
        table.add_row(
            name, f"{record.get('seconds', 0):.1f}", f"{peak:.2f}", str(len(record["files"])), f"{size / 1e6:.1f}"
        )
    print_table("Stages", table)
    exported = manifest["stages"].get("export", {}).get("result", {})
    if "not_for_genai" in exported:
        reason = exported["not_for_genai"]
        print_line(
            "runs in onnxruntime-genai: its onnx folder" if reason is None else f"not for onnxruntime-genai: {reason}",
            "dim",
        )
    if (reason := exported.get("needs_transformers")) is not None:
        print_line(f"needs torch and transformers to run: {reason}", "dim")
    unread = f", {num_unread} of them by size and time since they were last read (--verify reads all)"
    print_line(f"every file is as it was built{unread if num_unread else ''}")


def print_plan(plan: dict[str, Any]) -> None:
    """Print the result of `dry_run`."""
    from capa_export.plan.plan import UNKNOWN

    if plan["forecast"]:
        _print_forecast(plan)
    for stage in plan["stages"]:
        print_line(f"{stage['where']}: kept {stage['kept']} of {stage['visual']} visual tokens")
    basis = plan["linear_layers_from"]
    layers = basis if basis == UNKNOWN else f"layers {ranges(plan['linear_layers'])}; from {basis}"
    print_line(f"visual FFNs replaced: {layers}")
    if plan["plain_layers"] is None:
        print_line("all layers are counted as rounded; those that --auto-precision leaves plain add to sizes and times")
    elif plan["plain_layers"]:
        print_line(f"layers {ranges(plan['plain_layers'])} stay {plan['precision']}")
    prefill, kv, decode = plan["prefill"], plan["kv_cache"], plan["decode"]
    table = make_table("", "dense", "CAPA", "times less")
    rows = [
        ("prefill GFLOPs", prefill["dense"]["total"], prefill["capa"]["total"], _gflops),
        ("  visual tokens alone", prefill["dense_visual"]["total"], prefill["capa_visual"]["total"], _gflops),
        ("decode GFLOPs a token", decode["dense"], decode["capa"], _gflops),
        ("KV cache", kv["dense_bytes"], kv["capa_bytes"], _gb),
    ]
    for label, dense, capa, written in rows:
        table.add_row(label, written(dense), written(capa), f"{dense / capa:.2f}" if capa else "")
    table.add_row("vision tower GFLOPs", _gflops(plan["vision"]["total"]), _gflops(plan["vision"]["total"]), "1.00")
    width, height = plan["picture"]
    title = f"{plan['visual_tokens']} visual tokens of a picture of {width} x {height}, {plan['text_tokens']} of text"
    print_table(title, table)
    if plan["calibrated_visual_tokens"] is not None:
        print_line(f"calibration: {plan['calibrated_visual_tokens']:.0f} visual tokens a prompt, on average")
    for title, sizes in (("Files", plan["files"]), ("Memory, estimated", plan["memory"])):
        table = make_table("", "")
        for name, size in sizes.items():
            table.add_row(name, _gb(size))
        print_table(title, table)
    if plan["device"] is not None:
        _print_device(plan)
    for refusal in plan["refusals"]:
        print_line(f"a build would be refused: {refusal}", "red")


def _print_forecast(plan: dict[str, Any]) -> None:
    """Print how long the target's devices take, as far as their data sheets tell."""
    from capa_export.plan.forecast import ANSWER

    table = make_table("ms", "vision", "first", "CAPA", "token", "CAPA", f"{ANSWER}th", "CAPA")
    for one in plan["forecast"]:
        dense, capa = one["dense"], one["capa"]
        pairs = [_ms(way[key]) for key in ("first", "token", "last") for way in (dense, capa)]
        table.add_row(one["device"], _ms(dense["vision"]), *pairs)
    title = f"to the first token, a token, and to the {ANSWER}th; {plan['visual_tokens']} visual tokens"
    print_table(f"Forecast from data sheets, not measured: {title}", table)


def _ms(milliseconds: float) -> str:
    if milliseconds < 1:
        return f"{milliseconds:.2f}" if milliseconds >= 0.01 else "<0.01"
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _print_device(plan: dict[str, Any]) -> None:
    """Print the memory that the device needs, and the devices that have room for it."""
    device, table = plan["device"], make_table("", "")
    names = {"weights": "weights", "kv_cache": "KV cache, as held", "contexts": "activations", "runtime": "the rest"}
    for key, name in {**names, "total": "together"}.items():
        table.add_row(name, _gb(device[key]))
    print_table(f"Memory of {device['target']} while it answers, estimated", table)
    if plan["weights"] is not None:
        print_line(f"weights {plan['weights']}: {plan['weights_because']}")
    for fits, words in ((True, "has room"), (False, "too small")):
        if names := [f"{name} ({size:g} GB)" for name, size, has_room in device["devices"] if has_room == fits]:
            print_line(f"{words}: {', '.join(names)}")
