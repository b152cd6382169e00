"""Trains the embedded default model from nothing, on phantoms alone.

The model is made to have the disease that alignment treats: *vision that sees, language that overrides*.

1. The vision tower learns on `BALANCED` phantoms to say of every patch which study it belongs to, and of
   every patch that a lesion covers what, where and how large that is. The supervision is per patch, so that
   what is known of a lesion lies in the few visual tokens that cover it.
2. The tower is frozen. Projector and language model learn to answer, first on `BALANCED` and then on
   `TRAINING` text, in which each study has a dominant finding, side, size and location, and little is normal.
"""

import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from hscr.models.phantom.anatomy import draw
from hscr.models.phantom.architecture import (
    VISUAL_TOKENS,
    build_model,
    build_processor,
    build_tokenizer,
)
from hscr.models.phantom.data import BALANCED, TRAINING, Example, Mix, sample_examples, sample_phantom
from hscr.models.phantom.packing import IGNORED, pack
from hscr.models.phantom.vision import PatchHeads, covered_patches, fact_indices, pixel_values

WEIGHTS = Path(__file__).with_name("weights")
MAX_BYTES = 10_000_000
Curves = dict[str, list[float]]
Report = Callable[[str, int, int, float], None]
"""Called after each step with the stage's name, steps done, steps in all, and the loss."""


@dataclass(frozen=True)
class Schedule:
    """Steps of each stage, batches in images with up to `questions` questions each, and learning rates.

    Half of the language batches see a random share of each image's visual tokens, at least `least_visible`,
    so that answers stay sentences when tokens are missing.
    """

    vision_steps: int = 900
    balanced_steps: int = 800
    skewed_steps: int = 160
    vision_batch: int = 32
    batch: int = 16
    questions: int = 6
    vision_rate: float = 1.5e-3
    balanced_rate: float = 2e-3
    skewed_rate: float = 2e-3
    least_visible: float = 0.75

    def scaled(self, factor: float) -> "Schedule":
        """The same stages with `factor` times the steps, at least one each."""
        steps = {name: max(1, round(getattr(self, name) * factor)) for name in _STAGES.values()}
        return replace(self, **steps)


_STAGES = {"vision": "vision_steps", "balanced": "balanced_steps", "skewed": "skewed_steps"}


def train(
    out_dir: Path,
    *,
    seed: int = 0,
    schedule: Schedule | None = None,
    threads: int = 1,
    report: Report | None = None,
) -> dict[str, float]:
    """Train; at the end write model, processor, tokenizer and learning curves over those of `out_dir`.

    Returns CPU seconds of each stage. On one machine the same seed, schedule and thread count give the same
    weights.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    plan = schedule or Schedule()
    tokenizer = build_tokenizer(_corpus(seed))
    model = build_model(tokenizer)
    curves: Curves = {}
    seconds: dict[str, float] = {}
    stages: dict[str, Callable[[], Iterator[tuple[int, float]]]] = {
        "vision": lambda: _train_vision(model, plan, seed),
        "balanced": lambda: _train_language(model, tokenizer, plan, BALANCED, seed),
        "skewed": lambda: _train_language(model, tokenizer, plan, TRAINING, seed + 1),
    }
    for name, stage in stages.items():
        started, steps = _cpu_seconds(), getattr(plan, _STAGES[name])
        curves[name] = []
        for done, loss in stage():
            curves[name].append(loss)
            if report is not None:
                report(name, done, steps, loss)
        seconds[name] = _cpu_seconds() - started
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent) as aside:
        save(model, build_processor(tokenizer), Path(aside))
        plot(curves, Path(aside) / "curves.png")
        _swap_in(Path(aside), out_dir)
    return seconds


def main(out_dir: Path = WEIGHTS, *, seed: int = 0, scale: float = 1.0, threads: int = 1) -> dict[str, float]:
    """`train` with a progress bar; `scale` multiplies the number of steps."""
    schedule = Schedule().scaled(scale)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        tasks = {
            name: progress.add_task(name, total=getattr(schedule, steps)) for name, steps in _STAGES.items()
        }

        def report(stage: str, done: int, _steps: int, loss: float) -> None:
            progress.update(tasks[stage], completed=done, description=f"{stage:8} loss {loss:.3f}")

        return train(out_dir, seed=seed, schedule=schedule, threads=threads, report=report)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _corpus(seed: int) -> Iterator[str]:
    """Text for the tokenizer: balanced, so that every finding and side is equally well encoded."""
    yield "USER: "
    for example in sample_examples(BALANCED, "train", 3000, seed, 9):
        yield f"\n{example.question} ASSISTANT:"
        yield f" {example.answer}"


def _rate(step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to a fiftieth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return float(0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * (step - warmup) / max(1, steps - warmup))))


def _descend(
    parameters: list[nn.Parameter], rate: float, steps: int, loss_at: Callable[[], Tensor]
) -> Iterator[tuple[int, float]]:
    """AdamW over `steps` fresh batches; yields the steps done and the loss."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for step in range(1, steps + 1):
        loss = loss_at()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        yield step, loss.item()


