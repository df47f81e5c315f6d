"""What a selector is: which visual tokens stay, as nodes of the graph and as plain PyTorch beside them.

T = tokens that enter a stage, N = visual ones among them, X = text tokens, D = hidden size, H = query heads, G = KV
heads, d = head size, F = size of the vision tower's features.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from math import inf
from pathlib import Path
from pkgutil import iter_modules
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from capa_export.base.errors import CapaError, ExitCode

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from capa_export.base.dims import DecoderDims

__all__ = [
    "CAPA",
    "TOKEN_AXIS",
    "TOWER_OUTPUTS",
    "Chosen",
    "Function",
    "GraphView",
    "NodeWriter",
    "Option",
    "Place",
    "Prompted",
    "Selector",
    "Setting",
    "Size",
    "TensorView",
    "load_selector",
    "reads",
    "selectors",
    "summary",
]

Place = Literal["attention", "entry", "input"]
"""Where a selector acts: right after the attention of its layer, which scores; where its layer begins, scored by the
attention of the layer before; or before the decoder."""

Option = int | float
Prompted = Literal["visual_saliency", "visual_features", "visual_grid"]
"""What the prompt brings along for some selectors; see the fields of `TensorView`."""


class Setting(NamedTuple):
    """An option of a selector."""

    default: Option
    least: Option = 0
    most: Option = inf
    whole: bool = False
    """Whether it is a count or a switch."""

    def problem(self, value: Option) -> str | None:
        """What is wrong with a value, if anything is."""
        if self.least <= value <= self.most and value < inf and not (self.whole and value != int(value)):
            return None
        limits = f"of {self.least:g} or more" if self.most == inf else f"from {self.least:g} to {self.most:g}"
        return f"it takes a {'whole ' if self.whole else ''}number {limits}, not {value}"


class Chosen(NamedTuple):
    """A selector and what it was set to."""

    name: str
    options: Mapping[str, Option] = MappingProxyType({})

    @property
    def reads_tower(self) -> bool:
        """Whether it reads what the vision tower says of its tokens, beside their embeddings."""
        return not TOWER_OUTPUTS.keys().isdisjoint(load_selector(self.name).reads)

    @property
    def values(self) -> dict[str, Option]:
        """Of all its options, the defaults included."""
        own = load_selector(self.name).options
        return {**{name: setting.default for name, setting in own.items()}, **self.options}

    @property
    def place(self) -> Place:
        return load_selector(self.name).place

    @property
    def least(self) -> int:
        """Fewest visual tokens it can keep of more than that."""
        fewest = load_selector(self.name).least
        return int(self.values[fewest]) if isinstance(fewest, str) else fewest


CAPA = Chosen("capa")


TOWER_OUTPUTS: Mapping[Prompted, str] = MappingProxyType(
    {"visual_saliency": "saliency", "visual_features": "tower_features"}
)
"""Of what the prompt brings along, what the vision tower says, and its output that does."""
TOKEN_AXIS: Mapping[Prompted, int] = MappingProxyType({"visual_saliency": 0, "visual_features": 0, "visual_grid": 1})
"""Which axis of what the prompt brings along is T."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphView:
    """What a selector's nodes may read. Before the decoder there is no attention: those fields are None."""

    text_rows_X: "ir.Value"
    """Rows that hold text [X] int64, ascending; they always stay."""
    num_keep: "ir.Value"
    """[1] int64, visual tokens that stay, at most N."""
    hidden_TD: "ir.Value"
    """What is about to be gathered: embeddings, or hidden states."""
    scale: float = 1.0
    """1 / sqrt(d)."""
    query: "ir.Value | None" = None
    """Of the last prompt token, [1, H, 1, d], rotated."""
    key: "ir.Value | None" = None
    """[1, G, T, d], rotated."""
    value: "ir.Value | None" = None
    """[1, G, T, d]."""
    plain_query: "ir.Value | None" = None
    """`query` before its rotation."""
    plain_key: "ir.Value | None" = None
    """`key` before its rotation."""
    output_weight: "ir.Value | None" = None
    """[D, H*d]."""
    visual_saliency: "ir.Value | None" = None
    """[T] FP32, as in `TensorView`."""
    visual_features: "ir.Value | None" = None
    """[T, F]."""
    visual_grid: "ir.Value | None" = None
    """[2, T] int64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorView:
    """The same for the eager reference, all floating point in FP32."""

    is_visual: "Tensor"
    """[T] bool."""
    num_keep: int
    """Visual tokens that stay, at most N."""
    hidden: "Tensor"
    """[T, D]"""
    attention: "Tensor | None" = None
    """[H, T], what the last prompt token gives to each token, over all keys, by the model's own attention."""
    key: "Tensor | None" = None
    """[G, T, d]"""
    value: "Tensor | None" = None
    """[G, T, d]"""
    plain_query: "Tensor | None" = None
    """[H, d], not rotated."""
    plain_key: "Tensor | None" = None
    """[G, T, d], not rotated."""
    output_weight: "Tensor | None" = None
    """[D, H*d]"""
    visual_saliency: "Tensor | None" = None
    """[T], attention that the vision tower pays to each visual token: by [CLS], or received; 0 for text."""
    visual_features: "Tensor | None" = None
    """[T, F], the tower's own features of each visual token, before the projector where there is one; 0 for text."""
    visual_grid: "Tensor | None" = None
    """[2, T] int64, row and column of each visual token in its picture (or tile); -1 for text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """What a selector's cost depends on."""

    tokens: int
    visual: int
    keep: int
    """Visual tokens that stay."""
    dims: "DecoderDims"
    options: Mapping[str, Option]
    """Of the selector, all of them."""


