"""The output of `capa-export explain --json`. Visual tokens count from 0, over all pictures.

N = visual tokens of the prompt.
"""

from typing import Literal

from capa_export.base.statistics import Figure
from capa_export.base.toml import Settings

__all__ = ["Explanation", "Grid", "Maps", "MethodExplanation", "Sinks", "SkippedMethod", "StageTokens"]


class Grid(Settings):
    """The place of a run of visual tokens: row by row on a picture, or on one tile of it."""

    picture: int
    tile: int | None = None
    """Number of the tile; None where the tokens of the picture make a single grid."""
    first: int
    """Visual token at the upper left."""
    rows: int
    cols: int


class Maps(Settings):
    """Amounts of every visual token at one layer, as the last prompt token sees it; nothing is dropped before."""

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
    """Tokens that CAPA keeps here: as many as the bundle, at this layer or else in the end."""
    cut: Figure
    """The lowest contribution among the kept tokens."""


class Sinks(Settings):
    """Visual tokens with phi above the threshold."""

    threshold: float
    channels: tuple[int, ...]
    dumps: tuple[int, ...]
    """Probability dumps: sinks that CAPA drops at this layer."""
    anchors: tuple[int, ...]
    """Structural anchors: sinks that CAPA keeps at this layer."""
    words: tuple[str, ...]
    """Sentences on how sinks were looked for, and what was found."""


class StageTokens(Settings):
    """The tokens kept by one stage of a method."""

    where: str
    selector: str
    kept: int


class MethodExplanation(Settings):
    """One method, explained on the prompt."""

    method: str
    own: bool = False
    """Whether the method is the bundle's."""
    answer: str
    same_answer: bool
    """Whether the answer is dense's, token by token."""
    stages: tuple[StageTokens, ...]
    kept: tuple[int, ...]
    """Visual tokens after the last stage."""
    iou: float
    """IoU of the kept tokens with those of the bundle's own method."""
    kl: Figure
    """KL(dense || this) of the first token, in nats."""


class SkippedMethod(Settings):
    """A selector that cannot be shown."""

    method: str
    reason: str


class Explanation(Settings):
    """The whole explanation, as the page shows it."""

    version: Literal[1] = 1
    bundle: str
    model: str
    """Source of the weights."""
    runs: Literal["eager fp32"] = "eager fp32"
    question: str
    pictures: tuple[str, ...]
    visual_tokens: int
    grids: tuple[Grid, ...]
    """Grids of the visual tokens; a picture whose tokens make no grid has none."""
    linear_layers: tuple[int, ...]
    """Layers where a scale stands for visual FFNs, unless a method says otherwise."""
    maps: Maps
    sinks: Sinks
    methods: tuple[MethodExplanation, ...]
    """Dense first, then the bundle's own."""
    left_out: tuple[SkippedMethod, ...]
    max_new_tokens: int
