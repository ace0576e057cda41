"""Settings: recipes load, defaults obey their own limits, and which combinations are allowed."""

import dataclasses
import tomllib

import pytest

import config
from config import SCRIPT_CONFIGS, BenchConfig, EvalConfig, ExportConfig, InferConfig, PrepareConfig, TrainConfig
from flatgpt.cli.settings import RECIPES, parse

NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.mark.parametrize("cls", [TrainConfig, BenchConfig, EvalConfig, InferConfig])
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_for_every_script(name, cls, in_tmp):
    weights = in_tmp / "out" / "gpt2_124m"  # the part of finetune_shakespeare's weights that is read
    weights.mkdir(parents=True)
    (weights / "model.safetensors").touch()
    (weights / "config.json").write_text(
        '{"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}'
    )
    loaded = parse(cls, ["--config", name])
    for key, value in tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8")).items():
        field = next((f for f in dataclasses.fields(cls) if f.name == key), None)
        if field and field.metadata.get("recipe", True):
            assert getattr(loaded, key) in (value, (value,)), key
        elif field:
            assert getattr(loaded, key) == field.default, f"{key} of a recipe is for training only"


def test_quickstart_names_every_setting_that_its_result_depends_on():
    """A change of a default in config.py does not change what train.py does without arguments."""
    named = tomllib.loads((RECIPES / "quickstart.toml").read_text(encoding="utf-8"))
    section, expected = "", set()
    for field in dataclasses.fields(TrainConfig):
        section = field.metadata.get("section", section)
        if section in ("Model", "Data", "Length", "Optimizer") and field.default is not None:
            expected.add(field.name)
    unused = {"attention", "activation_checkpointing", "data_dir", "verify_data", "on_nonfinite", "decay_fraction"}
    assert expected - unused - named.keys() == set()


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        ("", "quickstart"),
        ("--resume auto --lr 1e-3", "quickstart"),  # there is no run
        ("--epochs 2 --plan", "quickstart"),
        ("--config shakespeare", "shakespeare"),
        ("--config none", None),
        ("--dataset pydoc", None),
        ("--init_from gpt2", None),
    ],
)
def test_recipe_of_a_start_without_one(in_tmp, words, recipe):
    """What it says ranks below the command line; it is read as if named with --config."""
    found = parse(TrainConfig, words.split(), default_recipe="quickstart")
    expected = [*words.split(), *(["--config", recipe] if recipe else [])]
    assert (found, found.config) == (parse(TrainConfig, expected), recipe)
    assert config.run_dir(found).name == (recipe or "quickstart")
    assert found.optimizer == ("muon" if recipe == "quickstart" else "adamw")


@pytest.mark.parametrize("cls", SCRIPT_CONFIGS)
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


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (TrainConfig, "--n_embd 12 --n_head 4"),  # an odd head size is only rope's problem
        (TrainConfig, "--head_bias --no-tie_weights"),
        (TrainConfig, "--lr 1e-4 --schedule constant"),
        (PrepareConfig, "text --input a.txt b.txt --val_fraction 0.2 --name mine.v2"),
        (EvalConfig, "--test_data_path x.bin"),
        (InferConfig, "--greedy --temperature 0"),
        (InferConfig, "--greedy --repetition_penalty 1.2 --top_p 1"),
        (InferConfig, "--quantize int8 --dtype bfloat16"),
        (InferConfig, "--dtype float32 --quantize none"),
        (InferConfig, "- --json -"),
    ],
)
def test_fields_that_fit_are_allowed(cls, words):
    parse(cls, words.split())


@pytest.mark.parametrize(("words", "temperature"), [("", 0.8), ("--temperature 0.3", 0.3), ("--greedy", 0)])
def test_effective_temperature(words, temperature):
    assert parse(InferConfig, words.split()).effective_temperature == temperature


def test_model_is_the_shape_of_a_config():
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
def test_eval_and_infer_read_the_folder_that_train_writes(in_tmp, words, folder, model):
    """Without arguments, eval and infer use the newest run (None)."""
    (in_tmp / "somewhere").mkdir()
    (in_tmp / "somewhere" / "mine.toml").write_text("n_layer = 2\n")
    assert config.run_dir(parse(TrainConfig, words.split())).as_posix() == folder
    for cls in (ExportConfig, InferConfig):
        assert config.model_path(parse(cls, words.split())) == model
        assert config.model_path(parse(cls, [*words.split(), "--model_path", "x"])) == "x"
    assert config.model_paths(parse(EvalConfig, words.split())) == (model,)
    several = [*words.split(), "--model_path", "x", "y"]
    assert config.model_paths(parse(EvalConfig, several)) == ("x", "y")
