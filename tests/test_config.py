"""What can be set: every recipe loads, defaults obey their own limits, fields that do not fit each other are named."""

import dataclasses
import tomllib

import pytest

import config
from cli import RECIPES, parse
from config import BenchConfig, EvalConfig, InferConfig, PrepareConfig, TrainConfig, UserError

NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.mark.parametrize("cls", [TrainConfig, BenchConfig, EvalConfig, InferConfig])
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_for_every_verb_and_sets_what_it_says(name, cls, in_tmp):
    weights = in_tmp / "out" / "gpt2_124m"  # what finetune_shakespeare begins with, as far as it is looked at
    weights.mkdir(parents=True)
    (weights / "model.safetensors").touch()
    (weights / "config.json").write_text(
        '{"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}'
    )
    loaded = parse(cls, ["--config", name])
    for key, value in tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8")).items():
        field = next((f for f in dataclasses.fields(cls) if f.name == key), None)
        if field and field.metadata.get("recipe", True):
            assert getattr(loaded, key) == value, key
        elif field:
            assert getattr(loaded, key) == field.default, f"{key} of a recipe is meant for training"


def test_quickstart_is_what_train_does_without_a_recipe():
    """Both write to out/quickstart, so they have to be one run."""
    assert dataclasses.replace(parse(TrainConfig, ["--config", "quickstart"]), config=None) == TrainConfig()


@pytest.mark.parametrize("cls", config.VERBS)
def test_defaults_obey_their_own_limits(cls):
    for field in dataclasses.fields(cls):
        meta, value = field.metadata, field.default
        assert meta["help"], field.name
        if value is not None:
            assert value in meta.get("choices", [value]), field.name
            assert value >= meta.get("low", value), field.name
            assert value <= meta.get("high", value), field.name
            assert "above" not in meta or value > meta["above"], field.name
            assert "below" not in meta or value < meta["below"], field.name
    if cls is not PrepareConfig:  # its source has no default
        assert cls().problems() == []


@pytest.mark.parametrize("cls", config.VERBS)
def test_every_name_reaches_one_field(cls):
    names = [n for f in dataclasses.fields(cls) for n in (f.name, *f.metadata.get("alias", ()))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("cls", "words", "said"),
    [
        (TrainConfig, "--n_embd 190", ["n_embd = 190", "n_head = 4"]),
        (TrainConfig, "--position rope --n_head 4 --n_embd 12", ["rope", "even", "3"]),
        (TrainConfig, "--head_bias", ["head_bias", "--no-tie_weights"]),
        (TrainConfig, "--lr 1e-4", ["min_lr = 0.0002", "lr = 0.0001"]),
        (TrainConfig, "--resume --overwrite", ["resume", "overwrite"]),
        (TrainConfig, "--max_iters none", ["max_iters", "epochs"]),
        (TrainConfig, "--mlp_ratio 0.001", ["mlp_ratio = 0.001", "n_embd = 192"]),
        (TrainConfig, "--n_embd 190 --head_bias --lr 1e-4", ["3 problems", "n_embd", "head_bias", "min_lr"]),
        (PrepareConfig, "text", ["--input"]),
        (PrepareConfig, "pydoc --input a.txt", ["--input", "pydoc"]),
        (PrepareConfig, "shakespeare --val_fraction 0.2", ["--val_fraction", "shakespeare"]),
        (PrepareConfig, "pydoc --name a/b", ["'a/b'", "folder name"]),
        (PrepareConfig, "pydoc --name ..", ["'..'", "folder name"]),
        (EvalConfig, "--dataset pydoc --test_data_path x.bin", ["dataset", "test_data_path"]),
    ],
)
def test_fields_that_do_not_fit_are_named_with_their_values(cls, words, said):
    with pytest.raises(UserError) as caught:
        parse(cls, words.split())
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (TrainConfig, "--n_embd 12 --n_head 3 --position rope"),
        (TrainConfig, "--n_embd 12 --n_head 4"),  # an odd head size is only rope's problem
        (TrainConfig, "--head_bias --no-tie_weights"),
        (TrainConfig, "--lr 1e-4 --schedule constant"),
        (TrainConfig, "--lr 1e-4 --min_lr 1e-4"),
        (PrepareConfig, "text --input a.txt b.txt --val_fraction 0.2 --name mine.v2"),
        (EvalConfig, "--test_data_path x.bin"),
    ],
)
def test_neighbours_of_those_are_allowed(cls, words):
    parse(cls, words.split())


def test_model_keeps_the_shape_and_nothing_else():
    shape = parse(TrainConfig, ["--n_layer", "3", "--position", "rope", "--lr", "0.1"]).model()
    assert type(shape) is config.ModelConfig
    assert (shape.n_layer, shape.position) == (3, "rope")


@pytest.mark.parametrize(
    ("words", "folder", "model"),
    [
        ("", "out/quickstart", None),
        ("--config quickstart", "out/quickstart", "out/quickstart"),
        ("--config somewhere/mine.toml", "out/mine", "out/mine"),
        ("--out_dir runs/a", "runs/a", "runs/a"),
        ("--config somewhere/mine.toml --out_dir runs/a", "runs/a", "runs/a"),
    ],
)
def test_train_writes_where_eval_and_infer_look(in_tmp, words, folder, model):
    """Without a word eval and infer look for the newest run (None) instead."""
    (in_tmp / "somewhere").mkdir()
    (in_tmp / "somewhere" / "mine.toml").write_text("n_layer = 2\n")
    assert config.run_dir(parse(TrainConfig, words.split())).as_posix() == folder
    for cls in (EvalConfig, InferConfig):
        assert config.model_path(parse(cls, words.split())) == model
        assert config.model_path(parse(cls, [*words.split(), "--model_path", "x"])) == "x"
