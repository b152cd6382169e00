"""The simulation of many replicas: right where theory knows the answer, and by the product's rule."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.simulating.arrangements import AS_IT_IS, LIMIT, rollout, steady
from benchmarks.simulating.cluster import SPREAD, Cluster, Outcome
from benchmarks.simulating.engine import ANSWER_TOKENS, GPUS
from benchmarks.sizing import crossing
from service.settings import GatewaySettings

ROOT = Path(__file__).parents[2]
GPU = GPUS["H100"]
UNBOUNDED = GatewaySettings(max_in_flight=10**9, max_outstanding_per_replica=10**9)


def test_a_replica_answers_as_fast_as_the_page_on_sizing_says() -> None:
    page = (ROOT / "docs" / "sizing.md").read_text()
    for name, gpu in GPUS.items():
        row = re.search(rf"^\| {name}[^|]*\|[^|]+\|[^|]+\| (\d+) s,", page, re.MULTILINE)
        assert row is not None
        assert round(1000 / gpu.rate()) == int(row[1])


def test_one_answer_at_a_time_waits_as_the_formula_of_pollaczek_and_khinchine_says() -> None:
    services = [
        GPU.prompt_s + tokens * GPU.step_s
        for tokens in range(ANSWER_TOKENS - SPREAD, ANSWER_TOKENS + SPREAD + 1)
    ]
    mean = sum(services) / len(services)
    square = sum(each**2 for each in services) / len(services)
    rate = 0.6 / mean
    expected = mean + rate * square / (2 * (1 - 0.6))
    cluster = Cluster(GPU, replicas=1, gateways=1, seed=1, settings=UNBOUNDED, slots=1)
    outcome = cluster.run(rate, until=8000 / rate, outcome=Outcome(since=100.0))
    assert sum(outcome.seconds) / len(outcome.seconds) == pytest.approx(expected, rel=0.05)


def test_a_full_engine_answers_at_its_rate() -> None:
    """With twice what it can take and 32 at once, the other half is refused and nothing is lost."""
    settings = GatewaySettings(max_in_flight=10**9)
    cluster = Cluster(GPU, replicas=1, gateways=1, seed=0, settings=settings)
    rate = 2 * GPU.rate()
    outcome = cluster.run(rate, until=60.0, outcome=Outcome(since=10.0))
    assert len(outcome.seconds) / 50 == pytest.approx(GPU.rate(), rel=0.05)
    assert outcome.rejected_share == pytest.approx(0.5, abs=0.05)
    assert outcome.broken == 0


def test_it_can_be_repeated() -> None:
    one, same = (steady(GPU, AS_IT_IS, 2, 0.6, questions=300, seed=3) for _ in range(2))
    other = steady(GPU, AS_IT_IS, 2, 0.6, questions=300, seed=4)
    assert one == same
    assert one.seconds != other.seconds


def test_what_one_gateway_knows_of_all_is_at_least_as_good() -> None:
    as_it_is, limit = (steady(GPU, by, 16, 0.2, questions=1500) for by in (AS_IT_IS, LIMIT))
    assert limit.p99 <= as_it_is.p99


def test_what_a_lost_replica_was_answering_breaks_and_the_rest_goes_elsewhere() -> None:
    cluster = Cluster(GPU, replicas=2, gateways=2, seed=0, settings=GatewaySettings())
    cluster.clock.at(5.0, lambda: cluster.lose("replica-0"))
    outcome = cluster.run(0.4 * 2 * GPU.rate(), until=30.0, outcome=Outcome())
    assert 0 < outcome.broken <= 64
    later = Outcome(since=5.001)
    again = Cluster(GPU, replicas=2, gateways=2, seed=0, settings=GatewaySettings())
    again.clock.at(5.0, lambda: again.lose("replica-0"))
    again.run(0.4 * 2 * GPU.rate(), until=30.0, outcome=later)
    assert later.broken == 0, "each copy asks the other replica once more"
    assert later.seconds


def test_a_rollout_breaks_and_refuses_nothing() -> None:
    outcome = rollout(GPU, 2, 0)
    assert (outcome.broken, outcome.rejected) == (0, 0)
    assert len(outcome.seconds) > 1000


@pytest.mark.parametrize(("bound", "where"), [(0.5, 0.0), (1.5, 0.25), (3.5, 0.5), (9.0, 0.5)])
def test_a_curve_passes_a_bound_between_two_points(bound: float, where: float) -> None:
    assert crossing([0.1, 0.4, 0.5], [1.0, 2.0, 3.0], bound) == pytest.approx(where)


def test_the_command_draws_and_ends_with_json(tmp_path: Path) -> None:
    few = ["--sizes", "1", "2", "--utilisations", "0.4", "0.9", "--questions", "200", "--seeds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sizing", *few, "--plot", str(tmp_path / "plot.png")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["replicas"] == [1, 2]
    assert last["rollout_broken"] == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
