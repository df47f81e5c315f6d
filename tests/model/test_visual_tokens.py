"""What a plan says of visual tokens is what the checkpoint makes of such a picture."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from capa_export.base.errors import CapaError
from capa_export.config.pixels import PixelBounds, stored_settings
from capa_export.config.recipe import load_recipe, recipe_of
from capa_export.config.target import load_target
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.prompt import Prompter
from capa_export.model.source import Source
from capa_export.model.visual_tokens import visual_tokens
from capa_export.plan.plan import dry_run
from tests.models import FAMILIES
from tests.models.internvl3 import save_original


def with_sizes(folder: Path, **settings: Any) -> None:
    """Change what the image processor's file says."""
    path = next(path for name in ("preprocessor", "processor") if (path := folder / f"{name}_config.json").is_file())
    data = json.loads(path.read_text(encoding="utf-8"))
    data.update(settings)
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_counts_the_checkpoints_own(family: str, tmp_path: Path) -> None:
    module = FAMILIES[family]
    module.save_model(tmp_path, module.random_model())
    source = Source.of(open_checkpoint(str(tmp_path)), load_family(family))
    recipe = load_recipe(family).with_options(prune_layer=1)
    changes: list[dict[str, Any]] = [{}]
    if family.startswith("qwen"):
        changes += [{"size": {"shortest_edge": 4000, "longest_edge": 90_000}}, {"max_pixels": 50_000}]
        changes += [{"size": {"shortest_edge": 3136.0, "longest_edge": 50176.0}}]
    elif family == "internvl3":
        changes += [{"max_patches": 3}]
    for change in changes:
        with_sizes(tmp_path, **change)
        for size in ((896, 896), (300, 500)):
            for bounds in (PixelBounds(), PixelBounds(max_rows=5, max_cols=5, max_tiles=3)):
                shown = recipe.model_copy(update={"picture": size, "pictures": bounds})
                plan = dry_run(shown, str(tmp_path), None, "fp16", ffn=True)
                prompter = Prompter(tmp_path, tmp_path, source.family, source.dims, bounds=bounds)
                prompt = prompter("what ?", [Image.new("RGB", size)])
                assert plan["visual_tokens"] == prompt.num_visual
                assert plan["stages"][0]["kept"] == shown.prune.num_keep(prompt.image_lengths)[0]
                assert plan["picture"] == list(size)


@pytest.mark.parametrize("given", [{"max_dynamic_patch": 2}, {"min_dynamic_patch": 3, "max_dynamic_patch": 5}, {}])
def test_a_plan_counts_the_same_of_the_authors_layout(given: dict[str, int], tmp_path: Path) -> None:
    """Whose config says what transformers' image processor is told."""
    save_original(tmp_path / "original", FAMILIES["internvl3"].random_model(), **given)
    source = Source.of(open_checkpoint(str(tmp_path / "original")), load_family("internvl3"))
    sidecars = source.checkpoint.sidecars
    recipe = load_recipe("internvl3").with_options(prune_layer=1)
    for size in ((896, 896), (300, 500), (30, 40)):
        shown = recipe.model_copy(update={"picture": size})
        plan = dry_run(shown, str(tmp_path / "original"), None, "fp16", ffn=True)
        prompt = Prompter(sidecars, sidecars, source.family, source.dims)("what ?", [Image.new("RGB", size)])
        assert plan["visual_tokens"] == prompt.num_visual == visual_tokens(shown, str(sidecars), source.dims)


def test_a_llava_of_few_tokens_is_not_told_of_576(tmp_path: Path) -> None:
    """Its config alone says how many."""
    module = FAMILIES["llava15"]
    module.save_model(tmp_path / "whole", module.random_model())
    (tmp_path / "config").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "config")
    recipe = load_recipe("llava15").with_options(prune_layer=1)
    plan = dry_run(recipe, str(tmp_path / "config"), None, "fp16", ffn=True)
    assert plan["visual_tokens"] == (module.SIDE // module.PATCH) ** 2 != 576
    bounded = recipe.with_options(max_pixels=9999)
    with pytest.raises(CapaError, match="--max-pixels 9999: this model sees every picture at"):
        dry_run(bounded, str(tmp_path / "config"), None, "fp16", ffn=True)


def test_where_an_image_processor_keeps_its_sizes() -> None:
    edges = {"shortest_edge": 5, "longest_edge": 6}
    assert stored_settings({}) == {"size": {}}
    assert stored_settings({"preprocessor_config.json": {"size": edges, "max_pixels": 9}}) == {
        "size": {"shortest_edge": 5, "longest_edge": 9}
    }
    both = {
        "processor_config.json": {"image_processor": {"size": edges}},
        "preprocessor_config.json": {"max_pixels": 9},
    }
    assert stored_settings(both) == {"size": edges}
    assert stored_settings({**both, "processor_config.json": {"image_seq_length": 4}}) == {"size": {"longest_edge": 9}}
    floats = {"size": {"shortest_edge": 5.0, "longest_edge": 6.0}, "max_pixels": 9e0, "patch_size": 14.0}
    assert stored_settings({"preprocessor_config.json": floats}) == {
        "size": {"shortest_edge": 5, "longest_edge": 9},
        "patch_size": 14,
    }
    assert stored_settings({"preprocessor_config.json": {"max_pixels": float("nan"), "min_pixels": "5"}}) == {
        "size": {}
    }
    assert stored_settings({"preprocessor_config.json": {"size": 7, "do_resize": False}}) == {
        "size": {},
        "do_resize": False,
    }


def test_limits_are_the_targets() -> None:
    limits = PixelBounds(max_rows=64, max_cols=64, max_tiles=16)
    assert PixelBounds().on_target(load_target("rtx")) == limits
    assert PixelBounds().on_target(load_target("onnx")) == PixelBounds().on_target() == limits
    assert PixelBounds().on_target(load_target("orin")).max_rows == 56
    assert PixelBounds(max_rows=7).on_target(load_target("orin")).max_rows == 7
    asked = PixelBounds(max_pixels=9999)
    assert asked.on_target(load_target("onnx")) == asked
    assert asked.on_target(load_target("rtx")).max_cols == 64


def test_a_bundle_of_an_earlier_version_is_read() -> None:
    recipe = load_recipe("tiny-qwen25vl")
    assert recipe_of({"recipe": {**recipe.model_dump(mode="json"), "visual_tokens": 64}}, Path("out")) == recipe


def test_a_recipe_for_any_target_is_as_it_was() -> None:
    recipe = load_recipe("tiny-qwen25vl")
    for own in (recipe, recipe.with_options(max_pixels=9999)):
        limited = own.model_copy(update={"pictures": own.pictures.on_target(load_target("rtx"))})
        assert limited.for_any_target() == own != limited
        assert ("pictures" in limited.for_any_target().model_fields_set) == (own is not recipe)
