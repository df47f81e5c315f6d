"""The interface of selectors, which choose the visual tokens that stay: as graph nodes, and again in plain PyTorch.

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
    "Function",
    "GraphView",
    "NodeWriter",
    "Option",
    "Place",
    "PromptInput",
    "Selector",
    "SelectorChoice",
    "Setting",
    "Size",
    "TensorView",
    "load_selector",
    "prompt_inputs",
    "selectors",
    "summary",
]

Place = Literal["attention", "entry", "input"]
"""Where a selector acts: right after the attention of its layer, which scores; where its layer begins, scored by the
attention of the layer before; or before the decoder."""

Option = int | float
PromptInput = Literal["visual_saliency", "visual_features", "visual_grid"]
"""An input of the prompt that some selectors read; see the fields of `TensorView`."""


class Setting(NamedTuple):
    """An option of a selector."""

    default: Option
    least: Option = 0
    most: Option = inf
    whole: bool = False
    """Whether it is a count or a switch."""

    def problem(self, value: Option) -> str | None:
        """Say what is wrong with a value; None where nothing is."""
        if self.least <= value <= self.most and value < inf and not (self.whole and value != int(value)):
            return None
        limits = f"of {self.least:g} or more" if self.most == inf else f"from {self.least:g} to {self.most:g}"
        return f"it takes a {'whole ' if self.whole else ''}number {limits}, not {value}"


class SelectorChoice(NamedTuple):
    """A selector's name, and the options that are not the default's."""

    name: str
    options: Mapping[str, Option] = MappingProxyType({})

    @property
    def reads_tower(self) -> bool:
        """Whether the selector reads outputs of the vision tower other than the visual embeddings."""
        return not TOWER_OUTPUTS.keys().isdisjoint(load_selector(self.name).reads)

    @property
    def values(self) -> dict[str, Option]:
        """The value of every option, defaults included."""
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


CAPA = SelectorChoice("capa")


TOWER_OUTPUTS: Mapping[PromptInput, str] = MappingProxyType(
    {"visual_saliency": "saliency", "visual_features": "tower_features"}
)
"""Prompt inputs that the vision tower computes -> the name of its output."""
TOKEN_AXIS: Mapping[PromptInput, int] = MappingProxyType({"visual_saliency": 0, "visual_features": 0, "visual_grid": 1})
"""Prompt input -> its axis of size T."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphView:
    """The graph values that a selector's nodes may read; before the decoder those of attention are None."""

    text_rows_X: "ir.Value"
    """Rows that hold text [X] int64, ascending; they always stay."""
    num_keep: "ir.Value"
    """[1] int64, visual tokens that stay, at most N."""
    hidden_TD: "ir.Value"
    """[T, D], the embeddings or hidden states that will be gathered."""
    scale: float = 1.0
    """1 / sqrt(d)."""
    query: "ir.Value | None" = None
    """[1, H, 1, d], query of the last prompt token, rotated."""
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
    """The tensors that a selector's eager reference may read, all floating point in FP32."""

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
    """The sizes that a selector's FLOPs depend on."""

    tokens: int
    visual: int
    keep: int
    """Visual tokens that stay."""
    dims: "DecoderDims"
    options: Mapping[str, Option]
    """All of the selector's options."""


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
    """Counts the leading terms of scoring; a multiplication and an addition are two, a comparison is one."""
    place: Place
    layer: int | None = None
    """Layer where it acts unless the schedule names one; None for the recipe's own layer, and before the decoder."""
    graded: bool = True
    """Whether scores are amounts, which compare; else they are ranks of a choice made step by step."""
    reads: Sequence[PromptInput] = ()
    least: int | str = 1
    """Fewest visual tokens it can keep of more than that, or the option that says how many."""
    options: Mapping[str, Setting] = field(default_factory=dict[str, Setting])
    """Options that a recipe may set."""


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


def prompt_inputs(choices: Iterable[SelectorChoice]) -> tuple[PromptInput, ...]:
    """All prompt inputs that some selectors read, sorted."""
    return tuple(sorted({name for choice in choices for name in load_selector(choice.name).reads}))
