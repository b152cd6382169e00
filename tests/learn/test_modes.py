"""However a step is carried out, it is the same step (algorithms §6: 24, 37, 38, 41)."""

import random
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from hscr.config import FinetuneConfig
from hscr.errors import Conflict, DependencyMissing, InvalidConfig, JobCancelled
from hscr.learn.trainer import Metrics, finetune
from hscr.models.vlm import VLM
from tests.learn.records import CONFIG, files, records, run, weights
from tests.tiny_llava import build

SHORT = CONFIG.model_copy(update={"epochs": 2.0})


def changed(**values: object) -> FinetuneConfig:
    return SHORT.model_copy(update=values)


@pytest.fixture(scope="module")
def plain(vlm: VLM, tmp_path_factory: pytest.TempPathFactory) -> list[Metrics]:
    """Every step of a run as it comes."""
    return run(vlm, SHORT, tmp_path_factory.mktemp("plain") / "a")[1]


@pytest.fixture(scope="module")
def gentle(vlm: VLM, tmp_path_factory: pytest.TempPathFactory) -> list[Metrics]:
    """The same in steps so small that rounding does not grow."""
    return run(vlm, changed(learning_rate=1e-4), tmp_path_factory.mktemp("gentle") / "a")[1]


def assert_close(found: list[Metrics], expected: list[Metrics], tolerance: float = 1e-4) -> None:
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        # At the first step margins are 0 but for rounding, whose sign is no accuracy.
        left_out = {"rewards/accuracies"} if step == 0 else set()
        for name in other.keys() - left_out:
            assert one[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), name
        assert one.keys() == other.keys()


@pytest.mark.parametrize(("batch_size", "micro_batch_size"), [(8, 1), (4, 2), (5, 1)])
def test_38_accumulated_steps_equal_whole_ones(
    vlm: VLM, tmp_path: Path, batch_size: int, micro_batch_size: int
) -> None:
    """Records have one to three dispreferred answers, and an epoch's last step has 8 - 5 of them."""
    config = changed(batch_size=batch_size, learning_rate=1e-4)
    _, whole = run(vlm, config, tmp_path / "a")
    parts = config.model_copy(update={"micro_batch_size": micro_batch_size})
    assert_close(run(vlm, parts, tmp_path / "b")[1], whole)


def test_a_batch_that_cannot_be_shared_is_refused(vlm: VLM, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="batch_size"):
        run(vlm, changed(batch_size=4, micro_batch_size=3), tmp_path)


def test_24_an_online_reference_equals_a_cached_one(vlm: VLM, tmp_path: Path, gentle: list[Metrics]) -> None:
    assert_close(run(vlm, changed(reference="online", learning_rate=1e-4), tmp_path)[1], gentle)
    assert gentle[-1]["logratio/chosen"] != 0


def test_checkpointed_gradients_are_the_same(vlm: VLM, tmp_path: Path, gentle: list[Metrics]) -> None:
    config = changed(learning_rate=1e-4, gradient_checkpointing=True)
    assert_close(run(vlm, config, tmp_path)[1], gentle)
    assert not vlm.model.is_activation_checkpointing


def test_37_bf16_is_within_a_hundredth_of_fp32(folder: Path, tmp_path: Path, gentle: list[Metrics]) -> None:
    half = VLM.load(folder, dtype="bfloat16")
    config = changed(learning_rate=1e-4)
    _, low = run(half, config, tmp_path / "a")
    assert low[0]["loss"] == pytest.approx(gentle[0]["loss"], rel=1e-2)
    # The second run on the model is not wrapped in what the first left behind.
    assert run(half, config, tmp_path / "b")[1] == low
    # Adapters stay in fp32, or updates of 1e-4 would be rounded away.
    assert weights(tmp_path / "a").dtype == torch.float32