@dataclass(frozen=True)
class Function:
    """A function of domain `capa`, in ONNX's text; lines that begin with # are comments."""

    text: str


class NodeWriter(Protocol):
    """Adds nodes to a graph: an ONNX operator by its name, or a function of domain `capa`."""

    def __getattr__(self, operator: str) -> "Callable[..., ir.Value]": ...

    def capa(self, name: str, *inputs: "ir.Value", **attributes: Any) -> "tuple[ir.Value, ...]":
        """Add one of the operators that have kernels, by its name; returns its outputs."""
        ...

    def apply(self, function: Function, *inputs: "ir.Value", **attributes: Any) -> "tuple[ir.Value, ...]":
        """Add a function that has no plugin; returns its outputs, also where there is but one."""
        ...

    def scores(self, function: Function, text_rows_X: "ir.Value", *inputs: "ir.Value", **attributes: Any) -> "ir.Value":
        """Add a function that gives each token an amount [T]; returns scores [T] FP32, +inf for text."""
        ...


@dataclass(frozen=True, kw_only=True)
class Selector:
    """How visual tokens are chosen, and what that takes."""

    score: "Callable[..., ir.Value]"
    """Adds nodes, from `NodeWriter`, `GraphView` and the options, that score every token: [T] FP32, +inf for text.

    The highest `num_keep` visual tokens stay. A selector that is not graded gives the i-th chosen `num_keep - i` and
    all others 0.
    """
    reference: "Callable[..., Tensor]"
    """Computes the same [T] from `TensorView` and the options, in plain PyTorch that shares no code with the nodes;
    what it gives to text does not count."""
    flops: Callable[[Size], int]
    """Of scoring, its leading terms; a multiplication and an addition are two, a comparison is one."""
    place: Place
    layer: int | None = None
    """Where it acts unless a layer is named; None for the recipe's own, and before the decoder."""
    graded: bool = True
    """Whether scores are amounts, which compare; else they are ranks of a choice made step by step."""
    reads: Sequence[Prompted] = ()
    least: int | str = 1
    """Fewest visual tokens it can keep of more than that, or the option that says how many."""
    options: Mapping[str, Setting] = field(default_factory=dict[str, Setting])
    """What a recipe may set."""


@cache
def selectors() -> tuple[str, ...]:
    """Names of all selectors."""
    names = {module.name for module in iter_modules([str(Path(__file__).parent)])} - {"selector", "text"}
    return tuple(sorted(name.replace("_", "-") for name in names if not name.startswith("_")))


def load_selector(name: str) -> Selector:
    """The selector of that name.

    Raises:
        CapaError: there is none of that name.
    """
    return _module(name).SELECTOR


def summary(name: str) -> str:
    """One sentence on a selector: the first of its module.

    Raises:
        CapaError: there is none of that name.
    """
    return (_module(name).__doc__ or "").splitlines()[0]


def _module(name: str) -> ModuleType:
    if name not in selectors():
        raise CapaError(f"unknown selector {name!r}; known selectors: {', '.join(selectors())}", ExitCode.USAGE)
    return import_module(f"{__package__}.{name.replace('-', '_')}")


def reads(chosen: Iterable[Chosen]) -> tuple[Prompted, ...]:
    """What the prompt has to bring along for some selectors."""
    return tuple(sorted({name for one in chosen for name in load_selector(one.name).reads}))
