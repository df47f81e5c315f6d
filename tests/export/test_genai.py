"""onnxruntime-genai generates what our own runtime does, from the same bundle."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from capa_export.base.errors import CapaError
from capa_export.config.recipe import load_recipe
from capa_export.config.schedule import kept_tokens
from capa_export.data.scenes import samples
from capa_export.export.genai import reason_against, write_genai
from capa_export.export.graphs import write_onnx
from capa_export.graph.genai import row_size
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.generation import eos_token_ids
from capa_export.model.prompt import Prompt, Prompter
from capa_export.model.sidecars import copy_sidecars
from capa_export.model.source import Source
from capa_export.run.decoding import greedy
from capa_export.run.onnx import OnnxModel
from capa_export.selectors.selector import SelectorChoice
from tests.conftest import noise

og = pytest.importorskip("onnxruntime_genai", reason="the onnxruntime it wants has no wheels for Python 3.10")

GRAPHS = ("prompt.onnx", "embedding.onnx", "llm/model.onnx")
LIMIT = 6
NEVER = [0]
"""No model says it: answers run to the limit, so that positions count."""
ATOL = {"fp32": 1e-4, "fp16": 1e-2}
"""Of logits around 10: the two decoders add their sums up in other orders."""


def written(
    folder: Path,
    source: Source,
    precision: str = "fp32",
    selector: str | None = None,
    linear: Sequence[int] = (),
    *,
    stop: Sequence[int] = NEVER,
    in_place: bool = False,
    **options: Any,
) -> Path:
    """An `onnx` folder with all that genai needs."""
    selectors = {} if selector is None else {-1: SelectorChoice(selector)}
    size = source.dims.decoder.hidden_size
    scales = {layer: np.linspace(0.8, 1.3, size, dtype=np.float32) for layer in linear}
    write_onnx(
        source,
        precision,
        folder,
        prune_layers=tuple(selectors),
        selectors=selectors,
        scales=scales,
        in_place=in_place,
        **options,
    )
    copy_sidecars(source.checkpoint, folder)
    write_genai(source, precision, folder, selectors=selectors, linear_layers=linear, eos_token_ids=stop, **options)
    return folder


def trained(name: str) -> tuple[Source, Prompter]:
    recipe = load_recipe(name)
    folder = Path(recipe.checkpoint)
    source = Source.of(open_checkpoint(str(folder)), load_family(recipe.family))
    return source, Prompter(folder, folder, source.family, source.dims)


def started(model: Any, prompt: Prompt, num_keep: int) -> Any:
    """A generator that has run the prompt, as docs/genai.md does it."""
    input_ids = np.delete(prompt.input_ids, np.flatnonzero(prompt.is_visual)[num_keep:])
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(input_ids) + LIMIT)
    generator = og.Generator(model, params)
    inputs = og.NamedTensors()
    inputs["prompt_ids"] = prompt.input_ids
    if prompt.pictures:
        inputs["pixel_values"] = np.concatenate([picture.patches for picture in prompt.pictures])
        inputs["num_image_tokens"] = np.array([len(input_ids)], np.int64)
    generator.set_inputs(inputs)
    generator.append_tokens(input_ids.astype(np.int32))
    return generator


def generated(generator: Any) -> list[int]:
    tokens: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


def same(folder: Path, prompts: Sequence[Prompt], num_keep: int | None, precision: str = "fp32") -> list[list[int]]:
    """The answers, once both runtimes have given the same."""
    ours, model = OnnxModel(folder, threads=1), og.Model(str(folder))
    answers: list[list[int]] = []
    for prompt in prompts:
        run = ours.prefill(prompt, [] if num_keep is None else [num_keep])
        generator = started(model, prompt, prompt.num_visual if num_keep is None else num_keep)
        np.testing.assert_allclose(generator.get_logits().ravel(), run.logits, rtol=0, atol=ATOL[precision])
        expected = [step[0] for step in greedy(ours, [prompt], [run], NEVER, LIMIT)]
        answers.append(generated(generator))
        assert answers[-1] == expected
    return answers


@pytest.mark.parametrize(
    ("name", "precision", "selector", "linear"),
    [
        # `make test` keeps one of each family, and one of them without a selector.
        pytest.param(*("tiny-qwen25vl", "fp32", None, ()), marks=pytest.mark.exhaustive),
        ("tiny-qwen25vl", "fp16", "divprune", (2, 5, 6)),
        pytest.param(*("tiny-qwen25vl", "fp32", "cdpruner", ()), marks=pytest.mark.exhaustive),
        pytest.param(*("tiny-llava15", "fp32", "divprune", (3,)), marks=pytest.mark.exhaustive),
        ("tiny-llava15", "fp16", "vispruner", ()),
        ("tiny-internvl3", "fp32", None, (4,)),
        pytest.param(*("tiny-internvl3", "fp32", "dart", (4,)), marks=pytest.mark.exhaustive),
    ],
)
def test_genai_generates_what_our_runtime_does(
    tmp_path: Path, name: str, precision: str, selector: str | None, linear: tuple[int, ...]
) -> None:
    source, prompter = trained(name)
    folder = written(tmp_path, source, precision, selector, linear)
    for graph in GRAPHS:
        onnx.checker.check_model(str(folder / graph))
    prompts = [prompter(sample.question, [sample.image]) for sample in samples(4, seed=3, cells=(8, 8))]
    num_keep = None if selector is None else kept_tokens(prompts[0].num_visual, 0.75)
    assert len({tuple(answer) for answer in same(folder, prompts, num_keep, precision)}) > 1


def test_a_selection_keeps_other_tokens_at_another_ratio_without_another_bundle(
    tmp_path: Path, source: Source, prompter: Prompter
) -> None:
    folder, prompt = written(tmp_path, source, "fp32", "divprune"), prompter("what is red ?", [noise(168, 112)])
    by_count = [same(folder, [prompt], count) for count in (1, 6, prompt.num_visual)]
    assert by_count[0] != by_count[2]


def test_pictures_of_one_size_share_the_prompt(tmp_path: Path, source: Source, prompter: Prompter) -> None:
    pictures = [noise(112, 168, seed) for seed in (1, 2, 3)]
    prompt = prompter("what is red ?", pictures)
    same(written(tmp_path, source, "fp32", "divprune", (1,)), [prompt], 7)


def test_half_precision_may_have_parts_in_fp32(tmp_path: Path, source: Source, prompter: Prompter) -> None:
    folder = written(tmp_path, source, "fp16", "divprune", (1,), fp32_layers=("residual", "2.mlp", "visual.1"))
    same(folder, [prompter("what is red ?", [noise(112, 168)])], 7, "fp16")


def test_weights_may_stay_in_their_shards(tmp_path: Path, source: Source, prompter: Prompter) -> None:
    folder = written(tmp_path, source, "fp32", "divprune", in_place=True)
    assert not (folder / "llm/embedding.safetensors").exists()
    same(folder, [prompter("what is red ?", [noise(112, 168)])], 7)


def test_no_weight_is_written_twice(tmp_path: Path, source: Source) -> None:
    folder = written(tmp_path, source)
    before = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".data", ".safetensors"))
    assert sum((folder / graph).stat().st_size for graph in GRAPHS) < before / 2
    kept = {entry.value for graph in GRAPHS for entry in _locations(folder / graph)}
    assert kept == {"visual/model.onnx.data", "llm/embedding.safetensors", "model.onnx.data"}


def _locations(graph: Path) -> list[Any]:
    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    return [entry for tensor in tensors for entry in tensor.external_data if entry.key == "location"]


def test_a_prompt_without_pictures_and_text_behind_an_answer(
    tmp_path: Path, source: Source, prompter: Prompter
) -> None:
    folder = written(tmp_path, source, "fp32", "divprune")
    ours, model = OnnxModel(folder, threads=1), og.Model(str(folder))
    for pictures in ([], [noise(168, 112)]):
        prompt = prompter("what is red ?", pictures)
        num_keep = min(5, prompt.num_visual)
        generator, run = started(model, prompt, num_keep), ours.prefill(prompt, [num_keep])
        more = prompter.tokenizer("the red star")["input_ids"]
        generator.append_tokens(np.array(more, np.int32))
        expected, _ = ours.append(run.cache, [more], [prompt.next_position])
        np.testing.assert_allclose(generator.get_logits().ravel(), expected[0], rtol=0, atol=ATOL["fp32"])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_cache_holds_steps_of_any_size_exactly(tmp_path: Path, source: Source, precision: str) -> None:
    """Positions past what half precision counts, and steps back, as when a picture's next row begins."""
    folder, dims = written(tmp_path, source, precision), source.dims.decoder
    position_3T = np.array([[0, 1, 69_630, 70_002], [0, 1, 4095, 70_002], [0, 1, 65_537, 70_002]])
    step_T3 = np.diff(position_3T.T, axis=0, prepend=-1)
    hidden_TD = np.random.default_rng(0).normal(size=(4, dims.hidden_size)).astype(np.float16).astype(np.float32)
    rows = np.concatenate([hidden_TD, step_T3, np.zeros((4, 1))], axis=1, dtype=np.float32)[None]
    dtype = np.float32 if precision == "fp32" else np.float16
    merged, decode = (
        onnxruntime.InferenceSession(folder / f"llm/{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("model", "decode")
    )

    def past(num_layers: int) -> dict[str, np.ndarray]:
        shapes = [(dims.num_kv_heads, dims.head_dim)] * dims.num_layers + [(1, 3)]
        return {
            f"past_key_values.{layer}.{part}": np.zeros((1, heads, 0, size), dtype)
            for layer, (heads, size) in enumerate(shapes[:num_layers])
            for part in ("key", "value")
        }

    def direct(position_3T: np.ndarray) -> np.ndarray:
        count = position_3T.shape[1]
        feed = {"inputs_embeds": hidden_TD[None, :count].astype(dtype), "past_lengths": np.zeros((1, 1), np.int64)}
        (logits,) = decode.run(["logits"], {**feed, "position_ids": position_3T[:, None], **past(dims.num_layers)})
        return np.asarray(logits).ravel()

    cache, logits = past(dims.num_layers + 1), []
    for part in (rows[:, :3], rows[:, 3:]):
        names = [entry.name for entry in merged.get_outputs()]
        result: dict[str, Any] = dict(zip(names, merged.run(names, {"inputs_embeds": part, **cache}), strict=True))
        logits.append(result.pop("logits").ravel())
        cache = {name.replace("present", "past_key_values"): value for name, value in result.items()}
    expected = [direct(position_3T[:, :3]), direct(position_3T)]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=ATOL[precision])
    moved = direct(position_3T + np.array([[0, 0, 1, 0]]))
    assert np.abs(moved - expected[1]).max() > 2 * ATOL[precision]