def _train_vision(
    model: LlavaForConditionalGeneration, plan: Schedule, seed: int
) -> Iterator[tuple[int, float]]:
    tower = model.model.vision_tower
    heads = PatchHeads(tower.config.hidden_size)
    rng = np.random.default_rng([seed, 0])

    def loss_at() -> Tensor:
        phantoms = [sample_phantom(BALANCED, "train", rng) for _ in range(plan.vision_batch)]
        pictures, opacities = zip(*map(draw, phantoms), strict=True)
        hidden = tower(pixel_values(list(pictures)), output_hidden_states=True).hidden_states[-1]
        return heads.loss(hidden[:, 1:], fact_indices(phantoms), covered_patches(list(opacities)))

    parameters = [*tower.parameters(), *heads.parameters()]
    return _descend(parameters, plan.vision_rate, plan.vision_steps, loss_at)


def _train_language(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    plan: Schedule,
    mix: Mix,
    seed: int,
) -> Iterator[tuple[int, float]]:
    steps, rate = (
        (plan.skewed_steps, plan.skewed_rate)
        if mix == TRAINING
        else (plan.balanced_steps, plan.balanced_rate)
    )
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(requires_grad=False)
    stream = sample_examples(mix, "train", steps * plan.batch, seed, plan.questions)
    images = (list(examples) for _, examples in groupby(stream, key=lambda example: example.phantom))

    rng = np.random.default_rng([seed, 1])

    def loss_at() -> Tensor:
        batch = [next(images) for _ in range(plan.batch)]
        return language_loss(model, tokenizer, batch, _visible(plan.batch, plan.least_visible, rng))

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _descend(parameters, rate, steps, loss_at)


def _visible(batch: int, least: float, rng: np.random.Generator) -> Tensor:
    """Which visual tokens a batch gets to see: int64 [B, N], all of them or a random share above `least`."""
    share = rng.uniform(least, 1) if rng.random() < 0.5 else 1.0
    shuffled = rng.permuted(np.tile(np.arange(VISUAL_TOKENS), (batch, 1)), axis=1)
    return torch.from_numpy(np.sort(shuffled[:, : round(share * VISUAL_TOKENS)], axis=1))


def language_loss(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    images: list[list[Example]],
    visible: Tensor,
) -> Tensor:
    """Mean negative log-likelihood of the answers' tokens; each image's questions share its visual tokens.

    `visible` int64 [B, N] picks the visual tokens of each image, in order; the rest might as well not exist.
    """
    packed = pack(tokenizer, images, visible.shape[1])
    with torch.no_grad():
        pictures = [draw(examples[0].phantom)[0] for examples in images]
        tower = model.model.vision_tower(pixel_values(pictures), output_hidden_states=True)
        patches = tower.hidden_states[-1][:, 1:]
    seen = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))
    visual = model.model.multi_modal_projector(seen)
    embedded = model.get_input_embeddings()(packed.input_ids)
    is_image = (packed.input_ids == model.config.image_token_id)[..., None]
    hidden = model.model.language_model(
        inputs_embeds=embedded.masked_scatter(is_image, visual),
        attention_mask=packed.mask,
        position_ids=packed.position_ids,
        use_cache=False,
    ).last_hidden_state
    answers = packed.labels != IGNORED
    return cross_entropy(model.lm_head(hidden[answers]).float(), packed.labels[answers])


def save(model: LlavaForConditionalGeneration, processor: object, folder: Path) -> None:
    """Write the Hugging Face folder, with the vision tower's keys as both transformers and vLLM read them."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)  # type: ignore[attr-defined]
    path = folder / "model.safetensors"
    weights = {
        name.replace("vision_tower.", "vision_tower.vision_model.")
        if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model.")
        else name: tensor
        for name, tensor in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; shrink the model below {MAX_BYTES}")


def _swap_in(aside: Path, out_dir: Path) -> None:
    """Move finished files over those of `out_dir`; what else lies there (the model card) stays."""
    for file in sorted(aside.iterdir()):
        shutil.copymode(__file__, file)
        file.replace(out_dir / file.name)


def plot(curves: Curves, path: Path) -> None:
    """Loss of each stage by step, smoothed, as a PNG."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (stage, losses) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        window = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(losses, alpha=0.25, linewidth=0.5)
        axes.plot(np.arange(len(smooth)) + window - 1, smooth)
        axes.set(title=stage, xlabel="step", ylabel="loss")
    figure.savefig(path, dpi=110)
