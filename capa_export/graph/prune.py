"""One stage of a schedule in the graph: a selector's score, and all but the best tokens gone.

T = tokens, K = tokens kept, X = text tokens.
"""

from collections.abc import Mapping

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from capa_export.base.dims import DecoderDims
from capa_export.graph.build import END, SelectorNodes, call
from capa_export.graph.tokens import Heads, KeyValue, Scorer, Tokens
from capa_export.selectors.selector import TOKEN_AXIS, GraphView, SelectorChoice, load_selector

__all__ = ["Prune"]


class Prune(nn.Module):
    """One stage: scores the visual tokens, and drops all but the best."""

    def __init__(self, dims: DecoderDims, chosen: SelectorChoice, min_keep_per_image: int) -> None:
        super().__init__()
        self.scale = dims.head_dim**-0.5
        self.chosen, self.selector = chosen, load_selector(chosen.name)
        self.min_keep_per_image = min_keep_per_image

    def forward(
        self,
        op: OpBuilder,
        tokens: Tokens,
        num_keep: ir.Value,
        prompted: Mapping[str, ir.Value],
        scorer: Scorer | None = None,
    ) -> tuple[Tokens, KeyValue | None]:
        """The surviving tokens; and their keys and values, where the stage acts right after an attention.

        Args:
            op: builder.
            tokens: that enter the stage.
            num_keep: [1], visual tokens that stay.
            prompted: what the prompt brings along, of all its tokens.
            scorer: the attention that scores; None before the decoder.
        """
        assert tokens.text_rows_X is not None
        view = GraphView(
            text_rows_X=tokens.text_rows_X,
            num_keep=num_keep,
            hidden_TD=tokens.hidden_TD,
            scale=self.scale,
            **({} if scorer is None else self._of_attention(op, *scorer)),
            **self._of_prompt(op, tokens, prompted),
        )
        scores_T = self.selector.score(SelectorNodes(op), view, **self.chosen.values)
        num_rows = op.Add(num_keep, op.Shape(tokens.text_rows_X))
        (kept_K,) = call(op, "TopKKeep", scores_T, num_rows, min_keep_per_image=self.min_keep_per_image)

        cache = None
        if self.selector.place == "attention":
            assert scorer is not None
            heads, _ = scorer
            hidden_KD, key, value, cos, sin = call(
                op,
                "TokenGather",
                tokens.hidden_TD,
                heads.key,
                heads.value,
                tokens.cos_BTd,
                tokens.sin_BTd,
                kept_K,
            )
            cache = key, value
        else:
            hidden_KD = op.Gather(tokens.hidden_TD, kept_K, axis=0)
            cos, sin = (op.Gather(table, kept_K, axis=1) for table in (tokens.cos_BTd, tokens.sin_BTd))
        # Text is always kept: the row of a text token is how many tokens kept stand before it.
        is_before_XK = op.Less(op.Unsqueeze(kept_K, [0]), op.Unsqueeze(tokens.text_rows_X, [1]))
        row_X = op.ReduceSum(op.Cast(is_before_XK, to=ir.DataType.INT64), [1], keepdims=0)
        survivors = Tokens(
            hidden_TD=hidden_KD,
            cos_BTd=cos,
            sin_BTd=sin,
            text_rows_X=row_X,
            deepstack=tuple(op.Gather(features_TD, kept_K, axis=0) for features_TD in tokens.deepstack),
            # A later stage numbers its rows within what the earlier ones kept.
            kept=(*tokens.kept, op.Gather(tokens.kept[-1], kept_K, axis=0) if tokens.kept else kept_K),
        )
        return survivors, cache

    def _of_attention(self, op: OpBuilder, heads: Heads, output_weight: ir.Value) -> dict[str, ir.Value]:
        """What the selector may read of an attention; the queries are those of the last token alone."""
        return {
            "query": op.Slice(heads.query, [-1], [END], [2]),
            "key": heads.key,
            "value": heads.value,
            "plain_query": op.Slice(heads.plain_query, [-1], [END], [2]),
            "plain_key": heads.plain_key,
            "output_weight": output_weight,
        }

    def _of_prompt(self, op: OpBuilder, tokens: Tokens, prompted: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
        """What the selector reads of the prompt's, for the tokens that are left."""
        return {
            name: op.Gather(prompted[name], tokens.kept[-1], axis=TOKEN_AXIS[name]) if tokens.kept else prompted[name]
            for name in self.selector.reads
        }