def test_a_wrong_number_of_rows_is_an_error_and_no_answer(tmp_path: Path, source: Source, prompter: Prompter) -> None:
    folder, prompt = written(tmp_path, source), prompter("what is red ?", [noise(168, 112)])
    with pytest.raises(RuntimeError, match="prompt_embeds"):
        started(og.Model(str(folder)), prompt, prompt.num_visual - 1)


def test_the_config_names_what_the_graphs_have(tmp_path: Path, source: Source) -> None:
    model = json.loads((written(tmp_path, source, stop=[7, 9]) / "genai_config.json").read_text())["model"]
    dims = source.dims.decoder
    assert model["eos_token_id"] == [7, 9]
    assert model["decoder"]["hidden_size"] == row_size(dims) == dims.hidden_size + 4
    assert model["decoder"]["num_hidden_layers"] == dims.num_layers + 1
    assert model["context_length"] == source.checkpoint.config["text_config"]["max_position_embeddings"]


def test_what_genai_cannot_run_is_refused_with_the_reason(tmp_path: Path, source: Source) -> None:
    with pytest.raises(CapaError, match="layer 2 prunes, and its KV caches have one length"):
        write_genai(
            source, "fp32", tmp_path, selectors={2: SelectorChoice("capa")}, linear_layers=(), eos_token_ids=[1]
        )
    assert reason_against(source, {-1: SelectorChoice("divprune")}) is None


