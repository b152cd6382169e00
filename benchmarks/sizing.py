"""`make bench-sizing`: how many replicas behave together, by simulation, nothing of it measured.

Questions come as a Poisson process; engines take the time that docs/sizing.md's arithmetic gives; gateways
route and refuse by the product's own code (service/replicas.py, service/limits.py), on simulated clocks. The
limit is one gateway without bounds that knows of every question.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.simulating.arrangements import (
    ARRANGEMENTS,
    AS_IT_IS,
    LIMIT,
    OWN_ORDER,
    QUESTIONS,
    loss,
    rollout,
    steady,
)
from benchmarks.simulating.cluster import SPREAD, Outcome
from benchmarks.simulating.drawing import draw
from benchmarks.simulating.engine import ANSWER_TOKENS, GPUS, Gpu

SIZES = (1, 2, 4, 8, 16, 32)
UTILISATIONS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
GOAL_S = 2.0
GOAL_REJECTED = 0.001
SEEDS = 2
_HEADER = (
    "| replicas | answers/s within the goal | own order | all-knowing | p99 doubles at | own order "
    "| all-knowing | a replica lost: p99, refused, broken | rollout: p99, refused, broken |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


class Row(NamedTuple):
    """Of one number of replicas; each curve by arrangement, over the utilisations."""

    p99: dict[str, list[float]]
    rejected: dict[str, list[float]]
    loss: Outcome
    rollout: Outcome


def alone_p99(gpu: Gpu) -> float:
    """Seconds of an answer without any other, at the 99th percentile of its length."""
    tokens = range(ANSWER_TOKENS - SPREAD, ANSWER_TOKENS + SPREAD + 1)
    return gpu.prompt_s + tokens[int(0.99 * len(tokens))] * gpu.step_s


def crossing(utilisations: Sequence[float], values: Sequence[float], bound: float) -> float:
    """The utilisation at which the values pass the bound, between two points by proportion.

    The last one when they never do, 0 when they always have.
    """
    if values[0] > bound:
        return 0.0
    for place in range(1, len(values)):
        if values[place] > bound:
            low, high = values[place - 1], values[place]
            share = (bound - low) / (high - low)
            return utilisations[place - 1] + share * (utilisations[place] - utilisations[place - 1])
    return utilisations[-1]


def within_goal(row: Row, utilisations: Sequence[float], name: str) -> float:
    """The highest utilisation at which neither time nor refusals pass their goals."""
    return min(
        crossing(utilisations, row.p99[name], GOAL_S),
        crossing(utilisations, row.rejected[name], GOAL_REJECTED),
    )


def pooled(outcomes: Sequence[Outcome]) -> Outcome:
    return Outcome(
        seconds=[each for outcome in outcomes for each in outcome.seconds],
        rejected=sum(outcome.rejected for outcome in outcomes),
        broken=sum(outcome.broken for outcome in outcomes),
    )


def simulate(
    gpu: Gpu, sizes: Sequence[int], utilisations: Sequence[float], questions: int, seeds: int
) -> dict[int, Row]:
    """By number of replicas; on all cores."""
    with ProcessPoolExecutor() as pool:

        def begun(what: Callable[..., Outcome], *points: tuple[object, ...]) -> list[Outcome]:
            return list(pool.map(what, *zip(*points, strict=True)))

        rows = {}
        for size in sizes:
            points = [(gpu, by, size, at) for by in ARRANGEMENTS for at in utilisations]
            outcomes = begun(partial(steady, questions=questions), *points)
            curves = {
                by.name: outcomes[place * len(utilisations) :][: len(utilisations)]
                for place, by in enumerate(ARRANGEMENTS)
            }
            repeats = [(gpu, size, seed) for seed in range(seeds)]
            rows[size] = Row(
                {name: [outcome.p99 for outcome in curve] for name, curve in curves.items()},
                {name: [outcome.rejected_share for outcome in curve] for name, curve in curves.items()},
                pooled(begun(loss, *repeats)),
                pooled(begun(rollout, *repeats)),
            )
        return rows


def table(gpu: Gpu, rows: dict[int, Row], utilisations: Sequence[float], seeds: int) -> str:
    """As docs/sizing.md shows it."""
    lines = [_HEADER]
    names = [by.name for by in (AS_IT_IS, OWN_ORDER, LIMIT)]
    for size, row in rows.items():
        rates = [f"{within_goal(row, utilisations, name) * size * gpu.rate():.0f}" for name in names]
        doubled = [f"{crossing(utilisations, row.p99[name], 2 * alone_p99(gpu)):.2f}" for name in names]
        events = [
            f"{_seconds(it)}, {100 * it.rejected_share:.1f} %, {it.broken / seeds:.0f}"
            for it in (row.loss, row.rollout)
        ]
        lines.append(f"| {size} | {' | '.join([*rates, *doubled, *events])} |")
    return "\n".join(lines)


def _seconds(outcome: Outcome) -> str:
    return f"{outcome.p99:.2f} s" if outcome.seconds else "none answered"


def summary(name: str, gpu: Gpu, rows: dict[int, Row], utilisations: Sequence[float]) -> dict[str, Any]:
    """The last line."""
    return {
        "simulated": "engines and arrivals; the routing is the product's",
        "gpu": name,
        "answers_per_s_of_a_replica": round(gpu.rate(), 2),
        "p99_goal_s": GOAL_S,
        "replicas": list(rows),
        "utilisation_within_goal": [
            round(within_goal(row, utilisations, AS_IT_IS.name), 3) for row in rows.values()
        ],
        "utilisation_within_goal_limit": [
            round(within_goal(row, utilisations, LIMIT.name), 3) for row in rows.values()
        ],
        "loss_p99_s": [round(row.loss.p99, 2) if row.loss.seconds else None for row in rows.values()],
        "rollout_p99_s": [round(row.rollout.p99, 2) for row in rows.values()],
        "rollout_broken": sum(row.rollout.broken for row in rows.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="H100")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--utilisations", type=float, nargs="+", default=UTILISATIONS)
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="of each point")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of losses and rollouts")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    gpu, utilisations = GPUS[options.gpu], options.utilisations
    rows = simulate(gpu, options.sizes, utilisations, options.questions, options.seeds)
    print(f"An answer alone takes {alone_p99(gpu):.2f} s at the 99th percentile of its length.")
    print(table(gpu, rows, utilisations, options.seeds))
    for size, row in rows.items():
        print(size, {name: [round(value, 2) for value in curve] for name, curve in row.p99.items()})
    if options.plot:
        draw(options.plot, utilisations, {size: row.p99 for size, row in rows.items()}, GOAL_S)
    print(json.dumps(summary(options.gpu, gpu, rows, utilisations)))


if __name__ == "__main__":
    main()
