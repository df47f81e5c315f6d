"""Says which published model fits which board in which type, and how fast by forecast: `python -m benchmarks.boards`.

Nothing is run: the figures are those of `capa-export plan --json` over configs of the published dimensions. Writes
docs/results/boards.md, and the figures beside it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.random_checkpoint import CONFIGS
from benchmarks.selection.pages.words import table
from capa_export.base.errors import CapaError
from capa_export.base.files import write_whole
from capa_export.config.recipe import load_recipe
from capa_export.config.target import load_target
from capa_export.plan.plan import dry_run

__all__ = ["DOCS", "counted", "page"]

DOCS = Path(__file__).resolve().parents[1] / "docs" / "results"
_MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Qwen2.5-VL-3B": ("qwen25vl", CONFIGS["qwen25vl-3b"]),
    "Qwen2.5-VL-7B": ("qwen25vl", CONFIGS["qwen25vl-7b"]),
    "Qwen3-VL-2B": ("qwen3vl", CONFIGS["qwen3vl-2b"]),
    "Qwen3-VL-4B": ("qwen3vl", CONFIGS["qwen3vl-4b"]),
    "Qwen3-VL-8B": ("qwen3vl", CONFIGS["qwen3vl-8b"]),
    "InternVL3-2B": ("internvl3", CONFIGS["internvl3-2b"]),
    "InternVL3-8B": ("internvl3", CONFIGS["internvl3-8b"]),
    "LLaVA-1.5-7B": ("llava15", CONFIGS["llava15-7b"]),
}
"""Name -> its recipe and its config."""
_TARGETS = ("orin", "thor", "spark", "rtx")
_TYPES = ("fp16", "int8", "int4")
"""From the heaviest to the lightest."""
_INTRODUCTION = """# Which model fits which board

[All results](README.md)

Nothing was run: the figures are those of `capa-export plan --target TARGET --quantize TYPE --json` for the published
dimensions, and `python -m benchmarks.boards` writes this page. Memory is what is held while one picture of
{pictures} pixels is answered, at the largest shapes of the shipped targets, system included; a model fits a board that
has as much. Times are [the forecast](../forecast.md) from data sheets: Orin was met within a factor of 1.4, and Thor's
time to the first token is a lower bound. CAPA is as the model's recipe has it, its linear layers those that the paper
lists. In INT8 and INT4, the decoder's layers are in [few bits](../quantized.md); tower, embedding and LM head are in
FP16.

Engines of prefill and decode share weights of FP16. Those of few bits are in [one engine that is
both](../quantized.md#one-engine-that-is-prefill-and-decode) on RTX and Spark, where the decoder has more than 1 GiB; on
Orin and Thor they are counted twice, since nobody has seen whether the TensorRT there holds them once. INT8 takes
{int8} % of the memory of FP16, and INT4 {int4} %, tower, LM head and system included; both save time at each token
besides."""


def counted() -> list[dict[str, Any]]:
    """A row for each model and board: GB, tokens a second and ms to the first token, by type."""
    rows: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        for model, (recipe_name, config) in _MODELS.items():
            Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
            for target_name in _TARGETS:
                target = load_target(target_name)
                for kind in _TYPES:
                    recipe = load_recipe(recipe_name).with_options(quantize=None if kind == "fp16" else kind)
                    try:
                        plan = dry_run(recipe, folder, None, "fp16", ffn=True, target=target)
                    except CapaError:
                        if kind in (target.require_engine().weight_types or ()):
                            raise
                        continue
                    forecasts = {one["device"]: one for one in plan["forecast"]}
                    for board, memory, fits in plan["device"]["devices"]:
                        row = rows.setdefault(
                            f"{model}/{board}",
                            {
                                "name": f"{model}/{board}",
                                "model": model,
                                "board": board,
                                "target": target_name,
                                "memory_gb": memory,
                                "picture": plan["picture"],
                                "visual_tokens": plan["visual_tokens"],
                                "types": {},
                            },
                        )
                        times = {way: forecasts[board][way] for way in ("dense", "capa")}
                        row["types"][kind] = {
                            "gb": plan["device"]["total"] / 1e9,
                            "fits": fits,
                            "tokens_a_second": {way: 1000 / one["token"] for way, one in times.items()},
                            "first_ms": {way: one["first"] for way, one in times.items()},
                            "last_ms": {way: one["last"] for way, one in times.items()},
                        }
    return list(rows.values())


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page of the rows."""
    pictures = sorted({"{} x {}".format(*row["picture"]) for row in rows})
    tokens = ", ".join(f"{model} {_of(rows, model)[0]['visual_tokens']:,}" for model in _MODELS)
    boards = {row["board"]: row["memory_gb"] for row in rows}
    by_name = {row["name"]: row for row in rows}

    def cells(words: Any) -> Iterator[list[str]]:
        for board, memory in boards.items():
            yield [f"{board} ({memory:g})", *(words(by_name[f"{model}/{board}"]) for model in _MODELS)]

    needed = [
        [model, kind, *(_gigabytes(_of(rows, model), target, kind) for target in _TARGETS)]
        for model in _MODELS
        for kind in _TYPES
    ]
    sections = (
        _INTRODUCTION.format(pictures=" and ".join(pictures), int8=_share(rows, "int8"), int4=_share(rows, "int4")),
        f"Visual tokens: {tokens}; text, 48.",
        "## What fits, and tokens a second",
        "Boards with their GB; every type that fits, with CAPA's tokens a second; nothing where none fits:",
        table(["board", *_MODELS], cells(_speeds)),
        "## To the first token, ms",
        "Of the lightest type that fits, dense and with CAPA:",
        table(["board", *_MODELS], cells(_first)),
        "## Memory, GB",
        "Nothing where the target has no such type:",
        table(["model", "type", *_TARGETS], needed),
    )
    return "\n\n".join(sections) + "\n"


def _of(rows: Sequence[Mapping[str, Any]], model: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["model"] == model]


def _share(rows: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Least and most memory of a type, in % of that of FP16."""
    shares = [100 * row["types"][kind]["gb"] / row["types"]["fp16"]["gb"] for row in rows if kind in row["types"]]
    return f"{min(shares):.0f} to {max(shares):.0f}"


def _gigabytes(rows: Sequence[Mapping[str, Any]], target: str, kind: str) -> str:
    found = {row["types"][kind]["gb"] for row in rows if row["target"] == target and kind in row["types"]}
    return "".join(f"{size:.1f}" for size in found)


def _speeds(row: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{kind} {_digits(found['tokens_a_second']['capa'])}" for kind, found in row["types"].items() if found["fits"]
    )


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _first(row: Mapping[str, Any]) -> str:
    fitting = [found for found in row["types"].values() if found["fits"]]
    return "{dense:,.0f}, {capa:,.0f}".format(**fitting[-1]["first_ms"]) if fitting else ""


def main() -> None:
    """Command line."""
    rows = counted()
    write_whole(DOCS / "figures" / "boards.json", json.dumps({"rows": rows}, indent=1) + "\n")
    write_whole(DOCS / "boards.md", page(rows))


if __name__ == "__main__":
    main()
