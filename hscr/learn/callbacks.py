"""What follows a run: its caller's progress and cancellation, its checkpoints, TensorBoard and MLflow."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback

from hscr.errors import DependencyMissing, JobCancelled

Metrics = dict[str, float]
Tracker = Literal["tensorboard", "mlflow"]


class Follow(TrainerCallback):  # type: ignore[misc]  # transformers ships no usable types
    """Asks before each step whether to stop, and tells of it afterwards."""

    def __init__(
        self, on_progress: Callable[[int, int, Metrics], None], should_stop: Callable[[], bool]
    ) -> None:
        self._on_progress, self._should_stop = on_progress, should_stop

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_further: Any) -> None:
        stop_if(self._should_stop, state.global_step)

    def on_log(self, _args: Any, state: Any, _control: Any, *, logs: Metrics, **_further: Any) -> None:
        if "loss" in logs and state.is_world_process_zero:
            self._on_progress(state.global_step, state.max_steps, step_metrics(logs))


def stop_if(should_stop: Callable[[], bool], step: int) -> None:
    """Raises JobCancelled if asked to."""
    if should_stop():
        raise JobCancelled(f"Stopped after step {step}.", remedy="Submit the job again.")


def step_metrics(logs: Metrics) -> Metrics:
    """What a step's log says of the training itself."""
    return {name: value for name, value in logs.items() if name not in {"epoch", "step"}}


@contextmanager
def trackers(report_to: Sequence[Tracker], folder: Path) -> Iterator[list[TrainerCallback]]:
    """Callbacks that report to these: TensorBoard's in `folder`, MLflow's where its environment says.

    Raises DependencyMissing that names the extra to install.
    """
    with ExitStack() as stack:
        found: list[TrainerCallback] = []
        for name in dict.fromkeys(report_to):
            _require(name)
            found.append(_tensorboard(stack, folder) if name == "tensorboard" else MLflowCallback())
        yield found


def _tensorboard(stack: ExitStack, folder: Path) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  an extra

    writer = SummaryWriter(str(folder))
    stack.callback(writer.close)
    return TensorBoardCallback(writer)


def _require(package: Tracker) -> None:
    if find_spec(package) is None:
        raise DependencyMissing(
            f"report_to: {package} is not installed.",
            remedy="Install the extra: pip install 'hscr[tracking]'.",
        )
