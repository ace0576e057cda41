"""Recipes and the command line: spellings, precedence, problems of recipes, --help, exit codes."""

import dataclasses
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
import warnings

import pytest
from processes import ROOT
from tqdm import tqdm

import flatgpt
from config import (
    COMMON,
    SCRIPT_CONFIGS,
    BenchConfig,
    EvalConfig,
    InferConfig,
    PlotConfig,
    PrepareConfig,
    TrainConfig,
    UserError,
)
from flatgpt.cli import cli, settings
from flatgpt.cli.foreign_flags import ALIASES
from flatgpt.cli.settings import parse


def recipe(folder, text, name="mine.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(cls, words) -> str:
    with pytest.raises(UserError) as caught:
        parse(cls, words)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# ways of writing a setting


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--n_layer", "3"], "n_layer", 3),
        (["--n-layer", "3"], "n_layer", 3),
        (["--n_layer=3"], "n_layer", 3),
        (["--n_layer", "2", "--n-layer", "3"], "n_layer", 3),
        (["--lr", "1"], "lr", 1.0),
        (["--dropout", "0.5", "--dropout", "0"], "dropout", 0.0),
        (["--no-bias", "--bias"], "bias", True),
        (["--no-bias"], "bias", False),
        (["--bias=false"], "bias", False),
        (["--bias", "false"], "bias", False),
        (["--no-tie-weights"], "tie_weights", False),
        (["--no-compile"], "compile", False),
        (["--compile", "--compile", "auto"], "compile", None),
        (["--attn_bias", "--attn_bias=as bias"], "attn_bias", None),
        (["--stride", "5", "--stride", "context_length"], "stride", None),
        (["--sample_prompt=--x=y"], "sample_prompt", ("--x=y",)),
        (["--sample_prompt="], "sample_prompt", ("",)),
        (["--sample_prompt", "a", "b"], "sample_prompt", ("a", "b")),
        (["--eval_intervel", "7"], "eval_interval", 7),
        (["--save_chkpt_epoch", "7"], "save_interval", 7),
        (["--resume", "--n_layer", "3"], "resume", "latest"),
        (["--resume", "out/a"], "resume", "out/a"),
        (["--load_checkpoint_path", "out/a", "--resume"], "resume", "out/a"),
        (["--wandb"], "wandb", "online"),
        (["--device", "cuda:12"], "device", "cuda:12"),
    ],
)
def test_spellings(words, key, value):
    """If the value is the default, the words set another one first."""
    found = getattr(parse(TrainConfig, words), key)
    assert found == value
    assert type(found) is type(value)


def test_positional_arguments_and_lists():
    found = parse(PrepareConfig, ["text", "--input", "a", "b", "--name", "n", "--input=c"])
    assert (found.source, found.input, found.name) == ("text", ("a", "b", "c"), "n")
    assert parse(BenchConfig, []).what == "train"
    found = parse(PlotConfig, ["a", "b", "--x", "time", "c"])
    assert (found.runs, found.x, found.svg) == (("a", "b", "c"), "time", False)
    assert parse(PlotConfig, ["--x=tokens", "a", "--svg", "b", "--watch"]).runs == ("a", "b")
    found = parse(InferConfig, ["--stop", "a", "b c", "-", "--stop=--", "--stop", "\n"])
    assert (found.stop, found.standard_input) == (("a", "b c", "--", "\n"), "-")
    assert parse(InferConfig, ["--prompt", "-"]).prompt == "-"


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("n_layer", '"2"', "a whole number"),
        ("n_layer", "2.0", "a whole number"),
        ("n_layer", "0", "at least 1"),
        ("lr", '"1e-3"', "a number"),
        ("lr", "inf", "a number"),
        ("lr", "1" + "0" * 400, "a number"),
        ("bias", "1", "true or false"),
        ("dataset", "3", "a string"),
        ("sample_prompt", "[3]", "a list of strings"),
        ("activation", '"gelu_tan"', "did you mean gelu_tanh?"),
        ("eval_intervel", "0", "at least 1"),
    ],
)
def test_wrong_value_in_a_recipe(tmp_path, key, value, allowed):
    path = recipe(tmp_path, f"{key} = {value}\n")
    answer = refusal(TrainConfig, ["--config", path])
    assert answer.startswith(path)
    assert f"{key} = " in answer
    assert allowed in answer


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("lr = 1", "lr", 1.0),
        ('stride = "none"', "stride", None),
        ('vocab_size = "the tokenizer\'s"', "vocab_size", None),
        ("eval_intervel = 7", "eval_interval", 7),
        ("bias = false", "bias", False),
        ('sample_prompt = "日本"', "sample_prompt", ("日本",)),
        ('sample_prompt = ["日本", ""]', "sample_prompt", ("日本", "")),
    ],
)
def test_right_value_in_a_recipe(tmp_path, text, key, value):
    found = getattr(parse(TrainConfig, ["--config", recipe(tmp_path, text)]), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("n_layers", "n_layer"), ("zzz", None), ("min-lrs", "min_lr")],
)
def test_unknown_key_offers_the_nearest(tmp_path, key, nearest):
    on_line = refusal(TrainConfig, [f"--{key}", "3"])
    assert f"--{key}: no such key" in on_line
    assert "problems:" not in on_line, "the value of an unknown key is not a second problem"
    in_file = refusal(TrainConfig, ["--config", recipe(tmp_path, f"{key} = 3")])
    assert f"mine.toml: {key}: no such key" in in_file
    for answer in (on_line, in_file):
        assert f"did you mean {nearest}?" in answer if nearest else "did you mean" not in answer


