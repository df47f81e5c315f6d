"""Names of inputs and outputs: what one step returns is what the next one takes."""

from capa_export.graph.contract import (
    block_count,
    cache_length,
    counted_in_blocks,
    is_cache,
    is_past,
    is_present,
    past_name,
    past_names,
    past_of,
    present_name,
    present_names,
)


def test_each_output_of_a_cache_has_its_input() -> None:
    assert past_names(3) == ("past_key_values.3.key", "past_key_values.3.value")
    assert present_names(3) == ("present.3.key", "present.3.value")
    assert tuple(map(past_name, present_names(3))) == past_names(3)
    assert tuple(map(present_name, past_names(3))) == present_names(3)
    assert all(map(is_past, past_names(0))) and all(map(is_present, present_names(0)))
    assert not any(map(is_past, present_names(0))) and not is_cache("past_lengths")


def test_what_a_run_returned_feeds_the_next() -> None:
    assert past_of({"logits": 1, "present.0.key": 2, "kept_positions.0": 3}) == {"past_key_values.0.key": 2}


def test_lengths_of_caches() -> None:
    assert [cache_length("sequence", stages) for stages in range(3)] == ["sequence", "kept_0", "kept_1"]
    assert [cache_length("past", stages) for stages in range(3)] == ["past", "past_kept_0", "past_kept_1"]


def test_blocks_count_a_length() -> None:
    assert counted_in_blocks(block_count("past_kept_0")) == "past_kept_0"
    assert counted_in_blocks("past") is None
