"""What every method says to a question: the part that the eager model and a bundle's graphs have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from capa_export.base.errors import CapaError
from capa_export.data.questions import Question
from capa_export.model.prompt import Prompt, Prompter

__all__ = ["DENSE", "Answer", "Ask", "Asked", "Outcome", "asking", "longest"]

DENSE = "dense"
"""The method that all others are compared with."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a method says, and how far it is from dense."""

    method: str
    text: str
    tokens: int
    """Without the one that ends the answer."""
    kept: int
    """Visual tokens after the last stage."""
    visual: int
    """All of them."""
    kl: float
    """KL(dense || this) of the first token, in nats."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, and the methods whose answers are wanted."""

    question: Question
    methods: Sequence[str]


Outcome = Sequence[Answer] | str
"""Or why the question cannot be asked."""
Ask = Callable[[Sequence[Asked]], list[Outcome]]


def asking(answers: Callable[[Question, Sequence[str]], list[Answer]]) -> Ask:
    """Several questions at a time, where one that cannot be asked does not end the others."""

    def outcome(asked: Asked) -> Outcome:
        try:
            return answers(asked.question, asked.methods)
        except CapaError as error:
            return str(error)

    return lambda task: [outcome(asked) for asked in task]


def longest(prompter: Prompter, prompt: Prompt, max_new_tokens: int) -> int:
    """Tokens that an answer may have: from the context's end on the rotary frequencies would be others."""
    context = prompter.dims.decoder.rope_limit
    return max_new_tokens if context is None else min(max_new_tokens, context - prompt.next_position + 1)
