"""Names of the graphs' inputs and outputs, and of the dimensions of caches, for all that write, feed or read graphs."""

from collections.abc import Mapping
from typing import Literal, TypeVar

__all__ = [
    "CACHE_ROWS",
    "DEEPSTACK_EMBEDS",
    "DEEPSTACK_FEATURES",
    "IMAGE_FEATURES",
    "INPUTS_EMBEDS",
    "LOGITS",
    "NUM_KEEP",
    "PAST_LENGTHS",
    "PIXEL_VALUES",
    "POSITION_IDS",
    "TEXT_POSITIONS",
    "block_count",
    "cache_length",
    "cache_stages",
    "counted_in_blocks",
    "is_cache",
    "is_kept",
    "is_past",
    "is_present",
    "kept_name",
    "past_name",
    "past_names",
    "past_of",
    "present_name",
    "present_names",
]

T = TypeVar("T")

PIXEL_VALUES, IMAGE_FEATURES, DEEPSTACK_FEATURES = "pixel_values", "image_features", "deepstack_features"
"""Of the vision tower."""
INPUTS_EMBEDS, POSITION_IDS, LOGITS = "inputs_embeds", "position_ids", "logits"
"""Of prefill and decode."""
TEXT_POSITIONS, NUM_KEEP, DEEPSTACK_EMBEDS = "text_positions", "num_keep", "deepstack_embeds"
"""Of prefill."""
PAST_LENGTHS = "past_lengths"
"""Of decode."""
CACHE_ROWS = 256
"""Rows of a block, of which engines have caches: fewer shapes, so that kernels compiled for one serve again."""
_PAST, _PRESENT, _KEPT, _BLOCKS = "past_key_values.", "present.", "kept_positions.", "_blocks"


def past_names(layer: int | str) -> tuple[str, str]:
    """The inputs that hold a layer's cached keys and values."""
    return f"{_PAST}{layer}.key", f"{_PAST}{layer}.value"


def present_names(layer: int | str) -> tuple[str, str]:
    """The outputs that hold a layer's grown keys and values."""
    return f"{_PRESENT}{layer}.key", f"{_PRESENT}{layer}.value"


def kept_name(stage: int) -> str:
    """The output that holds the prompt positions that a stage keeps."""
    return f"{_KEPT}{stage}"


def is_past(name: str) -> bool:
    """Whether an input holds cached keys or values."""
    return name.startswith(_PAST)


def is_present(name: str) -> bool:
    """Whether an output holds grown keys or values."""
    return name.startswith(_PRESENT)


def is_cache(name: str) -> bool:
    """Whether an input or output holds keys or values."""
    return is_past(name) or is_present(name)


def is_kept(name: str) -> bool:
    """Whether an output holds kept prompt positions."""
    return name.startswith(_KEPT)


def past_name(present: str) -> str:
    """The input that takes, in the next step, what this output holds."""
    return _PAST + present.removeprefix(_PRESENT)


def present_name(past: str) -> str:
    """The output that grows what this input holds."""
    return _PRESENT + past.removeprefix(_PAST)


def past_of(outputs: Mapping[str, T]) -> dict[str, T]:
    """Decode's past inputs, of the outputs of the run before."""
    return {past_name(name): value for name, value in outputs.items() if is_present(name)}


def cache_length(length: Literal["sequence", "past", "total"], stages: int) -> str:
    """The dimension of a cache behind so many stages: `past`, then `past_kept_0`; of prefill `sequence`, `kept_0`."""
    kept = "kept" if length == "sequence" else f"{length}_kept"
    return f"{kept}_{stages - 1}" if stages else length


def cache_stages(length: str) -> int:
    """How many stages have pruned a cache of this length, of decode's past or prefill's present."""
    stages = 0
    while length not in (cache_length("past", stages), cache_length("sequence", stages)):
        stages += 1
    return stages


def block_count(length: str) -> str:
    """The dimension that counts the blocks of a cache with this length."""
    return length + _BLOCKS


def counted_in_blocks(dimension: str) -> str | None:
    """The length whose blocks a dimension counts; None where it counts none."""
    return dimension.removesuffix(_BLOCKS) if dimension.endswith(_BLOCKS) else None
