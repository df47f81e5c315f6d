"""Counts what CAPA saves in every family, at all its layers, with and without text: `python -m benchmarks.flops`.

Nothing is run: the counts are those of `capa_export.plan.flops`, of the published dimensions.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.random_checkpoint import CONFIGS
from benchmarks.selection.pages.words import table
from capa_export.base.files import write_whole
from capa_export.config.recipe import load_recipe
from capa_export.model.families import load_family
from capa_export.plan.flops import flops

__all__ = ["DOCS", "counted", "page"]

DOCS = Path(__file__).resolve().parents[1] / "docs" / "results"
_MODELS = (
    ("Qwen2.5-VL-7B", "qwen25vl-7b", "qwen25vl", 1024),
    ("Qwen2.5-VL-3B", "qwen25vl-3b", "qwen25vl", 1024),
    ("LLaVA-1.5-7B", "llava15-7b", "llava15", 576),
    ("InternVL3-8B, 4 tiles", "internvl3-8b", "internvl3", 1024),
    ("InternVL3-8B, 13 tiles", "internvl3-8b", "internvl3", 3328),
)
_TEXT = 64
_INTRODUCTION = f"""# What CAPA saves, counted

[All results](README.md)

CAPA's paper says that 78 % of the FLOPs of prefill are saved. This page counts them, with three quarters of the visual
tokens removed behind a layer, for each model and each layer that its recipe names; *scales* is how many of the model's
FFNs become a scale for visual tokens, as the paper lists them, or none. Nothing was run: matrix products are counted
from the published dimensions, as `capa-export plan` counts them, and `python -m benchmarks.flops` writes this page.

- **visual tokens alone**: the decoder without text and without the last token's logits, as the paper seems to count.
- **with text**: the decoder with {_TEXT} tokens of text, which nothing is saved of, and the logits.
- **to the first token**: the vision tower too, which CAPA leaves as it is.

The 78 % come out as {{best}} % at most: at the earliest layer of the model where most is saved, visual tokens alone.
All else is less. The work until the first token falls by {{least}} to {{most}} % at each model's earliest layer."""


def counted() -> list[dict[str, Any]]:
    """A row for each model, layer and choice of FFNs: per cent of dense's FLOPs saved, and TFLOP."""
    rows: list[dict[str, Any]] = []
    for name, config, model, visual in _MODELS:
        recipe = load_recipe(model)
        dims = load_family(recipe.family).model_dims(CONFIGS[config])
        tower = dims.vision.flops(visual)
        paper = [layer for layer in recipe.ffn.paper_layers if layer < dims.decoder.num_layers]
        for layer in (recipe.prune.schedule[0].layer, *recipe.prune.alternatives):
            for linear in (paper, []):
                found = flops(
                    dims.decoder,
                    num_visual=visual,
                    num_text=_TEXT,
                    schedule=((layer, visual // 4),),
                    linear_layers=linear,
                )
                pairs = {
                    "visual_alone": (found.dense_visual.total, found.capa_visual.total),
                    "with_text": (found.dense.total, found.capa.total),
                    "first_token": (found.dense.total + tower, found.capa.total + tower),
                }
                rows.append(
                    {
                        "name": f"{name}@{layer}/{'scales' if linear else 'full'}",
                        "model": name,
                        "visual_tokens": visual,
                        "layer": layer,
                        "scales": len(linear),
                        "saved": {key: 100 * (1 - capa / dense) for key, (dense, capa) in pairs.items()},
                        "ratio": {key: dense / capa for key, (dense, capa) in pairs.items()},
                        "tower_tflop": tower / 1e12,
                        "tflop": {key: [dense / 1e12, capa / 1e12] for key, (dense, capa) in pairs.items()},
                    }
                )
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """The page of the rows."""
    counts = ["visual tokens alone", "with text", "to the first token"]
    header = ["model", "visual tokens", "behind layer", "scales", *counts]
    cells = [
        [
            row["model"],
            f"{row['visual_tokens']:,}",
            str(row["layer"]),
            str(row["scales"] or "none"),
            *(f"{saved:.1f} %" for saved in row["saved"].values()),
        ]
        for row in rows
    ]
    earliest = {row["model"]: row["layer"] for row in reversed(rows)}
    waited = [row["saved"]["first_token"] for row in rows if row["scales"] and row["layer"] == earliest[row["model"]]]
    words = _INTRODUCTION.format(
        best=f"{max(row['saved']['visual_alone'] for row in rows):.1f}",
        least=f"{min(waited):.0f}",
        most=f"{max(waited):.0f}",
    )
    return f"{words}\n\n{table(header, cells)}\n"


def main() -> None:
    """Command line."""
    rows = counted()
    write_whole(DOCS / "figures" / "flops.json", json.dumps({"rows": rows}, indent=1) + "\n")
    write_whole(DOCS / "flops.md", page(rows))


if __name__ == "__main__":
    main()