def test_dropout_is_loras_alone(folder: Path, tmp_path: Path, plain: list[Metrics]) -> None:
    noisy = VLM.load(folder)
    for module in noisy.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
        if type(module).__name__ == "CLIPAttention":
            module.dropout = 0.5
    assert run(noisy, SHORT, tmp_path / "a")[1] == plain
    _, dropped = run(noisy, changed(dropout=0.5), tmp_path / "b")
    # At B = 0 LoRA's output is 0 whatever is dropped; from then on it is not.
    assert dropped[0]["loss"] == pytest.approx(plain[0]["loss"], abs=1e-6)
    assert dropped[-1]["loss"] != pytest.approx(plain[-1]["loss"], abs=1e-3)


@pytest.mark.parametrize("stop_before", [3, 5])
def test_41_an_interrupted_run_resumes_to_the_same_bytes(vlm: VLM, tmp_path: Path, stop_before: int) -> None:
    """Checkpoints are at steps 2 and 4: within an epoch of three steps, and one that follows its end."""
    config = changed(epochs=3.0, batch_size=3, dropout=0.1, reference="online")
    uninterrupted, whole = run(vlm, config, tmp_path / "a")
    out, seen = tmp_path / "b", []
    with pytest.raises(JobCancelled):
        finetune(
            vlm, records(), config, out_dir=out, checkpoint_every=2,
            on_progress=lambda *step: seen.append(step[2]), should_stop=lambda: len(seen) == stop_before,
        )  # fmt: skip
    kept = tmp_path / "b.checkpoints" / f"checkpoint-{stop_before - 1}"
    assert not out.exists()
    assert any(kept.rglob("adapter_model.safetensors"))
    assert not any(file.stat().st_size > 400_000 for file in kept.rglob("*"))  # the model has 600 kB
    result, rest = run(vlm, config, out, checkpoint_every=2, resume=True)
    assert rest == whole[stop_before - 1 :]
    assert files(out) == files(tmp_path / "a")
    assert result.metrics == uninterrupted.metrics
    assert not kept.parent.exists()


def test_41_another_data_seed_is_another_order(vlm: VLM, tmp_path: Path, plain: list[Metrics]) -> None:
    assert run(vlm, changed(data_seed=0), tmp_path / "a")[1] == plain
    _, other = run(vlm, changed(data_seed=1), tmp_path / "b")
    assert [row["logps/chosen"] for row in other] != [row["logps/chosen"] for row in plain]


def test_only_the_same_run_is_resumed(vlm: VLM, tmp_path: Path) -> None:
    steps: list[int] = []
    with pytest.raises(JobCancelled):
        finetune(
            vlm, records(), SHORT, out_dir=tmp_path / "a", checkpoint_every=1,
            on_progress=lambda step, *_: steps.append(step), should_stop=lambda: len(steps) == 1,
        )  # fmt: skip
    with pytest.raises(Conflict, match="configuration"):
        run(vlm, changed(seed=1), tmp_path / "a", resume=True)
    with pytest.raises(Conflict, match="records"):
        run(vlm, SHORT, tmp_path / "a", pairs=records(4), resume=True)
    # What was being written when the run was killed is passed over.
    torn = tmp_path / "a.checkpoints" / "checkpoint-9"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    _, rest = run(vlm, SHORT, tmp_path / "a", resume=True)
    assert len(rest) == 3


