"""What the demo prints: acts, progress, the final table and its last line."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hscr.client import Client
from hscr.records import Evaluation, Interval, Job, JobEvent

ROWS = {
    "macro_score": "macro score on balanced test questions",
    "macro_score_dropped": "… with 70 % of visual tokens dropped",
    "macro_score_blank": "… with a blank image",
    "hallucination_rate": "captions that name a finding that is not there",
    "omission_rate": "captions that miss the finding that is",
    "visual_dependence": "visual dependence of the right answers (nats)",
    "parse_rate": "answers in the phantom's grammar",
}


@dataclass
class Story:
    """A console, and how long each part took."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def act(self, title: str, name: str | None = None) -> Iterator[None]:
        self.console.print(f"\n[bold cyan]{title}[/]")
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        if name is not None:
            self.seconds[name] = round(took, 1)
        self.say(f"[dim]{took:.1f} s[/]")

    def say(self, text: str) -> None:
        self.console.print(f"  {text}")

    def progress(self) -> Progress:
        return Progress(
            TextColumn("  {task.description:<34}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self.console,
        )  # fmt: skip

    def follow(self, client: Client, job: Job, what: str) -> Job:
        """Show a job's progress events as a bar until it ends."""
        with self.progress() as progress:
            bar = progress.add_task(what, total=None)

            def on_event(event: JobEvent) -> None:
                if event.type == "progress":
                    progress.update(bar, total=event.data["total"], completed=event.data["done"])

            return client.wait(job.id, on_event)


def comparison(versions: Mapping[str, Mapping[str, float]]) -> Table:
    """One column per way of training, one row per metric."""
    table = Table(title="On the balanced test split, through the serving engine", title_justify="left")
    table.add_column("")
    for name in versions:
        table.add_column(name, justify="right")
    for metric, label in ROWS.items():
        cells = [f"{scores[metric]:.3f}" if metric in scores else "–" for scores in versions.values()]
        table.add_row(label, *cells)
    return table


def shown(interval: Interval) -> str:
    return f"{interval.mean:+.3f}, 95 % interval [{interval.low:+.3f}, {interval.high:+.3f}]"


def verdict(evaluation: Evaluation) -> str:
    colour = {"pass": "green", "fail": "red", "inconclusive": "yellow"}[evaluation.verdict]
    return f"gate: [bold {colour}]{evaluation.verdict}[/]"


def mean_chosen(names: Sequence[str], metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {metrics[name]:+.2f}" for name in names if name in metrics)


def last_line(console: Console, values: dict[str, Any]) -> None:
    console.file.write(json.dumps(values) + "\n")
    console.file.flush()
