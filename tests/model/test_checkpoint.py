"""Opening checkpoints: layouts, shards, digests, and a clear refusal of each way to be broken."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import numpy as np
import onnx_ir as ir
import pytest
import torch
from huggingface_hub import errors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from capa_export.base.errors import CapaError, ExitCode
from capa_export.model.checkpoint import fetch_config, open_checkpoint

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "window_size": 56,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
}
RULES = [(r"^(?:model\.)?visual\.", "visual."), (r"^model\.language_model\.", "model."), (r"^language_model\.", "")]


@pytest.fixture(scope="session")
def model() -> Any:
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION))


@pytest.fixture(scope="session")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_shards(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def single(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "single"))


@pytest.fixture
def sharded(saved_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_shards, tmp_path / "sharded"))


def refusal(source: object, **options: Any) -> CapaError:
    with pytest.raises(CapaError) as info:
        open_checkpoint(str(source), **options)
    assert "\n" not in str(info.value)
    return info.value


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def write_shard(path: Path, header: str, data: bytes = b"") -> None:
    raw = header.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tensors_are_where_safetensors_finds_them(model: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    Qwen2_5_VLForConditionalGeneration(model.config).to(dtype).save_pretrained(tmp_path)
    opened = open_checkpoint(str(tmp_path))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(opened.tensors) == set(file.keys())
        for name, tensor in opened.tensors.items():
            expected = file.get_tensor(name)
            stored = np.concatenate([chunk.astype(np.float32) for chunk in tensor.chunks(1000)])
            assert tensor.shape == tuple(expected.shape)
            assert tensor.nbytes == expected.nbytes
            np.testing.assert_array_equal(stored, expected.float().numpy().ravel())
    assert opened.num_parameters == sum(weight.numel() for weight in model.parameters())
    assert opened.nbytes == opened.num_parameters * dtype.itemsize
    assert opened.config["model_type"] == "qwen2_5_vl"


def test_shards_hold_the_same_as_one_file(single: Path, sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = open_checkpoint(str(single)), open_checkpoint(str(sharded))
    assert set(one.tensors) == set(many.tensors)
    for name, tensor in one.tensors.items():
        assert list(map(bytes, tensor.chunks())) == list(map(bytes, many.tensors[name].chunks()))


def test_shards_need_their_index(sharded: Path) -> None:
    next(iter(sharded.glob("model-00002-*"))).unlink()
    assert "model-00002-of-" in str(refusal(sharded))
    (sharded / "model.safetensors.index.json").unlink()
    error = refusal(sharded)
    assert "no model.safetensors.index.json beside model-00001-of-" in str(error)
    assert error.code == ExitCode.PREFLIGHT


def test_sha256_is_that_of_the_files(sharded: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    digests = open_checkpoint(str(sharded)).sha256(lambda *call: calls.append(call))
    shards = {path.name for path in sharded.glob("*.safetensors")}
    assert set(digests) == shards | {"config.json"}
    assert all(digests[name] == hashlib.sha256((sharded / name).read_bytes()).hexdigest() for name in digests)
    assert calls[-1][1] == calls[-1][2] == sum((sharded / name).stat().st_size for name in digests)


@pytest.mark.parametrize(
    ("visual", "text", "head"),
    [
        ("visual.", "model.", "lm_head."),
        ("model.visual.", "model.language_model.", "lm_head."),
        ("visual.", "language_model.model.", "language_model.lm_head."),
    ],
    ids=["transformers-4", "transformers-5", "wrapped"],
)
def test_layouts_come_to_the_same_names(single: Path, visual: str, text: str, head: str) -> None:
    path = single / "model.safetensors"
    prefixes = {"visual.": visual, "model.": text, "lm_head.": head}
    canonical = load_file(path)
    renamed = {
        new + name.removeprefix(old): weight
        for name, weight in canonical.items()
        for old, new in prefixes.items()
        if name.startswith(old)
    }
    save_file(renamed, path, {"format": "pt"})
    tensors = open_checkpoint(str(single)).renamed(RULES)
    assert set(tensors) == set(canonical)
    assert tensors["visual.patch_embed.proj.weight"].name == f"{visual}patch_embed.proj.weight"
    with pytest.raises(TypeError):
        tensors["new"] = tensors["model.norm.weight"]  # pyright: ignore[reportIndexIssue]


def test_two_names_for_one_tensor_are_refused(single: Path) -> None:
    path = single / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"model.language_model.norm.weight": weights["model.norm.weight"].clone()}, path)
    with pytest.raises(CapaError, match=r"model\.language_model\.norm\.weight and model\.norm\.weight are both"):
        open_checkpoint(str(single)).renamed(RULES)


def test_folder_problems(single: Path, tmp_path: Path) -> None:
    assert "no such folder" in str(refusal(tmp_path / "absent"))
    assert "is a file" in str(refusal(single / "config.json"))
    assert refusal(single, revision="main").code == ExitCode.USAGE
    (single / "config.json").write_text("{")
    error = refusal(single)
    assert "config.json: cannot be read as JSON" in str(error)
    assert error.code == ExitCode.PREFLIGHT
    (single / "config.json").write_text("[]")
    assert "not a JSON object" in str(refusal(single))
    (single / "config.json").unlink()
    assert "config.json: not found" in str(refusal(single))


def test_pickled_weights_are_refused_with_the_conversion(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    message = str(refusal(single))
    assert "pytorch_model.bin" in message
    assert "safe_serialization=True" in message


def test_index_problems(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    edit_json(index, lambda data: data["weight_map"].update({"model.ghost": "model-00009-of-00009.safetensors"}))
    assert "model-00009-of-00009.safetensors: shard not found" in str(refusal(sharded))
    first = min(path.name for path in sharded.glob("*.safetensors"))
    edit_json(index, lambda data: data["weight_map"].update({"model.ghost": first}))
    assert "has no tensor model.ghost" in str(refusal(sharded))
    edit_json(index, lambda data: data["weight_map"].update({"model.ghost": "../model.safetensors"}))
    assert "outside the folder" in str(refusal(sharded))
    edit_json(index, lambda data: data.pop("weight_map"))
    assert "has no weight_map" in str(refusal(sharded))


def test_a_tensor_in_two_shards_is_refused(single: Path) -> None:
    shutil.copy(single / "model.safetensors", single / "a.safetensors")
    (single / "model.safetensors").rename(single / "b.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (single / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is in a.safetensors and in b.safetensors" in str(refusal(single))


@pytest.mark.parametrize("size", [4, 100, -1])
def test_truncated_shards(single: Path, size: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    message = str(refusal(single))
    assert "model.safetensors: truncated" in message
    assert "download it again" in message


ENTRY = '"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ("{not json", b"", "corrupt header"),
        ("[1]", b"", "corrupt header"),
        ('{"w": {"dtype": "F32"}}', b"", "corrupt header"),
        ("{" + ENTRY.replace("[2]", "[3]") + "}", bytes(8), "shape [3] needs 12"),
        ("{" + ENTRY.replace("[2]", "[-2]") + "}", bytes(8), "bad shape or offset"),
        ("{" + ENTRY + "," + ENTRY + "}", bytes(8), "w appears twice"),
        ("{" + ENTRY + "," + ENTRY.replace("w", "v") + "}", bytes(8), "gap or overlap"),
        ("{" + ENTRY + "}", bytes(9), "too long"),
    ],
)
def test_corrupt_headers(single: Path, header: str, data: bytes, message: str) -> None:
    write_shard(single / "model.safetensors", header, data)
    assert message in str(refusal(single))


def test_things_that_are_no_safetensors(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(b"\xff" * 64)
    assert "corrupt header" in str(refusal(single))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in str(refusal(single))


def test_a_shard_that_changes_later_is_noticed(single: Path) -> None:
    tensor = list(open_checkpoint(str(single)).tensors.values())[-1]
    tensor.path.write_bytes(tensor.path.read_bytes()[:-1])
    with pytest.raises(CapaError, match="changed while being read"):
        list(tensor.chunks())


@pytest.mark.parametrize("opened", [open_checkpoint, fetch_config])
def test_paths_are_never_sent_to_the_hub(
    monkeypatch: pytest.MonkeyPatch, single: Path, opened: Callable[[str], object]
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    for path in ("/no/such/dir", "./x", "../x/y", str(single / "config.json")):
        with pytest.raises(CapaError, match="no such folder"):
            opened(path)


RESPONSE = MagicMock()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("", response=RESPONSE), "accept its licence"),
        (errors.RevisionNotFoundError("", response=RESPONSE), "no such revision"),
        (errors.RepositoryNotFoundError("", response=RESPONSE), "no such model on the hub"),
        (errors.LocalEntryNotFoundError("no\nnetwork"), "hf download owner/name"),
        (errors.HfHubHTTPError("500 one\ntwo", response=RESPONSE), "500 one; run it again"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_hub_problems(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused = refusal("owner/name", revision="v1")
    assert str(refused).startswith("owner/name@v1: ")
    assert message in str(refused)
    assert refused.code == ExitCode.PREFLIGHT


def test_hub_ids_are_downloaded_without_pickles(monkeypatch: pytest.MonkeyPatch, single: Path) -> None:
    calls: dict[str, Any] = {}

    def download(hub_id: str, **options: Any) -> str:
        calls.update(options, hub_id=hub_id)
        return str(single)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    opened = open_checkpoint("owner/name")
    assert opened.folder == single
    assert opened.tensors["lm_head.weight"].dtype == ir.DataType.FLOAT
    assert calls["hub_id"] == "owner/name"
    assert "*.bin" not in calls["allow_patterns"]


ADAPTED = [
    "base_model.model.model.layers.0.mlp.up_proj.weight",
    "model.layers.0.self_attn.q_proj.base_layer.weight",
    "model.layers.0.self_attn.q_proj.lora_A.weight",
    "model.layers.0.self_attn.q_proj.lora_B.default.weight",
    "model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight",
    "model.embed_tokens.lora_embedding_A.default",
    "lm_head.modules_to_save.default.weight",
    "model.layers.0.mlp.down_proj.ia3_l.default",
]


@pytest.mark.parametrize("name", ADAPTED)
def test_weights_that_peft_wraps_are_named(single: Path, name: str) -> None:
    path = single / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(2)}, path)
    message = str(refusal(single))
    assert f"tensor {name} is part of a PEFT adapter" in message
    assert "merge_and_unload()" in message


@pytest.mark.parametrize("whole", [False, True], ids=["adapter alone", "beside a model"])
@pytest.mark.parametrize("opened", [open_checkpoint, fetch_config])
def test_adapter_folders_are_named(single: Path, opened: Callable[[str], object], *, whole: bool) -> None:
    if not whole:
        (single / "config.json").unlink()
        (single / "model.safetensors").rename(single / "adapter_model.safetensors")
    (single / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    with pytest.raises(CapaError, match=r"PEFT adapter for owner/base.*merge_and_unload\(\)") as raised:
        opened(str(single))
    assert raised.value.code == ExitCode.PREFLIGHT


@pytest.fixture
def cached(sharded: Path, tmp_path: Path) -> Path:
    """A snapshot in the hub's cache, every file a link to a blob."""
    repository = tmp_path / "models--owner--some-name.v2"
    snapshot, blobs = repository / "snapshots" / "abc123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sharded.iterdir():
        path.rename(blobs / f"blob of {path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob of {path.name}")
    return snapshot