def test_what_cannot_be_resumed_is_told_or_an_error(vlm: VLM, tmp_path: Path, plain: list[Metrics]) -> None:
    """One checkpoint is kept, the one asked for when the run was stopped; then a byte of it changes."""
    steps: list[int] = []
    with pytest.raises(JobCancelled):
        finetune(
            vlm, records(), SHORT, out_dir=tmp_path / "a", checkpoint_every=4,
            on_progress=lambda step, *_: steps.append(step),
            should_checkpoint=lambda: len(steps) >= 2, should_stop=lambda: len(steps) >= 2,
        )  # fmt: skip
    folder = tmp_path / "a.checkpoints"
    assert [path.name for path in folder.glob("*-*")] == ["checkpoint-3"]
    copy = shutil.copytree(folder, tmp_path / "b")

    resumed: list[int] = []
    options = {"checkpoint_every": 2, "resume": True, "on_resumed": resumed.append}
    _, rest = run(vlm, SHORT, tmp_path / "a", **options)
    assert (resumed, rest) == ([3], plain[3:])

    damaged = next(copy.rglob("optimizer.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(Conflict, match="checkpoint-3 is damaged"):
        run(vlm, SHORT, tmp_path / "c", checkpoint_dir=copy, **options)
    refused: list[str] = []
    _, whole = run(vlm, SHORT, tmp_path / "c", checkpoint_dir=copy, on_refused=refused.append, **options)
    assert (whole, resumed) == (plain, [3])
    assert refused == ["checkpoint-3 is damaged on disk."]
    assert [path.name for path in copy.glob("*-*")] == ["checkpoint-4"], "the caller's own folder stays"
    assert files(tmp_path / "a") == files(tmp_path / "c")


def test_nothing_to_resume_is_a_new_run(vlm: VLM, tmp_path: Path) -> None:
    assert len(run(vlm, SHORT, tmp_path / "a", resume=True)[1]) == 4


def test_the_callers_randomness_and_settings_are_left_alone(
    vlm: VLM, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seed() -> None:
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)

    seed()
    expected = draw()
    seed()
    before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
    run(vlm, changed(dropout=0.1), tmp_path / "a")
    assert draw() == expected
    assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()) == before
    assert not any(module.training for module in vlm.model.modules())
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_tensorboard_has_every_steps_figures(vlm: VLM, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, history = run(vlm, SHORT, tmp_path / "a", report_to=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "a.runs"))
    events.Reload()
    for name in ("loss", "grad_norm", "rewards/margins", "loss/implicit", "logratio/chosen"):
        told = [event.value for event in events.Scalars(f"train/{name}")]
        assert told == pytest.approx([row[name] for row in history], rel=1e-5)


def test_a_tracker_that_is_missing_is_named(vlm: VLM, tmp_path: Path) -> None:
    if find_spec("mlflow") is not None:
        pytest.skip("mlflow is installed")
    with pytest.raises(DependencyMissing, match="tracking"):
        run(vlm, SHORT, tmp_path / "a", report_to=("mlflow",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT 0.21 reads what transformers 5.23 has renamed
def test_all_linear_layers_would_reach_the_vision_tower_and_ours_do_not(vlm: VLM, folder: Path) -> None:
    """PEFT's own "all-linear", and a list of the projections' names, train vision layers as well."""
    for trap in ("all-linear", ["q_proj", "v_proj"]):
        lora = peft.LoraConfig(r=2, target_modules=trap)
        wrapped = peft.get_peft_model(LlavaForConditionalGeneration.from_pretrained(folder), lora)
        assert any("vision_tower" in name for name, p in wrapped.named_parameters() if p.requires_grad)
    with vlm.with_lora(CONFIG) as parameters:
        assert {name.split(".")[1] for name in parameters} == {"language_model"}


def test_nothing_but_the_adapter_is_changed(vlm: VLM, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    run(vlm, SHORT, tmp_path / "a")
    after = vlm.model.state_dict()
    plain = {name.replace(".base_layer.", "."): value for name, value in after.items()}
    first = {name.replace(".base_layer.", "."): value for name, value in before.items()}
    assert plain.keys() == first.keys()
    assert all(torch.equal(plain[name], value) for name, value in first.items())


def test_four_bits_train_or_name_their_extra(folder: Path, tmp_path: Path) -> None:
    if find_spec("bitsandbytes") is None:
        with pytest.raises(DependencyMissing, match="qlora"):
            VLM.load(folder, quantize="nf4")
        return
    small = VLM.load(build(tmp_path / "model", width=64), quantize="nf4")
    assert small.numeric_mode == "cpu/float32/nf4"
    _, history = run(small, CONFIG, tmp_path / "a")
    assert history[-1]["loss"] < history[0]["loss"] / 2
