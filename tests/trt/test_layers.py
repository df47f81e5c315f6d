"""What is read of an engine: its fused layers, and which of them copy weights."""

from pathlib import Path

import pytest

from capa_export.trt.layers import cache_copies, parse_layers, read_engine, weight_copies

# Two real lines, shortened: [in, out] weights are copied in every step, those of a Gemm are not.
_COPY = (
    "Name: __myl_Move_myl0_2, LayerType: kgen, "
    "Inputs: [ { Name: w, Dimensions: [512,1024], Strides: [1024,1], StrideOrder: [1,0], Datatype: Half, Format: F }], "
    "Constants: [], "
    "Outputs: [ { Name: __mye209_myl0, Dimensions: [512,1024], Strides: [1,512], Datatype: Half, Format: F }], "
    "TacticName: __myl_Move_0xf7, StreamId: 0, Metadata: [ONNX Layer: mlp/MatMul]\x1f[ONNX Layer: mlp/Add]"
)
_GEMM = (
    "Name: mlp/Gemm_myl0_3, LayerType: gemm, "
    "Inputs: [ { Name: x, Dimensions: [-1,512], Strides: [512,1], Datatype: Half, Format: F }, "
    "{ Name: w, Dimensions: [512,1024], Strides: [1,512], Datatype: Half, Format: F }], "
    "Constants: [ { Name: beta, Dimensions: [1], Datatype: Float, Format: F }], "
    "Outputs: [ { Name: y, Dimensions: [-1,1024], Strides: [1024,1], Datatype: Half, Format: F }], "
    "TacticName: t, StreamId: 0, Metadata: "
)


def test_a_weight_copy_is_told_from_a_multiplication() -> None:
    layers = parse_layers(f"Layers:\n{_COPY}\n{_GEMM}\n\nI/O Tensors:\n Name: x, IOMode: Input\n")
    assert [layer.type for layer in layers] == ["kgen", "gemm"]
    assert layers[0].onnx == ("mlp/MatMul", "mlp/Add")
    assert [tensor.name for tensor in layers[1].inputs] == ["x", "w"]
    assert weight_copies(layers, {"w"}) == layers[:1]
    assert weight_copies(layers, set()) == [], "moving activations is no copy of a weight"
    text = _COPY.replace("Inputs: [ {", "Constants: [ {").replace(", Constants: []", ", Inputs: []")
    constant = parse_layers(text)
    assert weight_copies(constant, set()) == constant
    scales = text.replace("Dimensions: [512,1024]", "Dimensions: [1,524288]")
    assert parse_layers(scales)[0].constants[0].shape == (1, 524288) and not weight_copies(parse_layers(scales), set())


@pytest.mark.parametrize("text", ["", f"Layers:\n{_GEMM}\n"])
def test_an_engine_without_a_list_of_layers_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    engine = tmp_path / "decode"
    engine.with_suffix(".layers.txt").write_text(text, encoding="utf-8")
    engine.with_suffix(".log").write_text("", encoding="utf-8")
    built = dict.fromkeys(("onnx", "bytes", "seconds", "peak_rss_bytes", "capa_nodes", "version"))
    read_engine(engine, {**built, "serves": ["decode"], "warnings": []}, tmp_path / "none")
    said = "lists no layers, so whether weights or caches are copied is not known"
    assert (said in capsys.readouterr().err) == (text == "")


# Layers of decode, shortened: those of the first kind are what TensorRT-RTX 1.7 makes of caches that it cannot read as
# they are, those of the second what it makes of caches in blocks.
_CACHE_COPIES = {
    "concatenated": ("past_key_values.0.key", "-1,4,-1,256,128", "-1,4,-1,128"),
    "transposed": ("past_key_values.0.key", "-1,4,-1,256,128", "-1,4,128,-1"),
    "padded": ("past_key_values.0.value", "-1,-1,128", "-1,-1,128"),
    "made blocks": ("past_key_values.0.value", "-1,32,-1,256,128", "-1,256,128"),
}
_CACHE_READS = {
    "scores": ("past_key_values.0.key", "-1,4,-1,256,128", "-1,4,-1,7,1"),
    "query and scores": ("past_key_values.0.key", "-1,4,-1,256,128", "-1,4,1,7,128"),
    "product": ("past_key_values.0.value", "-1,256,128", "-1,7,128"),
    "sum": ("past_key_values.0.value", "-1,32,-1,256,128", "-1,32,1,1,128"),
}


def _of_cache(name: str, read: str, written: str) -> str:
    heads = read if read.count(",") == 4 else "-1,4,-1,256,128"
    line = (
        "Name: {what}, LayerType: kgen, "
        "Inputs: [ {{ Name: {name}, Dimensions: [{read}], Datatype: Half, Format: F }}], "
        "Constants: [], Outputs: [ {{ Name: y, Dimensions: [{written}], Datatype: Half, Format: F }}], Metadata: "
    )
    scores = line.format(what="scores", name="past_key_values.1.key", read=heads, written="-1,4,-1,7,1")
    return f"{line.format(what='this', name=name, read=read, written=written)}\n{scores}\n"


@pytest.mark.parametrize("case", _CACHE_COPIES)
def test_a_layer_that_copies_a_cache_is_found(case: str) -> None:
    assert [layer.name for layer in cache_copies(parse_layers(_of_cache(*_CACHE_COPIES[case])))] == ["this"]


@pytest.mark.parametrize("case", _CACHE_READS)
def test_a_layer_that_reads_a_cache_is_none_that_copies_it(case: str) -> None:
    assert not cache_copies(parse_layers(_of_cache(*_CACHE_READS[case])))


def test_rows_of_a_prompts_own_are_no_copy() -> None:
    """Of an engine that is prefill too: the layer that makes them may read a cache."""
    line = _of_cache("past_key_values.0.key", "1,4,1,256,128", "1,4,-1,128")
    assert cache_copies(parse_layers(line))
    assert not cache_copies(parse_layers(line.replace("Name: y,", "Name: present.0.key,")))


def test_a_product_of_blocks_that_look_like_rows_is_no_copy() -> None:
    """Of one prompt at a time, with as many query heads a KV head as KV heads."""
    heads, line = "1,2,-1,256,16", _of_cache("past_key_values.0.value", "1,2,-1,256,16", "-1,2,16")
    text = line.replace("-1,4,-1,256,128", heads)
    assert cache_copies(parse_layers(text)) and not cache_copies(parse_layers(text.replace("kgen", "gemm")))
