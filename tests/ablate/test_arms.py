"""Arms differ from the method in what their table varies, and in nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hscr.ablate.run import ablate
from hscr.ablate.setting import Setting
from hscr.ablate.suites import HSCR, SUITES, Arm, SuiteName
from hscr.config import LoopConfig
from hscr.errors import InvalidConfig
from hscr.recipes import recipes
from hscr.stack import PHANTOM

KIND, RATE = "generate.degrade.kind", "generate.degrade.rate"
TABLES = {
    SuiteName.MASK: {"pixel": {KIND: "pixel"}, "patch": {KIND: "patch"}, "latent": {KIND: "latent"}},
    SuiteName.RATE: {"rate-0.3": {RATE: 0.3}, "rate-0.5": {RATE: 0.5}, "rate-0.9": {RATE: 0.9}},
    SuiteName.LEVELS: {
        "sft": {"finetune.objective": "sft"},
        "explicit": {"finetune.implicit_weight": 0.0},
        "implicit": {"finetune.explicit_weight": 0.0},
    },
    SuiteName.SOURCE: {"external": {}, "random": {"generate.substitute.negatives": "random"}},
}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        at = f"{prefix}{key}"
        found |= flat(value, f"{at}.") if isinstance(value, Mapping) else {at: value}
    return found


def changed(config: LoopConfig, reference: LoopConfig) -> dict[str, Any]:
    """What `config` says otherwise."""
    ours, theirs = flat(config.resolved()), flat(reference.resolved())
    return {key: value for key, value in ours.items() if value != theirs[key]}


@pytest.mark.parametrize("name", SuiteName)
def test_an_arm_differs_from_the_method_in_what_its_table_varies(name: SuiteName) -> None:
    setting = Setting()
    arms = {arm.name: arm for arm in SUITES[name].arms}
    method = setting.arm(arms.pop(HSCR), 3)
    assert not arms.pop("base").trained
    assert {arm.name: changed(setting.arm(arm, 3), method) for arm in arms.values()} == TABLES[name]
    outsiders = [arm.name for arm in arms.values() if arm.negatives != "self"]
    assert outsiders == (["external"] if name == SuiteName.SOURCE else [])


def test_the_method_is_the_shared_configuration_under_the_seed() -> None:
    loop = LoopConfig.parse({"generate": {"degrade": {"rate": 0.6}}, "finetune": {"gamma": 0.2}})
    for suite in SUITES.values():
        (method,) = (arm for arm in suite.arms if arm.name == HSCR)
        config = Setting(loop=loop).arm(method, 5)
        assert changed(config, loop) == {"generate.seed": 5, "finetune.seed": 5}


def test_arms_of_one_name_are_one_arm() -> None:
    known: dict[str, Arm] = {}
    for arm in (arm for suite in SUITES.values() for arm in suite.arms):
        first = known.setdefault(arm.name, arm)
        assert (first.changes, first.negatives, first.trained) == (arm.changes, arm.negatives, arm.trained)


def test_the_recipes_for_real_weights_are_the_same_arms() -> None:
    method = LoopConfig.from_toml(Path("hscr-llava-med"))
    known = {recipe.name for recipe in recipes()}
    for arm in {arm.name: arm for suite in SUITES.values() for arm in suite.arms if arm.changes}.values():
        name = f"hscr-llava-med-{arm.name}"
        assert name in known
        assert LoopConfig.from_toml(Path(name)) == arm.config(method)


def test_every_arm_takes_the_same_number_of_steps() -> None:
    setting = Setting(steps=90)
    for records in range(1, 400):
        config = setting.finetune(setting.loop.finetune, records)
        per_epoch = -(-records // config.batch_size)
        assert -(-config.epochs * per_epoch // 1) == 90  # as transformers.Trainer computes it


def test_a_suite_of_other_questions_is_refused() -> None:
    loop = LoopConfig.parse({"evaluate": {"suite": "vqa.jsonl"}})
    with pytest.raises(InvalidConfig, match=r"evaluate\.suite"):
        Setting(loop=loop).arm(SUITES[SuiteName.MASK].arms[-1], 0)


def test_a_change_that_the_shared_configuration_has_no_place_for_is_refused() -> None:
    loop = LoopConfig.parse({"generate": {"degrade": {"mode": "zero"}}})
    pixel = next(arm for arm in SUITES[SuiteName.MASK].arms if arm.name == "pixel")
    with pytest.raises(InvalidConfig, match="pixel has no mode zero"):
        Setting(loop=loop).arm(pixel, 0)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (SuiteName.RATE, RATE, 0.5),
        (SuiteName.MASK, KIND, "pixel"),
        (SuiteName.SOURCE, "generate.substitute.negatives", "random"),
        (SuiteName.LEVELS, "finetune.objective", "sft"),
        (SuiteName.LEVELS, "finetune.implicit_weight", 0.0),
    ],
)
def test_a_configuration_that_sets_what_the_suite_varies_is_refused(
    name: SuiteName, key: str, value: object, tmp_path: Path
) -> None:
    setting = Setting(records=1, steps=1, loop=Arm("shared", "", {key: value}).config(LoopConfig()))
    with pytest.raises(InvalidConfig, match=f"{key}: .* {value}, .*Leave it out: the suite {name} varies it"):
        ablate(PHANTOM, [name], setting, 1, tmp_path)


def test_what_all_arms_share_may_be_any() -> None:
    for suite in SUITES.values():
        suite.require_defaults(LoopConfig.from_toml(Path("hscr-llava-med")))
    SUITES[SuiteName.MASK].require_defaults(LoopConfig.parse({"generate": {"degrade": {"rate": 0.5}}}))