_ASK = """import json, os, runpy, sys
for folder, question in json.loads(sys.argv[1]).items():
    os.chdir(folder)
    sys.argv = ["answer.py", "onnx", "scene.png", question, "0.75"]
    runpy.run_path("../answer.py", run_name="__main__")
    print(end="\\0")
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_script_of_the_docs_answers_without_this_package(tmp_path: Path) -> None:
    """Of each family, one after the other in one interpreter, whose imports take longer than the answers."""
    doc = (Path(__file__).resolve().parents[2] / "docs" / "genai.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", doc, flags=re.DOTALL)
    assert found is not None
    assert "capa_export" not in found[1]
    (tmp_path / "answer.py").write_text(found[1], encoding="utf-8")
    (sample,) = samples(1, seed=5, cells=(8, 8))
    families = {name: trained(name) for name in ("tiny-qwen25vl", "tiny-llava15", "tiny-internvl3")}
    for name, (source, _) in families.items():
        stop = eos_token_ids(source.checkpoint.folder)
        written(tmp_path / name / "onnx", source, "fp16", "divprune", (3,), stop=stop)
        sample.image.save(tmp_path / name / "scene.png")
    asked = json.dumps({str(tmp_path / name): sample.question for name in families})
    done = subprocess.run([sys.executable, "-c", _ASK, asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\0") == len(families)
    for (name, (source, prompter)), answer in zip(families.items(), done.stdout.split("\0"), strict=False):
        stop, folder = eos_token_ids(source.checkpoint.folder), tmp_path / name
        ours = OnnxModel(folder / "onnx", threads=1)
        prompt = prompter(sample.question, [Image.open(folder / "scene.png")])
        run = ours.prefill(prompt, [kept_tokens(prompt.num_visual, 0.75)])
        steps = greedy(ours, [prompt], [run], stop, 64)
        said = prompter.decode([token for step in steps for token in step if token is not None])
        assert answer.strip() == said.strip() != "", name
