"""Random tokens, the baseline that a method has to beat (2511.02650): rows, shuffled by a keyed permutation.

The keys are the seed and the number of tokens: of the prompt, no other whole number that differs from one question or
picture to the next reaches a stage, and one that is rounded would make each precision choose its own.
"""

from typing import TYPE_CHECKING

from capa_export.selectors.selector import Function, GraphView, NodeWriter, Option, Selector, Setting, Size, TensorView

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

__all__ = ["SELECTOR"]


_PRIME = 46337
"""Products of two residues stay below 2^31, so that any integer type is exact; 3 does not divide _PRIME - 1, so that
cubes are a permutation of the residues. A prompt of more rows has ties, which go to the lowest row."""
_CONSTANTS = (0, 25717, 13711, 42023, 7919, 31337)
"""One for each round, arbitrary and different."""

_ROW = Function(f"""
RandomRow (hidden) => (residue, num_tokens) {{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first_axis = Constant <value_ints = [0]> ()
    size = Shape <start = 0, end = 1> (hidden)
    num_tokens = Squeeze (size, first_axis)
    row_T = Range (zero, num_tokens, one)
    prime = Constant <value_int = {_PRIME}> ()
    quotient_T = Div (row_T, prime)
    multiple_T = Mul (quotient_T, prime)
    residue = Sub (row_T, multiple_T)
}}
""")

_ROUND = Function(f"""
RandomRound <key> (residue, num_tokens) => (mixed) {{
    # (residue + key + T)^3 mod prime, reduced after each step.
    prime = Constant <value_int = {_PRIME}> ()
    seed_key = Constant <value_int: int = @key> ()
    key_number = Add (seed_key, num_tokens)
    sum_T = Add (residue, key_number)
    sum_quotient_T = Div (sum_T, prime)
    sum_multiple_T = Mul (sum_quotient_T, prime)
    base_T = Sub (sum_T, sum_multiple_T)
    product_T = Mul (base_T, base_T)
    product_quotient_T = Div (product_T, prime)
    product_multiple_T = Mul (product_quotient_T, prime)
    square_T = Sub (product_T, product_multiple_T)
    cubic_T = Mul (square_T, base_T)
    cubic_quotient_T = Div (cubic_T, prime)
    cubic_multiple_T = Mul (cubic_quotient_T, prime)
    mixed = Sub (cubic_T, cubic_multiple_T)
}}
""")

_AMOUNT = Function("""
RandomScore (residue) => (amounts) {
    amounts = Cast <to = 1> (residue)
}
""")


def _keys(seed: Option) -> list[int]:
    """The seed's two lowest digits to base _PRIME in turn."""
    digits = divmod(int(seed), _PRIME)
    return [(digits[i % 2] + constant) % _PRIME for i, constant in enumerate(_CONSTANTS)]


def score(op: NodeWriter, view: GraphView, *, seed: Option) -> "ir.Value":
    """Rounds of MiMC (2016/492), a block cipher of cubes, on the row within what enters the stage."""
    residue_T, num_tokens = op.apply(_ROW, view.hidden_TD)
    for key in _keys(seed):
        (residue_T,) = op.apply(_ROUND, residue_T, num_tokens, key=key)
    return op.scores(_AMOUNT, view.text_rows_X, residue_T)


def reference(view: TensorView, *, seed: Option) -> "Tensor":
    """Shuffle the rows by the same rounds in Python's integers."""
    import torch

    residues = list(range(num_tokens := len(view.is_visual)))
    for key in _keys(seed):
        residues = [pow(residue + key + num_tokens, 3, _PRIME) for residue in residues]
    return torch.tensor(residues, dtype=torch.float32)


def flops(size: Size) -> int:
    """Zero: the rounds are a few integer operations per token."""
    del size
    return 0


SELECTOR = Selector(
    score=score,
    reference=reference,
    flops=flops,
    place="attention",
    options={"seed": Setting(0, whole=True)},
)
