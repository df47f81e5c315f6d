"""How often intervals of paired differences, of KLs and of right answers, leave out the truth: 2.5 % a side is wanted.

python -m benchmarks.intervals
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from math import comb
from pathlib import Path
from statistics import NormalDist
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.selection.bed import MAX_NEW_TOKENS, open_bed
from capa_export.base.progress import progress
from capa_export.base.statistics import difference_of_means, difference_of_shares
from capa_export.study.evaluate.models import eager_model, parse_methods
from capa_export.study.evaluate.results import Results
from capa_export.study.evaluate.stage import evaluate

_RESULTS = Path(__file__).parent / "results"
_COUNTS = {6: 2.570582, 8: 2.364624, 12: 2.200985, 16: 2.131450, 32: 2.039513}
"""Questions -> 97.5 % quantile of Student's t."""
_TRIALS = 4000
_RESAMPLES = 2000
_SUBSETS = 9999
_Z = NormalDist().inv_cdf(0.975)
_BED = "tiny-qwen25vl"
_QUESTIONS = 90
_PAIRS = {
    "random and capa, 75 % removed": ("random@2:0.75/full", "capa@2:0.75/full"),
    "capa-mmr and capa, 90 % removed": ("capa-mmr@2:0.9/full", "capa@2:0.9/full"),
}

Interval = tuple[np.ndarray, np.ndarray]
"""Lower and upper ends [T] of T trials."""


def intervals(values_TN: np.ndarray) -> Iterator[tuple[str, Interval]]:
    """The 95 % interval of the mean of each row, by every method."""
    count = values_TN.shape[1]
    mean_T, error_T = values_TN.mean(1), values_TN.std(1, ddof=1) / np.sqrt(count)
    picked = np.random.default_rng(1).integers(count, size=(_RESAMPLES, count))
    weights_NB = np.stack([np.bincount(row, minlength=count) for row in picked], axis=1) / count
    means_TB = values_TN @ weights_NB
    yield "percentile bootstrap", _quantiles(means_TB, 0.025, 0.975)
    yield "BCa bootstrap", _accelerated(values_TN, means_TB)
    errors_TB = np.sqrt(np.maximum((values_TN**2) @ weights_NB - means_TB**2, 0) / (count - 1))
    # A resample of one value has no error: it lies beyond any bound, or at the mean.
    far_TB = means_TB - mean_T[:, None]
    floor_T1 = 1e-9 * np.abs(values_TN).max(1, keepdims=True)
    low_T, high_T = _quantiles(np.where(errors_TB > floor_T1, far_TB / np.maximum(errors_TB, floor_T1), 1e9 * far_TB))
    yield "bootstrap-t", (mean_T - high_T * error_T, mean_T - low_T * error_T)
    yield "Student's t", (mean_T - _COUNTS[count] * error_T, mean_T + _COUNTS[count] * error_T)
    yield "sign flips", _sign_flips(values_TN)


def _quantiles(values_TB: np.ndarray, low: float = 0.025, high: float = 0.975) -> Interval:
    low_T, high_T = np.percentile(values_TB, [100 * low, 100 * high], axis=1)
    return low_T, high_T


def _accelerated(values_TN: np.ndarray, means_TB: np.ndarray) -> Interval:
    """Efron's interval, corrected for bias and acceleration (1987)."""
    far_TN = values_TN - values_TN.mean(1, keepdims=True)
    bend_T = (far_TN**3).sum(1) / (6 * np.maximum((far_TN**2).sum(1), 1e-300) ** 1.5)
    mean_T1 = values_TN.mean(1, keepdims=True)
    below_T = ((means_TB < mean_T1).mean(1) + (means_TB <= mean_T1).mean(1)) / 2
    bias_T = np.array([NormalDist().inv_cdf(share) for share in np.clip(below_T, 1e-4, 1 - 1e-4)])
    sorted_TB = np.sort(means_TB, axis=1)
    ends: list[np.ndarray] = []
    for z in (-_Z, _Z):
        shifted_T = bias_T + (bias_T + z) / np.clip(1 - bend_T * (bias_T + z), 1e-9, None)
        places_T = [min(int(NormalDist().cdf(one) * _RESAMPLES), _RESAMPLES - 1) for one in shifted_T]
        ends.append(sorted_TB[np.arange(len(places_T)), places_T])
    return ends[0], ends[1]