def test_all_problems_at_once(tmp_path):
    base = "dropout = 2\nnonsense = 1\n"
    recipe(tmp_path, base, "base.toml")
    path = recipe(tmp_path, 'base = "base"\nn_layer = 0\nn_haed = 3\n')
    answer = refusal(TrainConfig, ["--config", path, "--n_embd", "x", "--lrr", "3"])
    assert answer.startswith("6 problems")
    for part in ("dropout = 2", "nonsense", "n_layer = 0", "n_haed", "--n_embd = x", "--lrr"):
        assert part in answer


def test_recipe_serves_all_scripts(tmp_path):
    """A script ignores the keys of other scripts. A key of no script is an error in each."""
    path = recipe(tmp_path, 'n_layer = 2\nlr = 1e-3\ntemperature = 0.5\ndataset = "d"\n')
    assert parse(TrainConfig, ["--config", path]).n_layer == 2
    assert parse(InferConfig, ["--config", path]).temperature == 0.5
    assert parse(EvalConfig, ["--config", path]).dataset == "d"
    wrong = recipe(tmp_path, 'temprature = 0.5\nconfig = "quickstart"\n', "wrong.toml")
    for cls in (TrainConfig, InferConfig, EvalConfig):
        answer = refusal(cls, ["--config", wrong])
        assert "temprature: no such key" in answer
        assert "config: no such key" in answer


@pytest.mark.parametrize("content", [b"n_layer = \n", b"n_layer = 1\nn_layer = 2\n", b"# caf\xe9\n"])
def test_invalid_toml_names_the_file(tmp_path, content):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    answer = refusal(TrainConfig, ["--config", str(path)])
    assert str(path) in answer
    assert "not valid TOML" in answer


# ---------------------------------------------------------------------------------------------------------------------
# which recipe, and which level wins


def test_each_level_overrides_the_one_before(tmp_path):
    recipe(tmp_path, "n_layer = 2\nn_head = 2\nn_embd = 32\n", "base.toml")
    path = recipe(tmp_path, 'base = "base"\nn_head = 8\nn_embd = 64\n')
    found = parse(TrainConfig, ["--n_embd", "128", "--config", path])
    default = TrainConfig()
    assert (found.n_layer, found.n_head, found.n_embd, found.config) == (2, 8, 128, path)
    changed = {"n_layer", "n_head", "n_embd", "config"}
    for field in dataclasses.fields(TrainConfig):
        assert field.name in changed or getattr(found, field.name) == getattr(default, field.name)


def test_base_of_a_base_in_configs(tmp_path):
    recipe(tmp_path, 'base = "quickstart"\nn_layer = 2\nlr = 0.5\n', "a.toml")
    recipe(tmp_path, 'base = "a"\nn_layer = 3\n', "b.toml")
    found = parse(TrainConfig, ["--config", recipe(tmp_path, 'base = "b"\nmin_lr = 0.25\n')])
    assert (found.n_layer, found.lr, found.min_lr) == (3, 0.5, 0.25)


