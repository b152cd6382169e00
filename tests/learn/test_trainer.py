"""Fine-tuning on a model (algorithms §6: 18, 24, 40): it learns, repeats bit for bit, leaves nothing."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from hscr.errors import ConsentMissing, InvalidConfig, InvalidRecord, JobCancelled
from hscr.learn.trainer import Metrics, finetune
from hscr.models.vlm import VLM
from hscr.records import PreferenceRecord, Response
from tests.learn.records import CONFIG, files, record, records, run
from tests.tiny_llava import picture


def own(vlm: VLM) -> list[tuple[PreferenceRecord, Image.Image]]:
    """Records as if this model had made them."""
    return [(each.but(model_digest=vlm.digest), image) for each, image in records()]


def test_40_eight_records_are_learnt(vlm: VLM, tmp_path: Path) -> None:
    result, history = run(vlm, CONFIG, tmp_path / "a", pairs=own(vlm))
    assert len(history) == 30
    # 18: the adapter starts equal to the base, so each of the one or three pairs of a record costs ln 2.
    pairs = 4 * (history[0]["loss/explicit"] + history[0]["loss/implicit"]) / math.log(2)
    assert pairs == pytest.approx(round(pairs), abs=1e-4)
    assert 4 <= round(pairs) <= 12
    assert history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert history[0]["logratio/chosen"] == pytest.approx(0, abs=1e-5)
    assert result.metrics["rewards/accuracies"] == 1
    assert result.metrics["rewards/margins"] > 1
    assert result.metrics["logratio/chosen"] > 0
    assert result.metrics["loss"] < history[0]["loss"] / 2
    assert result.warnings == ()
    assert sorted(files(result.path)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_same_seed_gives_the_same_bytes_in_any_order(vlm: VLM, tmp_path: Path) -> None:
    short = CONFIG.model_copy(update={"epochs": 2.0, "dropout": 0.1})
    finetune(vlm, records(), short, out_dir=tmp_path / "a")
    finetune(vlm, records()[::-1], short, out_dir=tmp_path / "b")
    finetune(vlm, records(), short.model_copy(update={"seed": 1}), out_dir=tmp_path / "c")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_nothing_is_left_in_the_model(vlm: VLM, tmp_path: Path) -> None:
    names = [name for name, _ in vlm.model.named_parameters()]
    finetune(vlm, records(2), CONFIG.model_copy(update={"epochs": 1.0}), out_dir=tmp_path)
    again = [name for name, _ in vlm.model.named_parameters()]
    assert len([n for n in again if "lora" in n]) == len([n for n in names if "lora" in n]) == 0
    assert not any(parameter.requires_grad for parameter in vlm.model.parameters())


def test_sft_sees_the_same_batches_and_no_negatives(vlm: VLM, tmp_path: Path) -> None:
    def train(objective: str) -> list[Metrics]:
        history: list[Metrics] = []
        config = CONFIG.model_copy(update={"objective": objective, "epochs": 3.0})
        out = tmp_path / objective
        finetune(vlm, records(), config, out_dir=out, on_progress=lambda *s: history.append(s[2]))
        return history

    spoken = {objective: train(objective) for objective in ("hscr", "sft")}
    assert len(spoken["sft"]) == len(spoken["hscr"])
    # Before the first update both have seen the same preferred answers.
    assert spoken["sft"][0]["loss/nll"] == pytest.approx(spoken["hscr"][0]["loss/nll"], abs=1e-5)
    # The trainer's mean is of fp32, the tally's of fp64: they part in the last bit on some processors.
    assert spoken["sft"][0]["loss"] == pytest.approx(spoken["sft"][0]["loss/nll"], rel=1e-6)
    assert "rewards/rejected" not in spoken["sft"][0]
    assert spoken["sft"][-1]["loss/nll"] < spoken["sft"][0]["loss/nll"]


def test_the_preferred_answer_losing_ground_is_said(vlm: VLM, tmp_path: Path) -> None:
    # Only the implicit term: it says nothing for y_w, and the shared words drag it along.
    config = CONFIG.model_copy(update={"nll_weight": 0.0, "explicit_weight": 0.0, "learning_rate": 2e-2})
    result = finetune(vlm, records(), config, out_dir=tmp_path)
    assert result.metrics["logratio/chosen"] < 0
    assert "less probable" in result.warnings[0]


def test_the_probe_is_what_the_saved_adapter_says(vlm: VLM, tmp_path: Path) -> None:
    result = finetune(vlm, records(), CONFIG, out_dir=tmp_path)
    images = {record.image_digest: image for record, image in records()}
    items = result.probe["items"]
    assert 1 <= len(items) <= 4
    assert json.loads(json.dumps(result.probe)) == result.probe
    vlm.load_adapter(result.path, "probed")
    for item in items:
        prompt, ids = vlm.prompt_ids(item["question"]), item["completion_ids"]
        assert [*ids, vlm.eos_id] == vlm.completion_ids(item["completion"])
        visual = vlm.visual_tokens(vlm.pixel_values([images[item["image_digest"]]]))
        for name, key in ((None, "token_logprobs_base"), ("probed", "token_logprobs_adapter")):
            with vlm.use(name), torch.no_grad():
                context = vlm.prefill(vlm.embed([prompt], visual))
                found = vlm.completion_logprobs(context, [[ids]])[0][0]
            torch.testing.assert_close(found, torch.tensor(item[key]), atol=1e-4, rtol=0)
    vlm.unload_adapter("probed")
    keys = ("token_logprobs_base", "token_logprobs_adapter")
    shift = [abs(a - b) for i in items for a, b in zip(*(i[key] for key in keys), strict=True)]
    assert max(shift) > 0.1


@pytest.mark.parametrize(
    "change", [{"chosen": ""}, {"chosen": "<image>"}, {"question": " "}, {"question": "</s>"}]
)
def test_an_unusable_record_is_named(vlm: VLM, tmp_path: Path, change: dict[str, str]) -> None:
    pairs = records(3)
    pairs[1] = (pairs[1][0].but(**change), pairs[1][1])
    with pytest.raises(InvalidRecord, match="pref_1"):
        finetune(vlm, pairs, CONFIG, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_dispreferred_answer_is_named(vlm: VLM, tmp_path: Path) -> None:
    pairs = records(2)
    empty = Response(text=" ", similarity=0, mean_probability=0)
    pairs[0] = (pairs[0][0].model_copy(update={"rejected": (empty,)}), pairs[0][1])
    with pytest.raises(InvalidRecord, match="pref_0"):
        finetune(vlm, pairs, CONFIG, out_dir=tmp_path)


def test_nothing_to_train_on_is_refused(vlm: VLM, tmp_path: Path) -> None:
    with pytest.raises(InvalidRecord, match="nothing to train"):
        finetune(vlm, [], CONFIG, out_dir=tmp_path)


def test_stopping_leaves_no_files_and_no_adapter(vlm: VLM, tmp_path: Path) -> None:
    steps: list[int] = []
    with pytest.raises(JobCancelled, match="after step 2"):
        finetune(
            vlm,
            records(),
            CONFIG,
            out_dir=tmp_path / "out",
            on_progress=lambda step, *_: steps.append(step),
            should_stop=lambda: len(steps) == 2,
        )
    assert not (tmp_path / "out").exists()
    assert vlm.adapters.names == ()
    assert vlm.adapters.active is None


def test_a_last_step_that_diverges_is_an_error_and_writes_nothing(vlm: VLM, tmp_path: Path) -> None:
    """No gradient comes after it."""
    config = CONFIG.model_copy(update={"learning_rate": 1e300, "epochs": 0.1})
    with pytest.raises(InvalidConfig, match="diverged"):
        run(vlm, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_records_of_one_id_are_refused(vlm: VLM, tmp_path: Path) -> None:
    """The reference of one would have been that of the other."""
    pairs = [*records(), (record(1).but(id="pref_0"), picture(0))]
    with pytest.raises(InvalidRecord, match="pref_0 is there more than once"):
        run(vlm, CONFIG, tmp_path / "out", pairs=pairs)


def test_records_without_consent_are_refused(vlm: VLM, tmp_path: Path) -> None:
    pairs = [*records(), (record(1).but(id="pref_x", consent=False), picture(0))]
    with pytest.raises(ConsentMissing, match="pref_x is not to be trained on"):
        run(vlm, CONFIG, tmp_path / "out", pairs=pairs)


def test_records_of_another_model_are_told_of(vlm: VLM, tmp_path: Path) -> None:
    short = CONFIG.model_copy(update={"epochs": 1.0})
    result, _ = run(vlm, short, tmp_path / "own", pairs=own(vlm))
    assert not any("another model" in warning for warning in result.warnings)
    result, _ = run(vlm, short, tmp_path / "mixed", pairs=[records()[0], *own(vlm)[1:]])
    assert result.warnings[-1].startswith("1 of 8 records were made with another model")


def test_divergence_is_an_error_and_writes_nothing(vlm: VLM, tmp_path: Path) -> None:
    wild = CONFIG.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(InvalidConfig, match="diverged"):
        finetune(vlm, records(), wild, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fraction_of_an_epoch_takes_its_share_of_the_records(vlm: VLM, tmp_path: Path) -> None:
    counts: list[int] = []
    config = CONFIG.model_copy(update={"epochs": 1.5, "batch_size": 5})
    finetune(vlm, records(), config, out_dir=tmp_path, on_progress=lambda _, total, __: counts.append(total))
    assert counts == [3, 3, 3]  # 12 records, five at a time
