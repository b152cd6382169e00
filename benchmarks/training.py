"""`make bench-training`: a step on one prompt, one image and four answers, against TRL's on its six pairs.

TRL explodes a record into pairs, and each pair carries the prompt, the image and both answers again, for the
policy and for the reference. Both sides see one record a step (or as many as `--per-step` says, which TRL
accumulates one by one), train the same LoRA on the same weights with the same loss (the mean over pairs),
without gradient checkpointing or truncation, and are timed over whole epochs of their own trainers:
collation, reference, forward, backward, optimizer. On a CPU TRL is also timed with the compaction of its
language-model head that it reserves for GPUs; the ratio is to the faster TRL.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.drawing import draw
from benchmarks.generation import QUESTIONS
from benchmarks.limits import Rates, Work, training_floor
from benchmarks.sides import LEVELS, TOKENS, Ours, Trl, differences
from hscr.models.vlm import VLM


def timed(epoch: Callable[[int], Callable[[], object]], count: int, device: str) -> float:
    """Seconds of an epoch on so many records, from the first batch on."""
    run = epoch(count)
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def floor(vlm: VLM, device: str) -> float:
    """Seconds that a step's matrix products must take at this machine's measured rate."""
    prompt = 576 + len(vlm.prompt_ids(QUESTIONS[0])) - 1
    shape = Work(vlm.model.config, vlm.model.dtype.itemsize)
    return training_floor(
        shape,
        Rates.measure(device, vlm.model.dtype),
        prompt=prompt,
        answers=(1 + LEVELS) * (TOKENS - 1),
        scored=(1 + LEVELS) * TOKENS,
    )


def peak(name: str, options: argparse.Namespace) -> int:
    """Bytes that a process of its own holds at most over two steps: device memory on a GPU, else resident."""
    command = [sys.executable, "-m", "benchmarks.training", "--peak-of", name]
    command += ["--threads", str(options.threads), "--per-step", str(options.per_step)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def show_peak(name: str, device: str, per_step: int) -> None:
    with ExitStack() as stack:
        contestant(name, device, 2 * per_step, per_step, stack).epoch(2 * per_step)()
    print(torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident())


def peak_resident() -> int:
    """Bytes. Not `ru_maxrss`, which a process takes over from the one that started it."""
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def contestant(name: str, device: str, count: int, per_step: int, stack: ExitStack) -> Any:
    if name == "ours":
        return Ours(device, count, per_step, stack)
    return Trl(device, count, per_step, stack, compact=name == "trl_compacted")


def measure(options: argparse.Namespace, device: str, stack: ExitStack) -> dict[str, Any]:
    """Everything the last line says; sides take turns, so that a slow moment of the machine meets all."""
    sizes = [options.records // 4, options.records // 2, options.records]
    names = ["ours", "trl_compacted", "trl"] if device == "cpu" else ["ours", "trl"]
    peaks = {name: peak(name, options) for name in names}  # while this process holds nothing of the device
    sides = {name: contestant(name, device, options.records, options.per_step, stack) for name in names}
    loss, gradient = differences(sides["ours"].first(), sides["trl"].first())
    seconds: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in names}
    for name in names:
        timed(sides[name].epoch, options.per_step, device)
    for repeat in range(options.repeats):
        for size in sizes if repeat == 0 else sizes[-1:]:
            for name in names:
                before = time.process_time()
                took = timed(sides[name].epoch, size, device)
                seconds[name][size].append(took)
                wall, busy = took / size, (time.process_time() - before) / size
                print(f"  {name}, {size} records: {wall:.2f} s a record, {busy:.2f} s of CPU", flush=True)
    median = {name: {n: statistics.median(v) for n, v in by.items()} for name, by in seconds.items()}
    step = {name: each[sizes[-1]] / sizes[-1] for name, each in median.items()}
    least = floor(sides["ours"].vlm, device)
    if options.plot:
        title = f"preference training, four answers of {TOKENS} tokens a record, {device}"
        draw(options.plot, median, least * sizes[-1], title)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {options.threads} threads",
        "trl_s": round(step["trl"], 3),
        "trl_compacted_s": round(step["trl_compacted"], 3) if "trl_compacted" in step else None,
        "ours_s": round(step["ours"], 3),
        "ratio": round(min(value for name, value in step.items() if name != "ours") / step["ours"], 2),
        "loss_difference": loss,
        "gradient_relative_difference": gradient,
        "trl_peak_bytes": peaks[min(names[1:], key=step.__getitem__)],
        "ours_peak_bytes": peaks["ours"],
        "floor_s": round(least, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=4)
    parser.add_argument("--per-step", type=int, default=1, help="records of a step; TRL accumulates them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="PNG to draw the three sizes into")
    parser.add_argument("--peak-of", choices=["ours", "trl", "trl_compacted"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")  # those of TRL and PEFT about one another's versions
    if options.peak_of:
        show_peak(options.peak_of, device, options.per_step)
    else:
        with ExitStack() as stack:
            print(json.dumps(measure(options, device, stack)))


if __name__ == "__main__":
    main()