def test_circular_base_is_refused(tmp_path):
    path = recipe(tmp_path, 'base = "b"\n', "a.toml")
    recipe(tmp_path, 'base = "a"\n', "b.toml")
    assert "`base` refers to this recipe again" in refusal(TrainConfig, ["--config", path])


@pytest.mark.parametrize("words", ["--resume", "--overwrite", "--list", "--plan --gpus 8 --mfu 0.5"])
def test_recipe_text_leaves_out_settings_of_the_call(words):
    assert settings.recipe_text(parse(TrainConfig, words.split())) == settings.recipe_text(parse(TrainConfig, []))


def test_missing_recipe_names_the_nearest(tmp_path):
    for words in (["--config", "quickstrat"], ["--config", recipe(tmp_path, 'base = "quickstrat"')]):
        answer = refusal(TrainConfig, words)
        assert "quickstrat: no such file" in answer
        assert "did you mean quickstart?" in answer
    assert "no such file" in refusal(TrainConfig, ["--config", str(tmp_path)])


def test_bare_name_is_a_file_in_configs(in_tmp):
    recipe(in_tmp, "n_layer = 7\n", "quickstart.toml")
    recipe(in_tmp, "n_layer = 9\n", "mine")
    (in_tmp / "quickstart").mkdir()  # a run's folder, say
    assert parse(TrainConfig, ["--config", "quickstart"]).n_layer == 4
    assert parse(TrainConfig, ["--config", "quickstart.toml"]).n_layer == 7
    assert parse(TrainConfig, ["--config", "./quickstart.toml"]).n_layer == 7
    assert parse(TrainConfig, ["--config", "mine"]).n_layer == 9


@pytest.mark.parametrize("meta", ["[meta]\nlr = 1.0", "[meta]\nabout = 'x'\nlr = 1.0", "meta = 'lr'"])
def test_settings_after_meta_are_an_error(tmp_path, meta):
    """They would be read as keys of the table [meta]."""
    with pytest.raises(UserError, match=r"mine.toml: \[meta\] lr: the keys of \[meta\] are about, .* belong above it$"):
        parse(TrainConfig, ["--config", recipe(tmp_path, f"n_layer = 2\n{meta}\n", "mine.toml")])
    found = recipe(tmp_path, "n_layer = 2\n[meta]\nabout = 'x'\ntime = '1 s'", "base.toml")
    assert parse(TrainConfig, ["--config", found]).n_layer == 2


def test_recipes_returns_configs_and_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "RECIPES", tmp_path)
    recipe(tmp_path, "n_layer = 2\nlr = 1.0", "small.toml")
    recipe(tmp_path, 'base = "small"\ninit_from = "no/such/model"', "tuned.toml")
    recipe(tmp_path, "n_layer = 'two'\nn_lare = 2", "wrong.toml")
    recipe(tmp_path, "n_layer = ", "broken.toml")
    found = settings.recipes(TrainConfig, ["--lr", "2", "--config", "tuned", "--list"])
    assert sorted(found) == ["broken", "small", "tuned", "wrong"]
    assert (found["small"].n_layer, found["small"].lr, found["small"].config) == (2, 2.0, "small")
    assert (found["tuned"].n_layer, found["tuned"].init_from) == (2, "no/such/model")
    assert str(found["wrong"]).startswith("2 problems:\n  1. n_layer = 'two': a whole number is expected\n  2. n_lare")
    assert str(found["broken"]).startswith("not valid TOML (")


@pytest.mark.parametrize(
    ("base", "mine", "words", "max_iters", "epochs"),
    [
        ("", "", [], TrainConfig().max_iters, None),
        ("", "", ["--epochs", "2"], None, 2.0),
        ("", "epochs = 2", ["--max_iters", "5"], 5, None),
        ("epochs = 2", "max_iters = 5", [], 5, None),
        ("max_iters = 5", "epochs = 2", ["--max_iters", "7"], 7, None),
        ("", 'max_iters = "none"\nepochs = 2', [], None, 2.0),
    ],
)
def test_later_of_epochs_and_max_iters_wins(tmp_path, base, mine, words, max_iters, epochs):
    recipe(tmp_path, base, "base.toml")
    found = parse(TrainConfig, ["--config", recipe(tmp_path, f'base = "base"\n{mine}\n'), *words])
    assert (found.max_iters, found.epochs) == (max_iters, epochs)


