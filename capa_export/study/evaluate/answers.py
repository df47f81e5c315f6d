"""The types of a method's answers, which the eager model and a bundle's graphs share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from capa_export.base.errors import CapaError
from capa_export.data.questions import Question
from capa_export.model.prompt import Prompt, Prompter

__all__ = ["DENSE", "Answer", "AnswerRequest", "Answerer", "Outcome", "answerer", "max_answer_tokens"]

DENSE = "dense"
"""The method that all others are compared with."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A method's answer, and its distance from dense."""

    method: str
    text: str
    tokens: int
    """Number of tokens, without the one that ends the answer."""
    kept: int
    """Visual tokens after the last stage."""
    visual: int
    """Visual tokens of the prompt."""
    kl: float
    """KL(dense || this) of the first token, in nats."""


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """A question, and the methods that are to answer it."""

    question: Question
    methods: Sequence[str]


Outcome = Sequence[Answer] | str
"""Answers to a question, or the reason why it cannot be asked."""
Answerer = Callable[[Sequence[AnswerRequest]], list[Outcome]]


def answerer(answers: Callable[[Question, Sequence[str]], list[Answer]]) -> Answerer:
    """Answer several questions in turn; one that cannot be asked does not end the others."""

    def outcome(asked: AnswerRequest) -> Outcome:
        try:
            return answers(asked.question, asked.methods)
        except CapaError as error:
            return str(error)

    return lambda task: [outcome(asked) for asked in task]


def max_answer_tokens(prompter: Prompter, prompt: Prompt, max_new_tokens: int) -> int:
    """Tokens that an answer may have, which ends with the context."""
    return min(max_new_tokens, prompter.dims.decoder.longest - prompt.next_position + 1)
