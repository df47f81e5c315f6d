"""Tokens chosen on the device: each step reads the token before it there, and the host learns what was said.

B = batch, V = vocabulary, D = hidden size, A = rows of the position ids, S = stages.
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from capa_export.base.errors import CapaError
from capa_export.base.precision import FORMATS, Precision
from capa_export.graph.contract import INPUTS_EMBEDS, LOGITS, PAST_LENGTHS, POSITION_IDS
from capa_export.kernels import STEP_OPERATORS, token_embedding
from capa_export.kernels.cuda import Memory, PinnedBuffer, enter_context
from capa_export.kernels.operator import Operator
from capa_export.kernels.plugins.launcher import Launcher, scratch_offsets
from capa_export.kernels.token_choice import COLDEST, LIKELIEST, NEVER, SAMPLED, SEEN
from capa_export.run.decoding import TokenRule
from capa_export.run.execution import Arena
from capa_export.run.steps import Steps, StepWork

__all__ = ["StepKernels", "TokenChoice"]

_PRECISIONS: Mapping[str, Precision] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_ROWS = 4096
"""Rows of the embedding that are converted at a time."""


class StepKernels:
    """The kernels around a step, and the embedding, which the GPU reads where it lies in pinned memory of the host.

    A step reads a row of it for each prompt, some kilobytes; the whole would take a tenth of a small card.
    """

    def __init__(self, embedding: np.ndarray, dtype: Any) -> None:
        """Copy the embedding.

        Args:
            embedding: [V, D].
            dtype: of the engine's activations.

        Raises:
            CapaError: the system does not pin that much.
        """
        self.launcher = Launcher(None, STEP_OPERATORS)
        self.precision: Precision = _PRECISIONS[np.dtype(dtype).name]
        self.rows = len(embedding)
        self.table = PinnedBuffer(embedding.size * FORMATS[self.precision].num_bytes)
        table = self.table.view(0, embedding.shape, dtype)
        for start in range(0, len(embedding), _ROWS):
            table[start : start + _ROWS] = embedding[start : start + _ROWS]

    def prepare(self, operator: Operator, size: Any, addresses: Mapping[str, int], stream: Any) -> Callable[[], None]:
        """What launches an operator: it allocates nothing, and needs no memory of the host's afterwards."""
        enter_context()
        calls = self.launcher.prepare(operator, self.precision, size)
        return lambda: self.launcher.launch(operator, calls, addresses, int(stream))


class TokenChoice:
    """What chooses the tokens of a batch and embeds them for its steps, in memory of its own.

    Args:
        kernels: the kernels.
        steps: that read the tokens.
        sampled: whether tokens are sampled, or the likeliest are taken.

    Raises:
        CapaError: the GPU has no room, or there are no kernels for it.
    """

    def __init__(self, kernels: StepKernels, steps: Steps, *, sampled: bool) -> None:
        # Not the steps themselves, which hold this: they are to go with their last reference.
        self._stream, self._execution, self._inputs = steps.stream, steps.execution, steps.buffers
        batch, vocabulary = steps.shapes[LOGITS]
        size = SimpleNamespace(
            batch=batch,
            vocabulary=vocabulary,
            hidden_size=steps.shapes[INPUTS_EMBEDS][-1],
            axes=steps.shapes[POSITION_IDS][0],
            stages=steps.shapes[PAST_LENGTHS][0],
        )
        if vocabulary > kernels.rows:
            raise CapaError(f"logits are of {vocabulary} tokens, and the embedding of {kernels.rows}")
        operator = SAMPLED if sampled else LIKELIEST
        offsets, scratch = scratch_offsets(operator, size)
        self._memory = Arena().regions(
            {
                "marks": 4 * batch * vocabulary,
                "numbers": 16,
                "said": 4 * batch,
                "top_k": 4,
                "keys": 8 * batch,
                "tokens": 8 * batch,
                "scratch": scratch,
            }
        )
        addresses = {name: one.address for name, one in self._memory.items()}
        addresses |= {name: addresses["scratch"] + offset for name, offset in offsets.items()}
        addresses |= {
            "logits": steps.buffers[LOGITS].address,
            "embeds": steps.buffers[INPUTS_EMBEDS].address,
            "positions": steps.buffers[POSITION_IDS].address,
            "lengths": steps.buffers[PAST_LENGTHS].address,
            "table": kernels.table.address,
        }
        self._axes = size.axes
        self._choose = kernels.prepare(operator, size, addresses, self._stream.handle)
        self._embed = kernels.prepare(
            token_embedding.OPERATOR,
            SimpleNamespace(**{**vars(size), "vocabulary": kernels.rows}),
            addresses,
            self._stream.handle,
        )
        self._pinned = PinnedBuffer(8 * batch)
        self._tokens = self._pinned.view(0, (batch,), np.int64)
        self.work = StepWork()
        """A step of the tokens that were chosen last, and the choice of the next."""

    @property
    def tokens(self) -> np.ndarray:
        """[B], what was chosen last."""
        return self._tokens.copy()

    def begin(
        self, logits: np.ndarray, rules: Sequence[TokenRule], positions: Sequence[int], lengths: np.ndarray
    ) -> None:
        """Choose the first token of each answer.

        Args:
            logits: [B, V], of the prompts.
            rules: of each answer; all have the same settings.
            positions: of each answer's first token.
            lengths: [1 + S, B], rows of the caches.
        """
        batch, vocabulary = logits.shape
        marks = np.zeros((batch, vocabulary), np.int32)
        for row, rule in zip(marks, rules, strict=True):
            for tokens, mark in ((rule.seen, SEEN), (rule.never, NEVER)):
                row[[token for token in tokens if 0 <= token < vocabulary]] |= mark
        penalty, temperature, *others = rules[0].numbers
        # The kernel that embeds a token goes on by one.
        places = np.broadcast_to(np.array(positions) - 1, (self._axes, batch))
        buffers: Mapping[str, Memory] = {**self._memory, **self._inputs}
        for name, values, dtype in (
            (LOGITS, logits, np.float32),
            (POSITION_IDS, places, np.int64),
            (PAST_LENGTHS, lengths - 1, np.int64),
            ("marks", marks, np.int32),
            ("numbers", [penalty, max(temperature, COLDEST), *others], np.float32),
            ("said", [0] * batch, np.int32),
            ("top_k", [min(rules[0].top_k, vocabulary)], np.int32),
            ("keys", [rule.key or 0 for rule in rules], np.uint64),
        ):
            self._stream.upload(buffers[name], np.ascontiguousarray(values, dtype))
        self._choose()
        self._stream.copy_out(self._pinned, self._memory["tokens"])
        self._stream.synchronize()

    def enqueue(self) -> None:
        """Put a step of the tokens chosen last on the stream, the choice of the next, and their way to the host."""
        enter_context()
        self._embed()
        self._execution.enqueue()
        self._choose()
        self._stream.copy_out(self._pinned, self._memory["tokens"])