@pytest.mark.parametrize(
    ("recipe_says", "words", "tracker", "wandb"),
    [
        ("", "", None, "disabled"),
        ("", "--tracker wandb", "wandb", "online"),
        ("", "--wandb offline", "wandb", "offline"),
        ("", "--tracker wandb --wandb offline", "wandb", "offline"),
        ("", "--report_to tensorboard", "tensorboard", "disabled"),
        ('wandb = "online"', "--tracker trackio", "trackio", "disabled"),
        ('wandb = "online"', "--tracker none", None, "disabled"),
        ('tracker = "trackio"', "--wandb", "wandb", "online"),
        ('tracker = "wandb"', "--wandb offline", "wandb", "offline"),
        ('tracker = "wandb"\nwandb = "offline"', "--wandb disabled", None, "disabled"),
        ('tracker = "tensorboard"', "--wandb_project mine", "tensorboard", "disabled"),
    ],
)
def test_later_of_tracker_and_wandb_wins(tmp_path, recipe_says, words, tracker, wandb):
    """Together they say where a run is logged. The run's own recipe gives the same."""
    found = parse(TrainConfig, ["--config", recipe(tmp_path, recipe_says), *words.split()])
    assert (found.tracker, found.wandb) == (tracker, wandb)
    again = parse(TrainConfig, ["--config", recipe(tmp_path, settings.recipe_text(found), "again.toml")])
    assert (again.tracker, again.wandb) == (tracker, wandb)


def test_epochs_and_max_iters_at_one_level_exclude_each_other(tmp_path):
    for words in (["--epochs", "2", "--max_iters", "5"], ["--config", recipe(tmp_path, "epochs = 2\nmax_iters = 5")]):
        assert "epochs and max_iters exclude each other" in refusal(TrainConfig, words)


# ---------------------------------------------------------------------------------------------------------------------
# --help, exit codes, streams