REFETCH = "`hf download owner/some-name.v2 --revision abc123`"
SHARD = "model-00002-of-"


def first(folder: Path, prefix: str) -> Path:
    return min(path for path in folder.iterdir() if path.name.startswith(prefix))


def test_a_whole_snapshot_is_read(cached: Path) -> None:
    assert open_checkpoint(str(cached)).tensors


@pytest.mark.parametrize("lost", [SHARD, "model.safetensors.index.json", "config.json", "model"])
def test_half_filled_snapshots_are_named(cached: Path, lost: str) -> None:
    for path in [path for path in cached.iterdir() if path.name.startswith(lost)]:
        path.unlink()
    message = str(refusal(cached))
    assert "into the hub cache was not finished" in message
    assert REFETCH in message


@pytest.mark.parametrize("lost", [SHARD, "config.json", "generation_config.json"])
def test_links_to_blobs_that_did_not_arrive_are_named(cached: Path, lost: str) -> None:
    blob = first(cached, lost).resolve()
    blob.rename(blob.with_name(f"{blob.name}.incomplete"))
    message = str(refusal(cached))
    assert f"{first(cached, lost)}: is a link to a file that is not there" in message
    assert REFETCH in message


@pytest.mark.parametrize("link", ["notes.txt", "README.md", "pytorch_model.bin"])
def test_a_dangling_link_that_nothing_reads_is_none_of_ours(single: Path, link: str) -> None:
    (single / link).symlink_to(single / "nowhere")
    assert open_checkpoint(str(single)).tensors
    (single / "merges.txt").unlink(missing_ok=True)
    (single / "merges.txt").symlink_to(single / "nowhere")
    assert fetch_config(str(single))
    assert "merges.txt: is a link to a file that is not there" in str(refusal(single))


