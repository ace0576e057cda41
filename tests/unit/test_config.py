"""What can be set: every recipe loads, defaults obey their own limits, fields that do not fit each other are named."""

import dataclasses
import tomllib

import pytest

import config
from config import BenchConfig, EvalConfig, ExportConfig, InferConfig, PrepareConfig, TrainConfig, UserError
from flatgpt.cli import cli
from flatgpt.cli.cli import RECIPES, parse

NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.mark.parametrize("cls", [TrainConfig, BenchConfig, EvalConfig, InferConfig])
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_for_every_script(name, cls, in_tmp):
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
            assert getattr(loaded, key) in (value, (value,)), key
        elif field:
            assert getattr(loaded, key) == field.default, f"{key} of a recipe is meant for training"


def test_quickstart_equals_the_defaults():
    """Both write to out/quickstart, so they have to be one run."""
    assert dataclasses.replace(parse(TrainConfig, ["--config", "quickstart"]), config=None) == TrainConfig()


@pytest.mark.parametrize("cls", cli.SCRIPT_CONFIGS)
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


@pytest.mark.parametrize("cls", cli.SCRIPT_CONFIGS)
def test_names_and_aliases_are_unique(cls):
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
        (InferConfig, "--greedy --temperature 0.5", ["greedy chooses the most likely token", "leave out temperature"]),
        (InferConfig, "--greedy --top_k 5", ["greedy", "leave out top_k"]),
        (
            InferConfig,
            "--temperature 0 --top_p 0.9",
            ["temperature = 0 chooses the most likely token", "leave out top_p"],
        ),
        (InferConfig, "--temperature 0 --min_p 0.1", ["temperature = 0", "leave out min_p"]),
        (InferConfig, "--greedy --top_k 5 --top_p 0.9 --min_p 0.1", ["3 problems", "top_k", "top_p", "min_p"]),
        (InferConfig, "--temperature -0.1", ["--temperature = -0.1", "at least 0"]),
        (InferConfig, "--top_k -1", ["--top_k = -1", "at least 0"]),
        (InferConfig, "--top_p 0", ["--top_p = 0", "more than 0"]),
        (InferConfig, "--top_p 1.5", ["--top_p = 1.5", "at most 1"]),
        (InferConfig, "--min_p 1.5", ["--min_p = 1.5", "at most 1"]),
        (InferConfig, "--min_p -0.5", ["--min_p = -0.5", "at least 0"]),
        (InferConfig, "--repetition_penalty 0", ["--repetition_penalty = 0", "more than 0"]),
        (InferConfig, "--stop= --stop x", ["stop = ''"]),
        (InferConfig, "--quantize int8 --dtype float32", ["quantize = int8", "leave out dtype"]),
        (InferConfig, "--quantize int4", ["--quantize = int4", "int8"]),
        (InferConfig, "- --interactive", ["- and --interactive exclude each other"]),
        (InferConfig, "--prompt p --prompts_file x --json y", ["--prompt and --prompts_file exclude each other"]),
        (InferConfig, "--interactive --json x", ["--interactive writes one text at a time"]),
        (InferConfig, "--interactive --num_samples 2", ["leave out json and num_samples"]),
        (InferConfig, "--num_samples 0", ["--num_samples = 0", "at least 1"]),
        (InferConfig, "--batch_size 0", ["--batch_size = 0", "at least 1"]),
        (InferConfig, "--max_new_tokens 0", ["--max_new_tokens = 0", "at least 1"]),
    ],
)
def test_contradicting_fields_are_named_with_their_values(cls, words, said):
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
        (InferConfig, "--greedy --temperature 0"),
        (InferConfig, "--greedy --repetition_penalty 1.2 --top_p 1"),
        (InferConfig, "--temperature 0.1 --top_k 5 --top_p 0.9 --min_p 0.1"),
        (InferConfig, "--quantize int8 --dtype bfloat16"),
        (InferConfig, "--quantize int8 --dtype float16"),
        (InferConfig, "--dtype float32 --quantize none"),
        (InferConfig, "- --json -"),
    ],
)
def test_fields_that_fit_are_allowed(cls, words):
    parse(cls, words.split())


@pytest.mark.parametrize(
    ("words", "heat"),
    [("", 0.8), ("--temperature 0.3", 0.3), ("--temperature 0", 0), ("--greedy", 0), ("--greedy --no-greedy", 0.8)],
)
def test_effective_temperature(words, heat):
    assert parse(InferConfig, words.split()).effective_temperature == heat


def test_stop_strings_add_up():
    assert parse(InferConfig, ["--stop", "a", "b c", "--stop=--", "--stop", "\n"]).stop == ("a", "b c", "--", "\n")
    assert InferConfig().stop == ()


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
    """Without a word eval and infer look for the newest run (None) instead."""
    (in_tmp / "somewhere").mkdir()
    (in_tmp / "somewhere" / "mine.toml").write_text("n_layer = 2\n")
    assert config.run_dir(parse(TrainConfig, words.split())).as_posix() == folder
    for cls in (ExportConfig, InferConfig):
        assert config.model_path(parse(cls, words.split())) == model
        assert config.model_path(parse(cls, [*words.split(), "--model_path", "x"])) == "x"
    assert config.model_paths(parse(EvalConfig, words.split())) == (model,)
    several = [*words.split(), "--model_path", "x", "y"]
    assert config.model_paths(parse(EvalConfig, several)) == ("x", "y")
