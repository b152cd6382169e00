"""Every recipe is valid, and says what the paper says (algorithms: arXiv 2506.00805)."""

from pathlib import Path

import pytest

from hscr.config import LoopConfig
from hscr.errors import InvalidConfig
from hscr.recipes import recipes

NAMES = [recipe.name for recipe in recipes()]


def recipe(name: str) -> LoopConfig:
    return LoopConfig.from_toml(Path(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    assert recipe(name) != LoopConfig() or name == "phantom"
    about = next(each.about for each in recipes() if each.name == name)
    assert about.endswith((".", ")."))


@pytest.mark.parametrize("name", ["hscr-llava-med", "hscr-llava-1.5"])
def test_the_papers_settings(name: str) -> None:
    config = recipe(name)
    made, tuned = config.generate, config.finetune
    assert (made.degrade.kind, made.degrade.rate, made.degrade.mode) == ("visual_token", 0.7, "delete")
    assert (made.sensitive.n, made.sensitive.literal_n) == (10, True)
    assert (made.substitute.beta, made.substitute.order) == (0.9, "pdiff_ascending")
    assert (made.substitute.candidates, made.substitute.vary_count) == (8, False)
    floors = made.substitute.plausibility, made.substitute.full_plausibility, made.substitute.min_probability
    assert (floors, made.substitute.rounds) == ((0, 0, 0), 0)
    assert (made.rerank.similarity, made.rerank.levels, made.rerank.gap) == ("sentence_embedding", 3, 0.1)
    assert (tuned.rank, tuned.alpha, tuned.dropout, tuned.gamma) == (16, 32, 0, 0.1)
    assert (tuned.learning_rate, tuned.weight_decay, tuned.epochs) == (5e-7, 0, 2)
    assert (tuned.batch_size, tuned.micro_batch_size, tuned.max_length) == (16, 2, 4096)
    assert (tuned.explicit_weight, tuned.implicit_weight, tuned.nll_weight) == (1, 1, 0)
    assert (tuned.pair_reduction, tuned.implicit_detach_winner) == ("sum", False)
    assert tuned.max_records == 2000


def test_the_plausible_recipe_is_our_reading_trained_as_in_the_paper() -> None:
    config, ours, paper = recipe("hscr-plausible"), LoopConfig(), recipe("hscr-llava-med")
    assert config.finetune == paper.finetune
    assert config.generate.model_copy(update={"rerank": ours.generate.rerank}) == ours.generate
    assert config.generate.rerank == paper.generate.rerank


def test_the_phantoms_recipe_is_the_defaults() -> None:
    assert recipe("phantom") == LoopConfig()


def test_a_file_may_change_single_keys_of_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('extends = "hscr-llava-med"\n[generate.degrade]\nrate = 0.4\n')
    config, base = LoopConfig.from_toml(file), recipe("hscr-llava-med")
    degrade = base.generate.degrade.model_copy(update={"rate": 0.4})
    assert config == base.model_copy(
        update={"generate": base.generate.model_copy(update={"degrade": degrade})}
    )


def test_a_file_beside_you_comes_before_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("phantom").write_text("[finetune]\ngamma = 0.7\n")
    assert recipe("phantom").finetune.gamma == 0.7


def test_extends_means_the_recipe_whatever_lies_beside_you(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("phantom").write_text('extends = "phantom"\n[finetune]\ngamma = 0.7\n')
    assert recipe("phantom").finetune.gamma == 0.7
    Path("mine.toml").write_text('extends = "mine.toml"')
    with pytest.raises(InvalidConfig, match=r"no recipe mine\.toml"):
        recipe("mine.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('extends = "nothing"', "no recipe nothing"),
        ("extends = 3", "no recipe 3"),
        ('extends = ["phantom"]', "no recipe"),
        ("extends = {a = 1}", "no recipe"),
        (
            'extends = "phantom"\n[finetune]\nlearning = 1',
            r"finetune\.learning.*there: objective, ",
        ),
        ("[generate.degrade]\nrates = 1", r"generate\.degrade\.rates.*Known keys there: kind, rate, mode, "),
        ("[generate.degrade]\nrate = 2", r"generate\.degrade\.rate.*Correct the value"),
        ("[finetune]\nlearning_rate = nan", r"finetune\.learning_rate: Input should be a finite number"),
        ("[finetune]\nepochs = inf", r"finetune\.epochs: Input should be a finite number"),
        ("[finetune]\nseed = -1", r"finetune\.seed: Input should be greater than or equal to 0"),
        ("[finetune]\ndata_seed = 4294967296", r"finetune\.data_seed: Input should be less than 4294967296"),
        ("a = [", "Expected|Invalid"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(InvalidConfig, match=said):
        LoopConfig.from_toml(file)


def test_an_unknown_name_lists_the_recipes() -> None:
    with pytest.raises(InvalidConfig, match="hscr-plausible"):
        recipe("no-such-recipe")
