"""What rounding to INT4 costs, to nearest and scaled by activations, dense and with CAPA, in each order.

`python -m benchmarks.rounding --out out/rounding` calibrates, asks and writes the record and the table. What --out
holds is neither calibrated nor asked again: with --orders several processes share the work, and a last one without it
writes them.

Four orders: `rounded, then pruned` chooses weights on the dense model and calibrates CAPA on the rounded one, as
`build` does; `pruned, then rounded` calibrates CAPA on the plain model and chooses weights on the pruned one;
`together` chooses weights on the pruned model and calibrates on the rounded one; `apart` does neither.

The record has the figures of every question; the page compares orders, and scaling with rounding to nearest, in pairs.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.selection.figures import conditions
from capa_export.base.files import write_whole
from capa_export.base.progress import progress, tracked
from capa_export.base.statistics import difference_of_means, difference_of_shares
from capa_export.bundle.store import Bundle, digest_of
from capa_export.calibrate.activation_aware import choose_factors
from capa_export.calibrate.stage import calibrate
from capa_export.calibrate.sums import Calibration
from capa_export.calibrate.weights import choose_weights
from capa_export.config.options import BuildOptions
from capa_export.config.quantization import looks_at_samples, rounding
from capa_export.config.recipe import Recipe, load_recipe, ranges
from capa_export.data.samples import Samples, samples_from
from capa_export.model.agreement import STEPS, Agreement, DenseAnswer, agreeing, answering
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerPlan
from capa_export.model.generation import eos_token_ids
from capa_export.model.model import Model
from capa_export.model.prompt import Prompt

__all__ = ["main"]

_RESULTS = Path(__file__).parent / "results"
_SEEN = 32
"""Prompts that weights are chosen on."""
_ORDERS = {
    "dense": "",
    "built": "rounded, then pruned",
    "apart": "apart",
    "pruned": "pruned, then rounded",
    "together": "together",
}
"""What `--orders` takes -> what the page says."""
_BUILT = _ORDERS["built"]
_CHOSEN_PRUNED = ("pruned", "together")


@dataclass(frozen=True)
class Row:
    """How far one model is from the plain, dense one along its answers."""

    rounding: str
    method: str
    order: str
    scaled_layers: str
    kl: float
    kl_median: float
    kl_max: float
    top1: float
    """Share of next tokens that are the plain, dense model's."""
    answers: float
    """Share of answers of which every token is."""
    right: float
    """Share of right answers."""
    kls: Sequence[float]
    """By question, to four digits."""
    rights: Sequence[bool]

    @property
    def name(self) -> str:
        """What a page calls it."""
        return ", ".join(filter(None, (self.rounding, self.method, self.order)))


