"""Asks what has not been asked yet, and says what came of it."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from capa_export.base.errors import CapaError
from capa_export.base.files import write_whole
from capa_export.base.progress import Report, silent
from capa_export.base.workers import Workers, chunks, run_tasks
from capa_export.data.questions import Question, Questions
from capa_export.study.evaluate.answers import Answer, AnswerRequest
from capa_export.study.evaluate.models import EvaluatedModel
from capa_export.study.evaluate.results import Results
from capa_export.study.evaluate.schema import Evaluation, SkippedRow
from capa_export.study.evaluate.scores import AnsweredQuestion, score_methods

__all__ = ["EVALUATION", "MAX_SKIPPED", "evaluate"]

EVALUATION = "evaluation.json"
MAX_SKIPPED = 0.01
"""Share of the rows that may be skipped."""
_QUESTIONS_A_TASK = 4


@dataclass
class _Progress:
    """Counts the rows that are done, and lists those that cannot be asked."""

    report: Report
    total: int
    done: int = 0
    skipped: list[SkippedRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.report("evaluate", 0, self.total)

    def skip(self, row: int, reason: str) -> None:
        self.skipped.append(SkippedRow(row=row, reason=reason))
        self.advance()

    def advance(self) -> None:
        self.done += 1
        self.report("evaluate", self.done, self.total)


def evaluate(
    evaluated: EvaluatedModel,
    questions: Questions,
    out: Path,
    *,
    workers: Workers | None = None,
    seed: int = 0,
    report: Report = silent,
) -> Evaluation:
    """Put every question to every method, and compare the answers; what `out` holds already is not asked again.

    Args:
        evaluated: the model and the methods.
        questions: with pictures.
        out: takes the answers as they come, and `evaluation.json`.
        workers: where the model runs.
        seed: of the rows drawn; written down.
        report: progress.

    Raises:
        CapaError: `out` is of another model, or in use, or cannot be written; or no row can be asked.
    """
    progress = _Progress(report, len(questions.rows))
    with closing(Results(out, model=evaluated.digest, source=evaluated.source)) as results:
        known = _ask(evaluated, questions, results, workers or Workers(), progress)
        answered = [
            AnsweredQuestion(question, answers) for question, answers in known if len(answers) == len(evaluated.keys)
        ]
        skipped = tuple(sorted(progress.skipped, key=lambda entry: entry.row))
        if not answered:
            raise CapaError(f"{questions.name}: no row can be asked; row {skipped[0].row}: {skipped[0].reason}")
        benchmark = questions.benchmark
        found = Evaluation(
            model=evaluated.source,
            runs=evaluated.runs,
            data=questions.name,
            benchmark=benchmark.name,
            metric=benchmark.metric,
            questions=len(answered),
            answered=sum(bool(entry.question.answers) for entry in answered),
            skipped=skipped,
            methods=tuple(score_methods(answered, list(evaluated.keys), benchmark.metric)),
            max_new_tokens=evaluated.max_new_tokens,
            seed=seed,
            notes=evaluated.notes,
        )
        _write(out / EVALUATION, found)
        return found


def _write(path: Path, found: Evaluation) -> None:
    try:
        write_whole(path, found.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise CapaError(f"{path}: {error.strerror}; make room for it, the answers are kept") from error


def _ask(
    evaluated: EvaluatedModel, questions: Questions, results: Results, workers: Workers, progress: _Progress
) -> list[tuple[Question, dict[str, Answer]]]:
    """Ask the questions; returns them in order, without their pictures, each with its answers by method."""
    keys: dict[int, tuple[Question, dict[str, str]]] = {}
    """Row -> its question, and method -> key of the answer."""
    given: list[list[int]] = []
    """Rows of each task."""

    def waiting() -> Iterator[tuple[int, AnswerRequest]]:
        for row in questions.rows:
            try:
                question = questions.read(row)
            except CapaError as error:
                progress.skip(row, str(error))
                continue
            digest = question.digest()
            wanted = {method: results.key(digest, key) for method, key in evaluated.keys.items()}
            keys[row] = replace(question, turns=()), wanted
            if missing := [method for method, key in wanted.items() if key not in results.found]:
                yield row, AnswerRequest(question, missing)
            else:
                progress.advance()

    def tasks() -> Iterator[Sequence[AnswerRequest]]:
        for chunk in chunks(waiting(), _QUESTIONS_A_TASK):
            given.append([row for row, _ in chunk])
            yield [asked for _, asked in chunk]

    for number, outcomes in run_tasks(evaluated.prepare, tasks(), workers):
        for row, outcome in zip(given[number], outcomes, strict=True):
            question, wanted = keys[row]
            if isinstance(outcome, str):
                progress.skip(row, f"{question.id}: {outcome}")
            else:
                results.add(question.id, {wanted[answer.method]: answer for answer in outcome})
                progress.advance()
    found = results.found
    return [
        (question, {method: found[key] for method, key in wanted.items() if key in found})
        for _, (question, wanted) in sorted(keys.items())
    ]