def _sign_flips(values_TN: np.ndarray) -> Interval:
    """`difference_of_means` of every row, which is checked on a few; all trials share the random subsets."""
    count = values_TN.shape[1]
    if count <= 13:
        masks_SN = (np.arange(1, 2**count)[:, None] >> np.arange(count)) & 1
    else:
        drawn = np.random.default_rng(0)
        rows = [np.frombuffer(drawn.bytes(-(-count // 8)), np.uint8) for _ in range(_SUBSETS)]
        masks_SN = np.stack([np.unpackbits(row, count=count) for row in rows])
    means_TS = np.sort(values_TN @ (masks_SN / masks_SN.sum(1, keepdims=True)).T, axis=1)
    rejected = int(0.025 * (len(masks_SN) + 1))
    low_T, high_T = means_TS[:, rejected - 1], means_TS[:, -rejected]
    for row, *ends in zip(values_TN[:5], low_T, high_T, strict=False):
        found = difference_of_means(row.tolist(), [0.0] * count)
        assert np.allclose(ends, (found.low, found.high), rtol=1e-9), "not what the package computes"
    return low_T, high_T


Draw = Callable[[int], np.ndarray]
"""Number of questions -> differences [T, N] whose mean is none."""


def cases(kls: Mapping[str, Sequence[float]]) -> dict[str, Draw]:
    """Nulls by name: log-normal KLs, of equal spread and not, and those of a trained model."""
    rng = np.random.default_rng(602)

    def drawn(first: float, second: float, rho: float) -> Draw:
        def draw(count: int) -> np.ndarray:
            one_TN, other_TN = rng.normal(size=(2, _TRIALS, count))
            other_TN = rho * one_TN + np.sqrt(1 - rho**2) * other_TN
            return np.exp(first * one_TN - first**2 / 2) - np.exp(second * other_TN - second**2 / 2)

        return draw

    def measured(pair: tuple[str, str], *, swapped: bool) -> Draw:
        values = np.subtract(kls[pair[0]], kls[pair[1]])

        def draw(count: int) -> np.ndarray:
            found_TN = rng.choice(values, size=(_TRIALS, count))
            return found_TN * rng.choice([-1, 1], size=found_TN.shape) if swapped else found_TN - values.mean()

        return draw

    return {
        **{
            f"log-normal, sigma {sigma}, correlation {rho}": drawn(sigma, sigma, rho)
            for sigma in (1, 2)
            for rho in (0, 0.9)
        },
        **{f"{name}, which is which by chance": measured(pair, swapped=True) for name, pair in _PAIRS.items()},
        "skewed: log-normal, sigma 1.5 and 1, correlation 0.5": drawn(1.5, 1, 0.5),
        **{f"skewed: {name}, less the mean": measured(pair, swapped=False) for name, pair in _PAIRS.items()},
    }


def measured_kls(questions: int) -> dict[str, list[float]]:
    """Method -> KL from dense of each question, on a trained tiny model."""
    texts = list(dict.fromkeys(text for pair in _PAIRS.values() for text in pair))
    with TemporaryDirectory() as scratch, progress() as report:
        bed = open_bed(_BED, Path(scratch), questions, report=report)
        evaluated = eager_model(bed.model, bed.store, bed.options, parse_methods(texts), MAX_NEW_TOKENS)
        evaluate(evaluated, bed.first(questions), bed.folder, workers=bed.options.workers, report=report)
        results = Results(bed.folder, model=evaluated.digest, source=evaluated.source)
        digests = [question.digest() for question in bed.read(questions)]
        found = {
            text: [results.found[results.key(digest, evaluated.keys[text])].kl for digest in digests] for text in texts
        }
        results.close()
    return found


def of_means(draws: Mapping[str, Draw]) -> list[dict[str, Any]]:
    """Percent of the trials whose interval lies above and below 0."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for null, draw in draws.items():
        for count in _COUNTS:
            for method, (low_T, high_T) in intervals(draw(count)):
                row = rows.setdefault((null, method), {"null": null, "method": method, "above": [], "below": []})
                row["above"].append(round(100 * float((low_T > 0).mean()), 1))
                row["below"].append(round(100 * float((high_T < 0).mean()), 1))
    return list(rows.values())


def of_shares() -> list[dict[str, Any]]:
    """Percent of all outcomes, each with its probability, whose interval lies above and below the true difference."""
    rows: list[dict[str, Any]] = []
    for gain, loss in ((0.05, 0.05), (0.2, 0.2), (0.1, 0.0), (0.4, 0.1)):
        for method in ("percentile bootstrap", "Tango's, by the exact test"):
            row: dict[str, Any] = {"gain": gain, "loss": loss, "method": method, "above": [], "below": []}
            for count in _COUNTS:
                above = below = 0.0
                for won in range(count + 1):
                    for lost in range(count - won + 1):
                        chance = gain**won * loss**lost * (1 - gain - loss) ** (count - won - lost)
                        chance *= comb(count, won) * comb(count - won, lost)
                        low, high = _of_outcome(method, won, lost, count)
                        above += chance * (low > gain - loss + 1e-9)
                        below += chance * (high < gain - loss - 1e-9)
                row["above"].append(round(100 * above, 1))
                row["below"].append(round(100 * below, 1))
            rows.append(row)
    return rows


def _of_outcome(method: str, won: int, lost: int, count: int) -> tuple[float, float]:
    first, second = [1] * won + [0] * (count - won), [0] * won + [1] * lost + [0] * (count - won - lost)
    if method != "percentile bootstrap":
        found = difference_of_shares(first, second)
        return found.low, found.high
    picked = np.random.default_rng(1).integers(count, size=(_RESAMPLES, count))
    low, high = np.percentile(np.subtract(first, second)[picked].mean(1), [2.5, 97.5])
    return float(low), float(high)


def _report(result: Mapping[str, Any]) -> str:
    def table(first: str, rows: Sequence[Mapping[str, Any]], name: Callable[[Mapping[str, Any]], str]) -> str:
        lines = [[first, "interval", *(f"n = {count}" for count in _COUNTS)]]
        lines.append(["---"] * len(lines[0]))
        for row in rows:
            cells = [f"{above} / {below}" for above, below in zip(row["above"], row["below"], strict=True)]
            lines.append([name(row), row["method"], *cells])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    return f"""# Intervals of paired differences, {result["date"]}

`{result["command"]}`, {result["machine"]}.

How often, in %, the 95 % interval lies above / below the truth; 2.5 / 2.5 is asked for, less is caution.

## Means, as of KL

The truth is 0. {result["trials"]} trials each, so a figure of 2.5 is uncertain by 0.25. The KLs of the trained model
are those of {result["questions"]} questions to {result["bed"]}; half of them are below a thousandth, a few about ten.

{table("null", result["means"], lambda row: row["null"])}

The sign flips hold wherever it is chance which figure is which, at any tail. Where differences are skewed about a
mean of 0, no interval of so few questions holds: what is rare and large is mostly not among them.

## Shares, as of right answers

Exact sums over all outcomes, of the chances that only the first and that only the second is right.

{table("first, second alone right", result["shares"], lambda row: f"{row['gain']:g}, {row['loss']:g}")}
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", default=datetime.now(timezone.utc).date().isoformat())
    arguments = parser.parse_args()
    kls = measured_kls(_QUESTIONS)
    result = {
        "date": arguments.date,
        "command": "python -m benchmarks.intervals",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, numpy {version('numpy')}, torch {version('torch')}",
        "trials": _TRIALS,
        "bed": _BED,
        "questions": _QUESTIONS,
        "counts": list(_COUNTS),
        "means": of_means(cases(kls)),
        "shares": of_shares(),
        "kls": kls,
    }
    path = _RESULTS / f"{arguments.date}-intervals.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_report(result), encoding="utf-8")
    print(path.with_suffix(".md"))
