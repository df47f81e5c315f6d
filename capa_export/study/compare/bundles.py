"""Compares two bundles: recipe, kept tokens, logits, answers, speed and size; needs neither checkpoint."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from capa_export.base.errors import CapaError
from capa_export.base.progress import Report, silent, tracked
from capa_export.base.statistics import Rate
from capa_export.bundle.store import PARITY, Bundle
from capa_export.config.gates import Limits
from capa_export.data.samples import samples_from
from capa_export.parity.golden import GOLDEN
from capa_export.report.schema import Check, ParityReport, read_parity
from capa_export.run.bundled import require_memory
from capa_export.study.compare.manifests import changes, engines, sizes
from capa_export.study.compare.schema import AnswerComparison, BundleComparison, LogitChange, Timing
from capa_export.study.compare.side_by_side import PromptPair, Side, SideBySide

__all__ = ["compare"]

_NUM_SAMPLES = 8


def compare(
    reference: Bundle,
    candidate: Bundle,
    *,
    images: Path | None = None,
    samples: int | None = None,
    limits: Limits | None = None,
    trust_remote_code: bool = False,
    report: Report = silent,
) -> BundleComparison:
    """Compare a candidate with a reference, and say whether what changed may.

    Args:
        reference: what is deployed.
        candidate: what is to take its place.
        images: to ask about. Where neither these nor `samples` are given and a bundle has golden samples, those.
        samples: how many pictures, or built-in scenes; 8 by default.
        limits: what the candidate may cost.
        trust_remote_code: whether Python in the bundles may run, for their tokenizers and image processors.
        report: progress.

    Raises:
        CapaError: a bundle was changed since it was built, the two are of different families or vocabularies, or
            there is nothing to ask about.
    """
    require_memory(reference, candidate)
    open_side = partial(Side.of, trust_remote_code=trust_remote_code)
    sides = open_side(reference), open_side(candidate)
    _check_alike(*sides)
    name, count, questions = _questions(sides, images, samples)
    both = SideBySide(sides)
    for index, question in enumerate(tracked(questions, "compare", count, report)):
        if index == 0:
            both.warm(question)
        both.ask(question)
    parities = [_parity(bundle) for bundle in (reference, candidate)]
    logits, answers, timings = both.logits(), both.answers() or _validated_answers(*parities), tuple(both.timings())
    checks = (
        _own_validation(candidate, parities[1]),
        *_of_answers(answers, limits or Limits()),
        *_of_logits_and_speed(logits, timings, limits or Limits()),
    )
    failures = tuple(check.failure for check in checks if check.failure)
    return BundleComparison(
        passed=not failures,
        failures=failures,
        reference=str(reference.folder),
        candidate=str(candidate.folder),
        prompts=name,
        num_prompts=count,
        checks=checks,
        changes=tuple(changes(reference, candidate)),
        kept=tuple(both.kept()),
        logits=logits,
        answers=answers,
        timings=timings,
        sizes=tuple(sizes(reference, candidate)),
        engines=tuple(engines(reference, candidate)),
    )


def _check_alike(reference: Side, candidate: Side) -> None:
    """Refuse two bundles whose logits mean different things."""
    families = [side.recipe.family for side in (reference, candidate)]
    sizes = [side.prompter.dims.decoder.vocab_size for side in (reference, candidate)]
    for what, (one, other) in (("family", families), ("vocabulary size", sizes)):
        if one != other:
            raise CapaError(
                f"{candidate.bundle.folder}: {what} {other}, and {one} in {reference.bundle.folder}; "
                "compare takes two bundles of one model"
            )
    if reference.prompter.tokenizer.get_vocab() != candidate.prompter.tokenizer.get_vocab():
        raise CapaError(
            f"{candidate.bundle.folder}: its tokenizer numbers tokens otherwise than that of "
            f"{reference.bundle.folder}; compare takes two bundles of one vocabulary"
        )


def _questions(
    sides: tuple[Side, Side], images: Path | None, samples: int | None
) -> tuple[str, int, Iterator[PromptPair]]:
    """The questions' source, their number, and the questions themselves, one in memory at a time."""
    if images is None and samples is None:
        for folder in (side.bundle.folder for side in sides if GOLDEN in side.bundle.manifest["stages"]):
            # Torch comes with it.
            from capa_export.parity.records import Records

            records = Records(folder / GOLDEN)
            name = f"golden samples of {folder}"
            return name, len(records), (PromptPair((record.prompt, record.prompt)) for record in records)
    drawn = samples_from(images, sides[0].recipe, samples or _NUM_SAMPLES, split="held_out")
    reference, candidate = (side.prompter for side in sides)
    return (
        drawn.name,
        drawn.count,
        (PromptPair((reference.chat(one.turns), candidate.chat(one.turns)), one.answer) for one in drawn),
    )


def _parity(bundle: Bundle) -> ParityReport | None:
    """The report of a bundle's validation; None where it has not run since the export."""
    return read_parity(bundle.folder / PARITY) if "validate" in bundle.manifest["stages"] else None


def _validated_answers(*parities: ParityReport | None) -> AnswerComparison | None:
    """Accuracy as each bundle's own validation measured it; None where one did not."""
    known = [(parity.method_error.questions, rate) for parity in parities if parity and (rate := _accuracy(parity))]
    if len(known) < len(parities):
        return None
    (asked, reference), (asked_too, candidate) = known
    questions = min(asked, asked_too)
    return AnswerComparison(
        source="parity.json", questions=questions, reference=reference, candidate=candidate, difference=None
    )


def _accuracy(parity: ParityReport) -> Rate | None:
    return next((method.accuracy for method in parity.method_error.methods if method.name == "capa"), None)


def _own_validation(candidate: Bundle, parity: ParityReport | None) -> Check:
    failure = ""
    if parity is None:
        failure = f"{candidate.folder}: was not validated; `capa-export validate {candidate.folder}` does"
    elif not parity.fit:
        failure = f"{candidate.folder}: failed its own validation: {', '.join(parity.failures[:1])}"
    return Check(name="passed its own validation", value=float(not failure), at_least=1, failure=failure)


def _of_answers(answers: AnswerComparison | None, limits: Limits) -> Iterator[Check]:
    if answers is None:
        return
    before, now = answers.reference.value, answers.candidate.value
    words = f"{now:.1%} of {answers.questions} answers are right, {before:.1%} before"
    if answers.difference is not None:
        high = answers.difference.high
        failure = f"{words}: the 95 % interval of the difference ends at {high:+.1%}, below 0" if high < 0 else ""
        yield Check(name="accuracy difference, upper end", value=high, at_least=0, failure=failure)
    yield _at_most("accuracy drop", before - now, limits.accuracy_drop, f"{words}: the drop is")


def _of_logits_and_speed(logits: LogitChange, timings: Sequence[Timing], limits: Limits) -> Iterator[Check]:
    yield _at_most("KL", logits.kl_mean, limits.kl, "the next token's mean KL from the reference, in nats, is")
    for timing in timings:
        limit: float | None = getattr(limits, f"{timing.what}_slowdown")
        yield _at_most(f"{timing.what} slowdown", timing.ratio, limit, f"{timing.what} time over the reference's is")


def _at_most(name: str, value: float | None, limit: float | None, words: str) -> Check:
    failure = ""
    if limit is not None and (value is None or value > limit):
        failure = f"{words} {'not a number' if value is None else f'{value:.3g}'}, at most {limit:g} is allowed"
    return Check(name=name, value=value, at_most=limit, failure=failure)
