"""Answers of the small random model's engines, whose tokens nobody looks at."""

from capa_export.model.prompt import Prompt
from capa_export.run.decoding import greedy
from capa_export.run.engine_model import EngineModel

__all__ = ["HEADS", "LAYERS", "LIMIT", "ROW", "generate", "num_keep"]

LAYERS, HEADS, ROW = 5, 2, 16 * 2
"""The random model: GQA with two KV heads of 16 numbers in FP16."""
LIMIT = 6


def num_keep(prompt: Prompt) -> list[int]:
    return [prompt.num_visual // 4]


def generate(engines: EngineModel, prompts: list[Prompt], limit: int = LIMIT) -> int:
    """Number of tokens of each answer."""
    runs = [engines.prefill(prompt, num_keep(prompt)) for prompt in prompts]
    return len(list(greedy(engines, prompts, runs, [], limit)))