class Bed:
    """A checkpoint, its questions, and what the plain, dense model answers."""

    def __init__(self, recipe: Recipe, options: BuildOptions, out: Path, asked: Samples, report: Any) -> None:
        """Ask the plain, dense model."""
        self.recipe, self.options, self.out, self.report = recipe, options, out, report
        self.plain = self.model(None)
        self.held: tuple[str, bool, Model] | None = None
        self.schedule = recipe.prune
        eager, family, prompter = Eager(self.plain.eager), self.plain.family, self.plain.prompter
        self.stop = eos_token_ids(self.plain.source.checkpoint.sidecars)
        reads = EagerPlan(keep=dict.fromkeys(recipe.prune.selectors, 0), selectors=recipe.prune.selectors)
        self.answers: list[DenseAnswer] = []
        self.wanted: list[str] = []
        for sample in tracked(asked, "plain, dense", asked.count, report):
            self.answers.append(eager.run([answering(eager, family, prompter.chat(sample.turns), reads, self.stop)])[0])
            self.wanted.append(sample.answer)
        rights = [
            self._is_right(answer.tokens, wanted) for answer, wanted in zip(self.answers, self.wanted, strict=True)
        ]
        self.right = fmean(rights)
        self.calibration = self.calibrated(self.plain)

    def model(self, word: str | None) -> Model:
        """The checkpoint rounded as a word says."""
        recipe = self.recipe.model_copy(update={"quantize": word})
        return Model(recipe=recipe, checkpoint=recipe.checkpoint, report=self.report)

    def calibrated(self, model: Model, name: str = "") -> Calibration:
        """The calibration of a model, kept in a folder."""
        folder = self._folder(model, name)
        if model.choice is None:
            return calibrate(model, Bundle(folder), self.options)
        # What was chosen here is not what the stage would choose.
        choice, model.choice = model.choice, None
        found = replace(model, recipe=model.recipe.model_copy(update={"quantize": f"{model.recipe.quantize}/rtn"}))
        found.take(choice)
        model.take(choice)
        return calibrate(found, Bundle(folder), self.options)

    def _folder(self, model: Model, name: str = "") -> Path:
        return self.out / self.recipe.name / f"{model.recipe.quantize or 'plain'}{name}".replace("/", "-")

    def pruned(self, prompt: Prompt, calibration: Calibration) -> EagerPlan:
        """The recipe's pruning, with the scales that a calibration takes."""
        kept = self.schedule.num_keep(prompt.image_lengths)
        alphas = calibration.alphas(calibration.scaled_layers(self.recipe.ffn))
        return EagerPlan(
            keep=dict(zip(self.schedule.selectors, kept, strict=True)),
            selectors=self.schedule.selectors,
            min_keep_per_image=self.schedule.min_keep_per_image,
            scales={layer: torch.from_numpy(alpha).float() for layer, alpha in alphas.items()},
        )

    def row(self, word: str | None, order: str) -> Row:
        """The figures of one model, from an earlier run where `--out` has them; a word of None rounds nothing."""
        path = self.out / self.recipe.name / "rows" / f"{word or 'plain'}-{order}.json".replace("/", "-")
        key = digest_of([self.plain.digest, self.wanted, self.options.samples])
        if path.is_file() and (kept := json.loads(path.read_text(encoding="utf-8")))["key"] == key:
            return Row(**kept["row"])
        model = self.plain if word is None else self._rounded(word, pruned=order in _CHOSEN_PRUNED)
        calibration = None if order == "dense" else self.calibration
        if order in ("built", "together"):
            calibration = self.calibrated(model, "-pruned" * (order == "together"))
        found = self._judged(model, "" if word is None else _ORDERS[order], calibration)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"key": key, "row": vars(found)}) + "\n")
        return found

    def _rounded(self, word: str, *, pruned: bool) -> Model:
        """A rounded model, its weights chosen on the dense or on the pruned one; the last is held."""
        if self.held is None or self.held[:2] != (word, pruned):
            model = self._chosen_pruned(word) if pruned else self.model(word)
            choose_weights(model, Bundle(self._folder(model)), self.options)
            self.held = word, pruned, model
        return self.held[2]

    def _judged(self, model: Model, order: str, calibration: Calibration | None) -> Row:
        """How far a model is from the plain, dense one; dense where there is no calibration."""
        eager, name = Eager(model.eager), f"{model.recipe.quantize or 'plain'}, {order}"
        found: list[Agreement] = []
        rights: list[bool] = []
        pairs = list(zip(self.answers, self.wanted, strict=True))
        for dense, wanted in tracked(pairs, name, len(pairs), self.report):
            plan = self.pruned(dense.prompt, calibration) if calibration else EagerPlan()
            found.append(eager.run([agreeing(eager, dense, plan)])[0])
            said = dense.tokens if found[-1].top1 == 1 else self._said(eager, dense, plan)
            rights.append(self._is_right(said, wanted))
        kls = [float(f"{one.kl:.4g}") for one in found]
        row = Row(
            rounding=model.recipe.quantize or "plain",
            method="CAPA" if calibration else "dense",
            order=order,
            scaled_layers=ranges(calibration.scaled_layers(self.recipe.ffn)) if calibration else "",
            kl=fmean(kls),
            kl_median=median(kls),
            kl_max=max(kls),
            top1=fmean(one.top1 for one in found),
            answers=fmean(one.top1 == 1 for one in found),
            right=fmean(rights),
            kls=kls,
            rights=rights,
        )
        print(replace(row, kls=(), rights=()), flush=True)
        return row

    def _said(self, eager: Eager, dense: DenseAnswer, plan: EagerPlan) -> Sequence[int]:
        """The tokens that a model says itself, as many as of the plain, dense one are looked at."""
        run = eager.prefill(dense.inputs, torch.from_numpy(dense.prompt.is_visual), plan)
        tokens = [int(run.logits.argmax())]
        while len(tokens) < STEPS and tokens[-1] not in self.stop:
            tokens.append(int(eager.step(run, tokens[-1], run.next_position + len(tokens) - 1).argmax()))
        return tokens

    def _is_right(self, tokens: Sequence[int], wanted: str) -> bool:
        """Whether tokens are the answer that was wanted, in upper or lower case."""
        said = self.plain.prompter.decode([token for token in tokens if token not in self.stop])
        return said.strip().lower() == wanted.lower()

    def rows(self, words: Sequence[str], orders: Sequence[str]) -> Iterator[Row]:
        """All models, each dense and in every order."""
        yield self.row(None, "apart")
        for word in words:
            for order in orders:
                if looks_at_samples(word) or order not in _CHOSEN_PRUNED:
                    yield self.row(word, order)

    def _chosen_pruned(self, word: str) -> Model:
        """The checkpoint with its weights chosen on the activations of the pruned model."""
        form = rounding(word)
        assert form is not None
        seen = samples_from(self.options.images, self.recipe, _SEEN, split="train")
        prompts = (self.plain.prompter.chat(sample.turns) for sample in seen)
        model = self.model(word)
        model.take(
            choose_factors(self.plain.source, prompts, form, plan=lambda one: self.pruned(one, self.calibration))
        )
        return model


