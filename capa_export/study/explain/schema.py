"""What `capa-export explain --json` prints. Visual tokens count from 0, over all pictures.

N = visual tokens of the prompt.
"""

from typing import Literal

from capa_export.base.statistics import Figure
from capa_export.base.toml import Settings

__all__ = ["Explained", "Explanation", "Grid", "LeftOut", "Maps", "Sinks", "StageKept"]


class Grid(Settings):
    """Where a run of visual tokens lies: row by row on a picture, or on one tile of it."""

    picture: int
    tile: int | None = None
    """None where the tokens of the picture make a single grid."""
    first: int
    """Visual token at the upper left."""
    rows: int
    cols: int


class Maps(Settings):
    """Of every visual token at one layer, as the last prompt token sees it; nothing is dropped before."""

    layer: int
    contribution: tuple[Figure, ...]
    """[N] CAPA's score: || sum_h A_h v W_O,h ||."""
    attention: tuple[Figure, ...]
    """[N] A, the mean over heads."""
    value_norm: tuple[Figure, ...]
    """[N] || sum_h v W_O,h ||: the contribution where every head attended fully."""
    phi: tuple[Figure, ...]
    """[N] max of | x_d / rms(x) | over the sink channels, or over all if there are none; x enters the layer's FFN."""
    kept: tuple[int, ...]
    """What CAPA keeps here: as many as the bundle, at this layer or else in the end."""
    cut: Figure
    """The lowest contribution among them."""


class Sinks(Settings):
    """Visual tokens with phi above the threshold."""

    threshold: float
    channels: tuple[int, ...]
    dumps: tuple[int, ...]
    """Probability dumps: those that CAPA drops at this layer."""
    anchors: tuple[int, ...]
    """Structural anchors: those that it keeps."""
    words: tuple[str, ...]
    """How they were looked for, and what was found."""


class StageKept(Settings):
    """One stage of a method."""

    where: str
    selector: str
    kept: int


class Explained(Settings):
    """One method."""

    method: str
    own: bool = False
    """Whether it is the bundle's."""
    answer: str
    same_answer: bool
    """As dense, token by token."""
    stages: tuple[StageKept, ...]
    kept: tuple[int, ...]
    """Visual tokens after the last stage."""
    iou: float
    """Of the kept tokens with those of the bundle's own method."""
    kl: Figure
    """KL(dense || this) of the first token, in nats."""


class LeftOut(Settings):
    """A selector that cannot be shown."""

    method: str
    reason: str


class Explanation(Settings):
    """All that the page shows."""

    version: Literal[1] = 1
    bundle: str
    model: str
    """Where the weights are from."""
    runs: Literal["eager fp32"] = "eager fp32"
    question: str
    pictures: tuple[str, ...]
    visual_tokens: int
    grids: tuple[Grid, ...]
    """None of a picture whose tokens make no grid."""
    linear_layers: tuple[int, ...]
    """Where a scale stands for visual FFNs, unless a method says otherwise."""
    maps: Maps
    sinks: Sinks
    methods: tuple[Explained, ...]
    """Dense first, then the bundle's own."""
    left_out: tuple[LeftOut, ...]
    max_new_tokens: int