def test_the_cache_is_not_a_model(cached: Path) -> None:
    assert "pass owner/some-name.v2" in str(refusal(cached.parent.parent))


def test_a_local_download_that_was_not_finished(sharded: Path) -> None:
    (sharded / ".cache" / "huggingface" / "download").mkdir(parents=True)
    first(sharded, SHARD).unlink()
    assert f"--local-dir {sharded}` again" in str(refusal(sharded))


def test_a_whole_file_goes_before_an_index(sharded: Path, single: Path) -> None:
    shutil.copy(single / "model.safetensors", sharded)
    assert {tensor.path.name for tensor in open_checkpoint(str(sharded)).tensors.values()} == {"model.safetensors"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("../model.safetensors", "names no file of this folder"),
        (3, "names no file of this folder"),
        ("absent.safetensors", "not found, though transformers_weights"),
    ],
)
def test_weights_that_the_config_names(single: Path, given: object, message: str) -> None:
    edit_json(single / "config.json", lambda config: config.update(transformers_weights=given))
    assert message in str(refusal(single))


def test_what_no_graph_reads_is_passed_over(single: Path) -> None:
    path = single / "model.safetensors"
    save_file(load_file(path) | {"a.position_ids": torch.arange(3), "b.mask": torch.ones(3, dtype=torch.bool)}, path)
    opened = open_checkpoint(str(single))
    assert opened.passed_over == {"a.position_ids": "I64", "b.mask": "BOOL"}
    assert not opened.passed_over.keys() & opened.tensors.keys()