def _table(record: dict[str, Any]) -> str:
    """The rows of all beds in Markdown."""
    about = record["about"]
    lines = [
        "# Rounding to INT4",
        "",
        f"`{about['command']}`, {about['date']}, {about['device']}.",
        "KL and next tokens along the answers of the plain, dense model; `answers` are those of which every token is",
        "as there.",
    ]
    for bed in record["beds"]:
        lines += [
            "",
            f"## {bed['recipe']}",
            "",
            f"{bed['questions']} questions, of which the plain, dense model answers {bed['right']:.0%} right.",
            "",
            "| weights | method | order | scales in | KL | median | largest | next tokens | answers | right |",
            "|" + "---|" * 10,
        ]
        for row in bed["rows"]:
            figures = [f"{row[name]:.2g}" for name in ("kl", "kl_median", "kl_max")]
            figures += [f"{row[name]:.1%}" for name in ("top1", "answers", "right")]
            named = [row[name] for name in ("rounding", "method", "order", "scaled_layers")]
            lines.append(f"| {' | '.join([*named, *figures])} |")
        lines += [
            "",
            "In pairs of the same questions, with 95 % intervals; `*` where 0 is not in it:",
            "",
            "| first | minus second | KL | right answers, points |",
            "|" + "---|" * 4,
            *(
                f"| {pair['first']} | {pair['second']} | {_words(pair['kl'], '+.2g')} "
                f"| {_words(pair['right'], '+.1f', 100)} |"
                for pair in bed["pairs"]
            ),
        ]
    return "\n".join(lines) + "\n"


def _pairs(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Orders against that of a build, scaled against to nearest, and a build against what it rounds."""
    by_name = {row.name: row for row in rows}
    for row in rows:
        nearest = replace(row, rounding=f"{row.rounding}/rtn").name
        built = replace(row, rounding="plain", order="") if row.order in ("", _BUILT) else replace(row, order=_BUILT)
        for other in sorted({built.name, nearest} & by_name.keys() - {row.name}):
            second = by_name[other]
            yield {
                "name": f"{row.name} - {other}",
                "first": row.name,
                "second": other,
                "kl": difference_of_means(row.kls, second.kls).model_dump(),
                "right": difference_of_shares(row.rights, second.rights).model_dump(),
            }


def _words(found: Mapping[str, float], form: str, unit: float = 1) -> str:
    """A difference with its interval, marked where 0 is outside."""
    value, low, high = (format(unit * found[name], form) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]{' *' if found['low'] > 0 or found['high'] < 0 else ''}"


def main(arguments: Sequence[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.rounding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="calibrations, to go on from")
    parser.add_argument("--recipes", nargs="+", default=["tiny-qwen25vl", "tiny-llava15", "tiny-internvl3"])
    parser.add_argument("--words", nargs="+", default=["int4:64/rtn", "int4:64", "int4:32/rtn", "int4:32"])
    parser.add_argument("--checkpoint", type=Path, help="in place of a recipe's own")
    parser.add_argument(
        "--seen", type=Path, help="pictures and questions to calibrate on, where a recipe has no scenes"
    )
    parser.add_argument("--asked", type=Path, help="questions, where a recipe has no scenes")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--samples", type=int, default=60, help="prompts of a calibration")
    parser.add_argument("--orders", nargs="+", choices=_ORDERS, help="those alone, and nothing is written but to --out")
    options = parser.parse_args(arguments)
    beds: list[dict[str, Any]] = []
    with progress() as report, torch.inference_mode():
        for name in options.recipes:
            recipe = load_recipe(name)
            if options.checkpoint is not None:
                recipe = recipe.model_copy(update={"checkpoint": str(options.checkpoint)})
            split = "held_out" if options.asked is None else "train"
            asked = samples_from(options.asked, recipe, options.questions, split=split)
            build = BuildOptions(images=options.seen, samples=options.samples)
            bed = Bed(recipe, build, options.out, asked, report)
            about = {"recipe": recipe.name, "checkpoint": bed.plain.digest[:12], "questions": len(bed.answers)}
            rows = list(bed.rows(options.words, options.orders or [*_ORDERS]))
            named = [{"name": row.name, **vars(row)} for row in rows]
            beds.append({**about, "right": bed.right, "rows": named, "pairs": [*_pairs(rows)]})
            if options.orders is None:
                _write(arguments, options, bed.plain.digest, beds)


def _write(arguments: Sequence[str], options: argparse.Namespace, digest: str, beds: list[dict[str, Any]]) -> None:
    """Write the record and the table of the beds so far."""
    command = f"python -m benchmarks.rounding {shlex.join(arguments)}"
    about = conditions(command, checkpoint=digest, questions=options.questions, seed=0).model_dump(exclude={"seed"})
    record = {"about": about, "beds": beds}
    stem = f"{about['date']}-rounding{'' if options.checkpoint is None else '-real-clutter'}"
    write_whole(_RESULTS / f"{stem}.json", json.dumps(record) + "\n")
    write_whole(_RESULTS / f"{stem}.md", _table(record))


if __name__ == "__main__":
    main(sys.argv[1:])