@pytest.mark.parametrize("cls", SCRIPT_CONFIGS)
@pytest.mark.parametrize("columns", [80, 200])
def test_help_has_each_flag_with_its_default_and_choices(monkeypatch, cls, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = cli.help_text(cls, "\nhow to use it\n", all_keys=True)
    assert text.startswith("how to use it\n")
    assert max(map(len, text.splitlines())) <= min(columns, 120)
    flat = " ".join(text.split())
    for field in dataclasses.fields(cls):
        meta = field.metadata
        assert (f"--no-{field.name} " if field.default is True else field.name) in flat
        assert meta["help"] in flat
        for said in (*meta.get("choices", ()), meta.get("section", "")):
            assert said in flat
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            assert f"[{field.default}]" in flat


@pytest.mark.parametrize("cls", SCRIPT_CONFIGS)
def test_short_help_fits_on_a_page(cls):
    """It has the common settings, under their headings, and says where the others are."""
    text, full = cli.help_text(cls, "usage"), cli.help_text(cls, "usage", all_keys=True)
    common = COMMON.get(cls.__name__, "").split()
    assert set(common) <= {field.name for field in dataclasses.fields(cls)}
    assert len(text.splitlines()) <= 64
    if common:
        assert len(re.findall(r"^  \S", text, re.MULTILINE)) == len(common) <= 20
        assert text.endswith(f"--help all: all {len(dataclasses.fields(cls))} settings.")
        assert set(text.splitlines()[:-1]) <= set(full.splitlines())
    else:
        assert text == full


@pytest.mark.parametrize(
    ("words", "said", "missing"),
    [
        ("--help", "--n_layer N", "--beta2"),
        ("-h", "--n_layer N", "--beta2"),
        ("--nonsense 3 --help", "--n_layer N", "--beta2"),
        ("--help all", "--beta2 X", "--eval_intervel"),
        ("--version", f"flatGPT {flatgpt.__version__}\n", "--n_layer"),
    ],
)
def test_help_and_version_exit_0(monkeypatch, capsys, words, said, missing):
    monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
    monkeypatch.setattr(cli.signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as end:
        cli.from_command_line(TrainConfig, "usage")
    assert end.value.code == 0
    printed = capsys.readouterr()
    assert said in printed.out
    assert missing not in printed.out
    assert printed.err == ""


def test_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == flatgpt.__version__


@pytest.mark.parametrize(
    ("rank", "every_rank", "error", "code", "said"),
    [
        (None, False, UserError("too hot"), 2, "error: too hot\n"),
        ("0", False, UserError("too hot"), 2, "error: too hot\n"),
        ("1", False, UserError("too hot"), 2, ""),
        ("1", True, UserError("too hot"), 2, "error: too hot\n"),
        (None, False, KeyboardInterrupt(), 130, ""),
    ],
)
def test_run_script_ends_with_an_exit_code(monkeypatch, capsys, rank, every_rank, error, code, said):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")

    def main(config):
        raise error

    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as end:
        cli.run_script(main, None, every_rank)
    assert end.value.code == code
    assert capsys.readouterr() == ("", said)
    assert bool(waited) is (code == 2 and not said)  # so that the reporting rank exits first


def test_run_script_returns_the_result_and_raises_bugs():
    assert cli.run_script(lambda config: config + 1, 1) == 2
    with pytest.raises(ZeroDivisionError):
        cli.run_script(lambda config: 1 / config, 0)
    with socket.socketpair()[0] as connection, pytest.raises(BrokenPipeError):  # its other end is closed
        cli.run_script(connection.send, b"text")


@pytest.mark.parametrize("module", ["dataclasses", "tomllib", "numpy", "torch"])
def test_interrupt_during_imports_is_silent(tmp_path, module):
    """Ctrl-C while a script starts ends it, without a traceback."""
    hook = "import os, signal, sys\nclass Hook:\n    def find_spec(self, name, *_):\n"
    hook += f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\nsys.meta_path.insert(0, Hook())"
    (tmp_path / "sitecustomize.py").write_text(hook)
    words = [sys.executable, ROOT / "infer.py", "--model_path", "none"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_closed_pipe_is_silent():
    """`train.py --help | head -1` must not end in a traceback."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from flatgpt.cli import cli\n"
    code += "cli.run_script(lambda config: [print('x' * 1000) for _ in range(1000)], None)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


@pytest.mark.parametrize(
    ("options", "then", "error"),
    [
        ([], "pass", "standard output: No space left on device"),
        (["-u"], "pass", "standard output: No space left on device"),
        ([], "raise UserError('mine')", "mine"),
        ([], "open('/none/mine')", "/none/mine: No such file or directory"),
        ([], "raise OSError(12, 'Cannot allocate memory')", "Cannot allocate memory"),
    ],
)
def test_full_standard_output_is_named_and_changes_no_other_error(options, then, error):
    """`train.py > log.txt` on a full disk ended with `error: a file: ...`, or with two errors and exit code 120."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from flatgpt.cli.cli import UserError, run_script\n"
    code += f"def main(config):\n print('x')\n {then}\nrun_script(main, None)"
    with open("/dev/full", "wb") as full:
        words, env = [sys.executable, *options, "-c", code], {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, env=env, text=True)
        assert (done.returncode, done.stderr) == (2, f"error: {error}\n")
        assert subprocess.run(words, stdout=full, stderr=full, env=env).returncode == 2


def test_closed_standard_output_is_no_traceback():
    words = f"'{sys.executable}' '{ROOT / 'plot.py'}' --help >&-"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_terminal_that_is_not_utf8(monkeypatch):
    """Characters that it cannot show become question marks."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    cli.run_script(print, "東 é")
    assert sys.stdout.buffer.getvalue() == b"? ?\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a notebook's knows no encoding
    cli.run_script(print, "東 é")
    assert sys.stdout.getvalue() == "東 é\n"


class FakeTerminal(io.StringIO):
    """A terminal, as far as a stream knows."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


FOREIGN = "\x1b]0;title\x07 \x1b[31m \x0e \x7f \x9b \r \u202e \u2067 x"
ESCAPED = r"\x1b]0;title\x07 \x1b[31m \x0e \x7f \x9b \x0d \u202e \u2067 x"
ORDINARY = "two\n\tlines 東京 👩\u200d🚀 e\u0301 שלום \u200f مرحبا"


@pytest.mark.parametrize("terminal", [True, False])
def test_terminal_shows_control_characters_as_escapes(terminal, monkeypatch):
    """Of generated text, messages, and names in errors. tqdm and rows in bold work as before; pipes get every byte."""
    streams = [(FakeTerminal if terminal else io.StringIO)() for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)
    shown, bar = ESCAPED if terminal else FOREIGN, "\r 50%\n\x1b[A\r      \r"

    def main(config):
        print(ORDINARY, end="")
        for character in FOREIGN:
            print(character, end="", flush=True)
        tqdm.write(f"\x1b[1m{ORDINARY}\x1b[0m", file=sys.stdout)
        for text in ("\r 50%", "\n\x1b[A", "\r      \r"):
            sys.stderr.write(text)
        sys.stderr.write(warnings.formatwarning(FOREIGN, UserWarning, "a.py", 1, line=""))
        raise UserError(f"{FOREIGN}: no such file")

    with pytest.raises(SystemExit):
        cli.run_script(main, None)
    assert streams[0].getvalue() == f"{ORDINARY}{shown}\x1b[1m{ORDINARY}\x1b[0m\n"
    assert streams[1].getvalue() == f"{bar}a.py:1: UserWarning: {shown}\nerror: {shown}: no such file\n"
    assert (sys.stdout, sys.stderr) == tuple(streams)


def test_terminal_shows_progress_bars(monkeypatch):
    """tqdm's movements of the cursor are no escapes: not one byte of bars, cleared bars and lines above them."""
    monkeypatch.setattr(sys, "stderr", FakeTerminal())

    def main(config):
        with tqdm(total=3, bar_format="{n} of 3") as bar, tqdm(total=2, bar_format="{n}", leave=False) as inner:
            tqdm.write("above", file=sys.stderr)
            for each in (bar, inner):
                each.update()
                each.refresh()

    cli.run_script(main, None)
    shown = sys.stderr.getvalue()
    assert "\\x" not in shown
    assert all(text in shown for text in ("\r1 of 3", "\x1b[A", "above\n", "\r      \r"))


def test_bytes_that_are_not_text_are_refused():
    """Python reads them as lone surrogates, with which config.toml could not be written hours later."""
    assert r"'x\xff' is not valid UTF-8" in refusal(TrainConfig, ["--out_dir", "x\udcff"])


# ---------------------------------------------------------------------------------------------------------------------
# words of other projects


FLAGS = (ROOT / "tests/support/foreign_flags.txt").read_text(encoding="utf-8")
PROJECTS = re.findall(r"^\[(.+): (\w+)\]\n([^[]+)", FLAGS, re.MULTILINE)


@pytest.mark.parametrize(("project", "script", "names"), PROJECTS, ids=[row[0] for row in PROJECTS])
def test_each_flag_of_another_project_is_ours_or_named(project, script, names):
    """It sets our key of the same meaning, or one line says what to do. None is unknown."""
    cls = {"train": TrainConfig, "infer": InferConfig}[script]
    own = {field.name for field in dataclasses.fields(cls)}
    every = {field.name for other in SCRIPT_CONFIGS for field in dataclasses.fields(other)}
    for name in names.split():
        if name in own or ALIASES.get(name) in own:
            continue
        for words in ([f"--{name}"], [f"--{name}=true"], [f"--{name.replace('_', '-')}", "3"]):
            flag, _, answer = refusal(cls, words).partition(": ")
            assert flag == words[0].partition("=")[0]
            assert re.search(r"use |leave it out|start ", answer), answer
            assert set(re.findall(r"--(\w+)", answer)) <= every | {"nproc_per_node"}, answer


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--block_size 64", "context_length", 64),
        ("--learning-rate=1e-3", "lr", 1e-3),
        ("--n_embed 64", "n_embd", 64),
        ("--gradient_accumulation_steps 4", "grad_accum_steps", 4),
        ("--compile=False", "compile", False),
        ("--device=cpu", "device", "cpu"),
        ("--out_dir=x", "out_dir", "x"),
        ("--no-gradient_checkpointing --gradient_checkpointing", "activation_checkpointing", True),
        ("--num_train_epochs 2", "epochs", 2.0),
        ("--init_from gpt2", "init_from", "gpt2"),
    ],
)
def test_same_meaning(words, key, value):
    assert getattr(parse(TrainConfig, words.split()), key) == value


def test_aliases_in_recipes(tmp_path):
    """They are keys of the scripts that have the setting; init_from is not nanoGPT's of sample.py."""
    path = recipe(tmp_path, 'block_size = 32\nlearning_rate = 1e-3\ninit_from = "gpt2"\ntemp = 0.3\n')
    found = parse(TrainConfig, ["--config", path])
    assert (found.context_length, found.lr, found.init_from) == (32, 1e-3, "gpt2")
    found = parse(InferConfig, ["--config", path])
    assert (found.temperature, found.model_path) == (0.3, None)
    assert parse(InferConfig, ["--init_from", "gpt2"]).model_path == "gpt2"


@pytest.mark.parametrize(
    ("cls", "words", "answer"),
    [
        (TrainConfig, ["lr=1e-3"], "lr: write --lr=1e-3"),
        (TrainConfig, ["n-layer=3"], "n-layer: write --n-layer=3"),
        (TrainConfig, ["-lr", "3"], "-lr: write --lr"),
        (TrainConfig, ["\u2013batch_size", "3"], "\u2013batch_size: write --batch_size"),
        (TrainConfig, ["shakespeare"], "shakespeare: write --config shakespeare"),
        (TrainConfig, ["config/mine.py"], "config/mine.py: write --config config/mine.py"),
        (TrainConfig, ["out/a b"], "out/a b: write --resume 'out/a b'"),
        (
            TrainConfig,
            ["--temperature", "1"],
            "--temperature: a setting of eval.py, infer.py, app.py, not",
        ),
        (TrainConfig, ["--temp", "1"], "--temp: a setting of eval.py, infer.py, app.py (temperature), not of this"),
        (TrainConfig, ["--init_from=resume"], "--init_from = resume: use --resume to continue a run"),
        (TrainConfig, ["--no-n_layer"], "--no-n_layer: no such key; write --n_layer=VALUE"),
        (EvalConfig, ["out/q"], "out/q: write --model_path out/q"),
        (InferConfig, ["out/q"], "out/q: write --model_path out/q"),
        (InferConfig, ["Once upon"], "Once upon: write --prompt 'Once upon'"),
        (PrepareConfig, ["./notes"], "./notes: write text --input ./notes"),
        (PrepareConfig, ["pydcs"], "source = pydcs: one of pydoc, "),
    ],
)
def test_word_that_is_not_expected(cls, words, answer):
    assert refusal(cls, words).startswith(answer)


def test_recipe_in_python_is_refused(tmp_path):
    answer = refusal(TrainConfig, ["--config", recipe(tmp_path, "learning_rate = 1e-3\n", "mine.py")])
    assert "recipes are TOML, not Python; in mine.toml, write settings as" in answer


# ---------------------------------------------------------------------------------------------------------------------
# paths in settings


def test_tilde_is_the_home_folder_except_in_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = recipe(tmp_path, 'data_dir = "~/d"\nsample_prompt = "~/x"\n', "home.toml")
    found = parse(TrainConfig, ["--config=~/home.toml", "--out_dir=~/o"])
    assert (found.config, found.data_dir, found.out_dir) == (path, f"{tmp_path}/d", f"{tmp_path}/o")
    assert found.sample_prompt == ("~/x",)
    assert parse(PrepareConfig, ["text", "--input=~/a", "--input=b~"]).input == (f"{tmp_path}/a", "b~")
    found = parse(InferConfig, ["--prompt", "~", "--stop", "~/"])
    assert (found.prompt, found.stop) == ("~", ("~/",))


def test_recipe_with_a_byte_order_mark(tmp_path):
    assert parse(TrainConfig, ["--config", recipe(tmp_path, "\ufeffn_layer = 2\n")]).n_layer == 2


def test_out_dir_of_a_runs_own_recipe_is_the_folder_that_it_is_in(tmp_path):
    """A run is found from each folder, and after its folder was moved."""
    run = tmp_path / "moved"
    run.mkdir()
    path = recipe(run, 'out_dir = "out/x"\n', "config.toml")
    assert parse(TrainConfig, ["--config", path]).out_dir == "out/x"
    (run / "ckpt").mkdir()
    assert parse(TrainConfig, ["--config", path]).out_dir == str(run)
    assert parse(TrainConfig, ["--config", path, "--out_dir", "y"]).out_dir == "y"
