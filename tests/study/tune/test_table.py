"""What people see of a tuning."""

import pytest

from capa_export.base.statistics import Difference
from capa_export.study.tune.schema import Finalist, Tuning
from capa_export.study.tune.table import tuning_table


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    gain = Difference(value=0.25, low=0.125, high=0.5)
    best = Finalist(method="dart:0.5/full", linear_layers=(), flops=0.399, kl=0.0625, top1=0.75, gain=gain)
    own = Finalist(method="capa@2:0.8/eta=0.9", linear_layers=(1, 2, 4), flops=0.4, kl=0.3125, top1=0.5)
    broken = Finalist(method="random@1:0.8/full", linear_layers=(), flops=0.4, kl=None, top1=0)
    found = Tuning(
        model="folder",
        budget=0.4,
        dense_flops=1e9,
        text=0.2,
        samples=128,
        judges=96,
        tried=70,
        own=own.method,
        chosen=best.method,
        finalists=(best, own, broken),
        left_out=("vispruner",),
        verdict="dart is better",
    )
    tuning_table(found)
    title, headings, *rows, verdict, left_out = capsys.readouterr().out.splitlines()
    assert title.startswith("Finalists of 70 within 40.0% of dense's FLOPs, on 96 samples")
    assert headings.split() == ["FLOPs", "KL", "KL", "saved", "top-1", "linear"]
    cells = [row.split() for row in rows]
    assert cells[0] == ["*", "dart:0.5/full", "39.9%", "0.0625", "+0.25", "(+0.125", "to", "+0.5)", "75.0%", "none"]
    assert cells[1] == ["capa@2:0.8/eta=0.9", "40.0%", "0.312", "recipe's", "own", "50.0%", "1-2,", "4"]
    assert cells[2] == ["random@1:0.8/full", "40.0%", "0.0%", "none"]
    assert verdict == "dart is better"
    assert left_out.endswith(": vispruner")
