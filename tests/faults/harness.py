"""Injects faults into real processes of train.py, and says what became of the runs.

    python tests/faults/harness.py [--faults 30] [--seed 0] [--only killed_anywhere] [--json FILE]

Trains one small network without a fault, then again and again with up to five faults in a run, each of a
random kind at a random moment, until that run is finished. Compares every number that the two left, and
prints how often there was which fault and what came of it. The tests of this folder have the same parts.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from faults import DAMAGES, STOPS, Fault
from trainer import ROOT, Trainer, environment

FAULTS_IN_A_RUN = 5


def inject(run: Trainer, faults: Iterator[Fault], limit: int, rng: random.Random) -> list[Fault]:
    """Does up to so many things to a run, then lets it come to its end; what was done."""
    done: list[Fault] = []
    while len(done) < limit and not run.is_finished:
        fault = next(faults)
        if fault(run, rng):
            done.append(fault)
    ended = run.finish()
    assert ended.returncode == 0, (done, ended.stdout, ended.stderr)
    return done


def differing(numbers: dict[str, Any], others: dict[str, Any]) -> Iterator[str]:
    """Where two runs differ: the first line of each file that does."""
    for name, ours in numbers.items():
        theirs = others[name]
        if isinstance(ours, list):
            lines = enumerate(itertools.zip_longest(ours, theirs), 1)
            found = next((f"line {n}: {a} in place of {b}" for n, (a, b) in lines if a != b), None)
        else:
            found = None if ours == theirs else f"{ours} in place of {theirs}"
        if found:
            yield f"{name} {found}"


def shuffled(faults: Sequence[Fault], rng: random.Random) -> Iterator[Fault]:
    """All kinds in a random order, again and again: none is left out by chance."""
    while True:
        yield from rng.sample(faults, len(faults))


def _main() -> None:
    known = {fault.__name__: fault for fault in (*STOPS, *DAMAGES)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=30, help="how many at least")
    parser.add_argument("--seed", type=int, default=0, help="of the kinds and moments")
    parser.add_argument("--only", choices=known, action="append", help="these kinds; may be repeated")
    parser.add_argument("--json", help="write the outcome to this file too")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    faults = [known[name] for name in arguments.only or known]
    kinds = shuffled(faults, rng)
    injected, survived, runs = Counter[Fault](), Counter[Fault](), 0
    with tempfile.TemporaryDirectory() as folder:
        env = environment(Path(folder) / "cache")
        unbroken = Trainer(Path(folder) / "unbroken", env)
        assert unbroken.finish().returncode == 0
        while injected.total() < arguments.faults:
            broken = Trainer(Path(folder) / f"broken {runs}", env)
            done = inject(broken, kinds, FAULTS_IN_A_RUN, rng)
            differences = list(differing(broken.numbers(), unbroken.numbers()))
            same = not differences
            runs += 1
            injected.update(done)
            survived.update(done if same else [])
            outcome = "the numbers of an unbroken run" if same else f"OTHER NUMBERS: {'; '.join(differences)}"
            print(f"run {runs}: {', '.join(fault.__name__ for fault in done)}: {outcome}", flush=True)
    rows = [
        {
            "fault": (fault.__doc__ or "").partition("\n")[0].rstrip("."),
            "injected": injected[fault],
            "then the numbers of an unbroken run": survived[fault],
        }
        for fault in faults
    ]
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from common import report

    report(rows, arguments.json, notes=[f"{injected.total()} faults in {runs} runs."])
    sys.exit(injected != survived)


if __name__ == "__main__":
    _main()
