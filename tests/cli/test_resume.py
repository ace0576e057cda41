"""Which checkpoint a run resumes from, whether its settings fit, and what is restored."""

import copy
import dataclasses
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from in_process import TINY, train_here
from run_files import same, saved_iters
from safetensors.torch import load_file

import train
from config import TrainConfig, UserError, run_dir
from flatgpt.cli import cli
from flatgpt.cli.settings import recipe_text
from flatgpt.interop.pretrained import initial_shape, run_settings
from flatgpt.runs import checkpoint
from flatgpt.training import resume

RUN, NEW = Path("out/quickstart"), Path("out/new")
SAME = ("--max_iters", 60, "--eval_interval", 30, "--lr", "5e-3")  # the settings of tiny_run


@pytest.fixture
def here(tiny_home, monkeypatch) -> Path:
    """The folder of tiny_run as the current one. Read only."""
    monkeypatch.chdir(tiny_home)
    return tiny_home


def find(how: str | Path | None, overwrite: bool = False, run: Path = RUN) -> int | None:
    """Return the iteration that a run would resume from."""
    with resume.RunLock(run) as lock:
        config = TrainConfig(resume=how and str(how), overwrite=overwrite, out_dir=str(run))
        found = resume.find_resume_checkpoint(lock, config)
    return found and found[1]["iter"]


@pytest.mark.parametrize(
    ("how", "settings", "found"),
    [
        ("latest", {}, 60),
        ("auto", {}, 60),
        (RUN, {}, 60),
        (RUN / "ckpt/last", {}, 60),
        (RUN / "ckpt/iter_000030", {}, 30),
        (RUN / "config.toml", {}, 60),
        (RUN / "ckpt/iter_000030/state.json", {}, 30),
        (RUN / "ckpt", {}, "there is no checkpoint; give a run's folder .* or a checkpoint"),
        (None, {"overwrite": True}, None),
        (None, {}, r"already contains a run \(at iter 60\): add --resume .* or --overwrite"),
        (None, {"run": NEW}, None),
        ("auto", {"run": NEW}, None),
        (RUN / "ckpt/iter_000030", {"run": NEW}, 30),
        ("latest", {"run": NEW}, "nothing to resume in out/new: no such folder; start without --resume"),
        ("out/none", {"run": NEW}, "nothing to resume in out/none: no such folder; give a run's folder"),
    ],
)
def test_forms_of_resume(here, how, settings, found):
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            find(how, **settings)
    else:
        assert find(how, **settings) == found
    assert not NEW.exists()


def test_folder_that_cannot_be_written_to_is_refused(in_tmp, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=rf"out_dir = {NEW}: {in_tmp} cannot be written to; choose another --out_dir"):
        find(None, run=NEW)


NO_RECIPE = b'{"format": 1, "iter": 60, "config": {}, "files": {}, "recipe": [1]}'


def test_damaged_checkpoint_is_named_and_the_one_before_it_used(run_copy, capsys):
    """Unless the damaged one was asked for. Nothing starts from the beginning over a damaged run."""
    newest, before = RUN / "ckpt/iter_000060", RUN / "ckpt/iter_000030"
    for content in (b"null", b"[" * 200_000, b'{"format": 1, "iter": 6, "config": {}, "files": []}', NO_RECIPE):
        (newest / "state.json").write_bytes(content)
        assert [find(how) for how in ("latest", "auto", RUN)] == [30, 30, 30]
        assert f"warning: {newest}/state.json is missing or damaged" in capsys.readouterr().out
    for how in ("latest", "auto", newest):
        (before / "train_state.pt").write_bytes(b"")
        with pytest.raises(UserError, match=r"every checkpoint is damaged; to start again, use --overwrite instead"):
            find(how)
    with pytest.raises(UserError, match="already contains a run"):
        find(None)


def put(mapping: dict, key: str, value) -> None:
    """Set the value at a dotted key; None removes it."""
    *path, last = key.split(".")
    for part in path:
        mapping = mapping[int(part) if part.isdecimal() else part]
    mapping.pop(last) if value is None else mapping.update({last: value})


WRONG = [  # file, key, value, and what is said of it
    ("model.safetensors", "transformer.ln_f.weight", torch.full((32,), torch.nan), " has values nan to nan"),
    ("train_state.pt", "optimizer.state.1.exp_avg", torch.full((32, 32), torch.inf), " has values inf to inf"),
    ("train_state.pt", "optimizer.state.1.exp_avg_sq", torch.full((32, 32), -1.0), " has values -1.0 to -1.0"),
    ("train_state.pt", "row", [1], ".iter is missing"),
    ("train_state.pt", "row.iter", 59, " = 59, but state.json has 60"),
    ("train_state.pt", "row.tokens", "many", " = 'many'"),
    ("train_state.pt", "scaler", {"scale": "x"}, ".scale = 'x'"),
    ("train_state.pt", "health.skipped", "x", " = 'x'"),
    ("train_state.pt", "since_best", None, " is missing"),
    ("train_state.pt", "best_loss", "low", " = 'low'"),
    ("train_state.pt", "optimizer", "adamw", " = 'adamw'"),
    ("state.json", "finished", None, " is missing"),
    ("state.json", "since_best", "x", " = 'x'"),
    ("state.json", "chosen.why", 3, " = 3"),
    ("state.json", "chosen.paths", "x", " = 'x'"),
    ("state.json", "data", [], ".manifest_sha256 is missing"),
    ("state.json", "config.max_iters", "x", " = 'x'"),
]


@pytest.mark.parametrize(("file", "key", "value", "said"), WRONG, ids=[f"{row[1]} {row[3]}" for row in WRONG])
def test_checkpoint_with_wrong_values_is_skipped_and_named(run_copy, capsys, file, key, value, said):
    """Its hashes are valid. Asked for by its path, it is an error that names a checkpoint that can be resumed."""
    newest = RUN / "ckpt/iter_000060"
    content = {"state.json": checkpoint.read_state(newest), "train_state.pt": checkpoint.load_train_state(newest)}
    content["model.safetensors"] = {"transformer.ln_f.weight": torch.ones(32)}
    if file == "model.safetensors":
        content[file][key] = value
    else:
        put(content[file], key, value)
    state, train_state, weights = content.values()
    checkpoint.save(RUN, state, weights, train_state, keep=9)
    capsys.readouterr()
    assert find("latest") == 30
    assert f"warning: {newest}/{file} cannot be resumed: {key}{said}" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"{newest}: it is damaged; .* --resume .*{RUN}/ckpt/iter_000030$"):
        find(newest)


@pytest.mark.parametrize("name", ["train_state.pt", "model.safetensors"])
def test_checkpoint_with_a_file_of_another_kind_is_skipped(run_copy, capsys, name):
    newest = RUN / "ckpt/iter_000060"
    (newest / name).write_text("a text")
    state = checkpoint.read_state(newest)
    state["files"][name] = checkpoint.fingerprint(newest / name)
    (newest / "state.json").write_bytes(checkpoint.state_file(state))
    assert find("auto") == 30
    assert f"warning: {newest}/{name} " in capsys.readouterr().out


def test_checkpoint_of_another_run_needs_a_folder_of_its_own(run_copy):
    Path("out/other/ckpt").mkdir(parents=True)
    (RUN / "ckpt/iter_000030").rename("out/other/ckpt/iter_000030")
    with pytest.raises(UserError, match=r"belongs to another run, and out/quickstart already contains a run"):
        find("out/other/ckpt/iter_000030")


def test_fork_of_a_run_begins_with_a_checkpoint_of_its_own(run_copy):
    words = ("--resume", RUN / "ckpt/iter_000030", "--out_dir", NEW, "--max_iters", 31)
    assert saved_iters(train_here(*words, "--sample_tokens", 0)) == [31, 30]


# ---------------------------------------------------------------------------------------------------------------------
# settings that a resume leaves out


def settings(words: str = "--resume") -> dict:
    """Return the settings of a start of train.py, with the run's folder as out_dir."""
    config = cli.parse(TrainConfig, shlex.split(words), initial_shape, run_settings)
    return dataclasses.asdict(config) | {"out_dir": str(run_dir(config))}


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("--resume", {}),
        ("--resume auto", {}),
        ("--resume --out_dir out/quickstart", {}),
        ("--resume out/quickstart", {}),
        ("--resume out/quickstart/ckpt/iter_000030", {}),
        ("--resume out/quickstart/ckpt/best", {}),
        ("--resume out/quickstart/metrics.csv", {}),
        ("--resume link", {}),
        ("--resume out/quickstart/ckpt/last --out_dir out/new", {"out_dir": "out/new"}),
        ("--resume backup/iter_000030 --out_dir out/new", {"out_dir": "out/new"}),
        ("--resume out/moved", {"out_dir": "out/moved"}),
        ("--resume out/moved/ckpt/last", {"out_dir": "out/moved"}),
        ("--resume out/moved --config mine.toml", {"out_dir": "out/mine"}),
        ("--resume --plan --gpus 8", {"plan": True, "gpus": 8}),
        ("--resume --lr 1e-3 --eval_interval 5", {"lr": 1e-3, "eval_interval": 5}),
        ("--resume --epochs 4", {"epochs": 4.0, "max_iters": None}),
        ("--resume --warmup_fraction 0.5", {"warmup_fraction": 0.5, "warmup_iters": None}),
        ("--resume --max_iters 90 --lr_decay_iters none", {"max_iters": 90, "lr_decay_iters": None}),
    ],
)
def test_what_a_resume_leaves_out_is_the_runs_own(run_copy, words, changed):
    """Wherever the run lies now, also where links are files."""
    shutil.copytree(RUN, "out/moved", symlinks=True)
    Path("out/moved/ckpt/last").unlink()
    Path("out/moved/ckpt/last").write_text("iter_000060")
    shutil.copytree(RUN / "ckpt/iter_000030", "backup/iter_000030")
    Path("link").symlink_to(RUN / "ckpt/iter_000030")
    Path("mine.toml").touch()
    own = {"max_iters": 60, "eval_interval": 30, "lr": 5e-3, "lr_decay_iters": 60, "n_embd": 32, "warmup_iters": 2}
    own |= {"dataset": "tiny", "device": "cpu", "vocab_size": 257, "sample_prompt": ("\n",), "epochs": None}
    expected = own | {"out_dir": "out/quickstart", "resume": words.split()[1] if " " in words else "latest"} | changed
    expected["resume"] = "latest" if expected["resume"].startswith("--") else expected["resume"]
    expected["out_dir"] = str(Path.cwd() / RUN) if "link" in words else expected["out_dir"]
    assert settings(words) | expected == settings(words)


def test_a_new_run_inherits_nothing(run_copy):
    for words in ("--out_dir out/none", "--config quickstart --out_dir out/none"):
        assert settings(f"--resume auto {words}") == settings(words) | {"resume": "auto"}
    for words in ("--resume --out_dir out/none", "--resume out/none --plan"):
        with pytest.raises(UserError, match="nothing to resume in out/none: no such folder"):
            settings(words)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "missing or damaged"),
        (b"", "missing or damaged"),
        (b"lr = [[", "missing or damaged"),
        (b"lr = 1e-3\xff", "missing or damaged"),
        (b"lr = -1.0", "lr = -1.0: more than 0 is expected"),
        (b"larning_rate = 1.0", "no such key"),
        (b"lr = 1e-6", "min_lr = 0.0002 is larger than lr = 1e-06"),
        (b"max_iters = 3\nepochs = 2", "epochs and max_iters exclude each other"),
    ],
)
def test_settings_of_a_run_without_a_valid_config_toml_are_those_of_its_checkpoint(run_copy, capsys, content, problem):
    """Nothing is lost: what the user has written is kept when the run goes on."""
    expected, file = settings(), RUN / "config.toml"
    file.unlink() if content is None else file.write_bytes(content)
    assert settings() == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: the settings in {file} are not used: ")
    assert problem in line


def test_edited_config_toml_counts_and_is_kept(run_copy, cli):
    file = RUN / "config.toml"
    file.write_text("# mine\n" + file.read_text().replace("lr = 0.005", "lr = 0.001").replace("= 60", "= 61"))
    text = file.read_text()
    done = cli("train", "--resume")
    assert "  lr = 0.001 (was 0.005)\n" in done.out
    assert saved_iters(RUN)[0] == 61
    assert [path.read_text() for path in RUN.glob("config.toml.old-*")] == [text]


def test_recipe_does_not_undo_what_was_typed_when_the_run_started(tiny_data):
    """Only what was edited in it since then counts, once; for a run of an earlier version all of it does."""
    recipe, base = Path("mine.toml"), 'base = "quickstart"\nsample_prompt = ["a", "b"]\npatience = 7\n'
    recipe.write_text(base + "lr = 3e-3\nepochs = 2\n")
    words = ("--config", recipe, "--lr", "1e-3", "--max_iters", 2, "--patience", "none", "--sample_tokens", 0)
    run, again = train_here(*words), "--config mine.toml --resume"
    found = settings(again)
    assert [found[key] for key in ("lr", "max_iters", "epochs", "patience", "n_embd")] == [1e-3, 2, None, None, 32]
    assert settings(f"{again} --lr 4e-3")["lr"] == 4e-3
    recipe.write_text(base + "lr = 3e-3\nmax_iters = 3\n")
    assert (settings(again)["lr"], settings(again)["max_iters"]) == (1e-3, 3)
    train.train(cli.parse(TrainConfig, f"{again} --max_iters 4".split(), initial_shape, run_settings))
    assert settings(again)["max_iters"] == settings(f"--resume {run}")["max_iters"] == 4
    train.train(cli.parse(TrainConfig, ["--max_iters", "5", "--resume", str(run)], initial_shape, run_settings))
    assert (settings(again)["lr"], settings(again)["max_iters"]) == (1e-3, 5)
    state = json.loads((run / "ckpt/last/state.json").read_text())
    del state["recipe"], state["sha256"]
    (run / "ckpt/last/state.json").write_text(json.dumps(state))
    assert (settings(again)["lr"], settings(again)["max_iters"], settings(again)["patience"]) == (3e-3, 3, 7)


# ---------------------------------------------------------------------------------------------------------------------
# settings that a resume names


def make_run(*words) -> train.TrainingRun:
    return train.build_run(cli.parse(TrainConfig, [*TINY, *map(str, (*SAME, *words))]))


def check(*words, change=lambda state: None) -> list[str]:
    """Return what a resume with these words prints. `change` modifies the saved state."""
    change(state := copy.deepcopy(checkpoint.read_state(RUN / "ckpt/last")))
    return resume.require_same_run(RUN / "ckpt/last", state, make_run(*words))


def test_differences_that_make_another_run_are_one_error(here):
    words = "--n_layer 3 --n_embd 64 --context_length 16 --seed 7 --batch_size 6 --no-bias --optimizer muon"
    words += " --vocab_size 300 --no-tie_weights --position rope"
    with pytest.raises(UserError) as caught:
        check(*words.split(), change=lambda state: state["data"].update(manifest_sha256="0" * 64))
    message = str(caught.value)
    assert message.startswith(f"{RUN}/ckpt/last cannot be resumed with these settings: ")
    assert message.split("settings: ")[1].split(". Restore the old values")[0].split("; ") == [
        "batch_size = 6 (was 4)",
        "bias = False (was True)",
        "context_length = 16 (was 32)",
        "n_embd = 64 (was 32)",
        "n_layer = 3 (was 2)",
        "optimizer = muon (was adamw)",
        "position = rope (was learned)",
        "seed = 7 (was 1337)",
        "stride = 16 (was 32)",
        "tie_weights = False (was True)",
        "vocab_size = 300 (was 257)",
        "the data: data/tiny is not the dataset that the run was trained on",
    ]


def test_differences_that_are_allowed_are_printed(here):
    words = "--min_lr 1e-4 --dropout 0.1 --batch_size 1 --grad_accum_steps 4 --weight_decay 0"
    words += " --out_dir out/elsewhere --attention manual --activation_checkpointing"
    assert check() == [f"resuming from {RUN}/ckpt/last"]
    start, *allowed = check(*words.split())
    assert start == f"resuming from {RUN}/ckpt/last with"
    assert {line.removeprefix("  ") for line in allowed} == {
        *("min_lr = 0.0001 (was 0.0002)", "dropout = 0.1 (was 0.0)", "weight_decay = 0.0 (was 0.1)"),
        *("batch_size = 1 (was 4)", "grad_accum_steps = 4 (was 1)"),
        *("attention = manual (was flash)", "activation_checkpointing = True (was False)"),
    }


@pytest.mark.parametrize(
    ("saved", "words", "tokens"),
    [
        ({"eval_batches": 3}, "--eval_batches 3", 3 * 4 * 32),  # by a version without eval_tokens
        ({"eval_batches": 3}, "--eval_tokens 384", 3 * 4 * 32),
        ({"eval_batches": 3}, "--eval_batches 4", "eval_tokens = 256 (was 384)"),  # 4 batches of 2 windows
        ({"eval_batches": 3}, "", "eval_tokens = None (was 384)"),
        ({"eval_batches": 3, "eval_tokens": 500}, "--eval_batches 3", 500),
        ({"eval_batches": 0, "eval_tokens": 500}, "--eval_tokens 500", 500),
        ({"eval_batches": 0, "eval_tokens": 500}, "--eval_tokens 501", "eval_tokens = 501 (was 500)"),
        ({"eval_batches": None, "eval_tokens": None}, "--eval_tokens 0", None),
        ({"eval_batches": 0}, "", None),
    ],
)
def test_resumed_run_keeps_its_validation_windows(here, tmp_path, saved, words, tokens):
    """Losses of other text are not comparable: best could move to a worse checkpoint."""
    state = copy.deepcopy(checkpoint.read_state(RUN / "ckpt/last"))
    del state["config"]["eval_tokens"]
    state["config"].update(saved)
    words = [*TINY, *map(str, SAME), "--batch_size", "2", "--grad_accum_steps", "2", *words.split()]
    run = train.build_run(cli.parse(TrainConfig, words), resumed=state)
    if isinstance(tokens, str):
        with pytest.raises(UserError, match=re.escape(f"settings: {tokens}. ")):
            resume.require_same_run(RUN / "ckpt/last", state, run)
        return
    assert run.config.eval_tokens == tokens
    assert not any("eval" in line for line in resume.require_same_run(RUN / "ckpt/last", state, run))
    (tmp_path / "config.toml").write_text(recipe_text(run.config))
    assert cli.parse(TrainConfig, ["--config", str(tmp_path / "config.toml")]).eval_tokens == tokens


def test_another_machine_is_noted(here):
    now = checkpoint.read_state(RUN / "ckpt/last")
    before = {"device": "NVIDIA T4", "cpu": "Another", "threads": 64, "ranks": 8, "torch": "2.11.0"}
    _, line = check(change=lambda state: state.update(before))
    differing = "; ".join(f"{key} = {now[key]} (was {value})" for key, value in before.items())
    assert line == f"note: not bit-identical, because of {differing}"


# ---------------------------------------------------------------------------------------------------------------------
# what is restored


@pytest.mark.parametrize(("iteration", "pending"), [(3, True), (5, False), (7, True)])
def test_interrupted_evaluation_is_pending(iteration, pending):
    """Earlier versions did not store it: they saved before each evaluation, at eval_interval and at the end."""
    state = {"config": {"eval_interval": 3, "max_iters": 7}, "wandb_id": None}
    progress = resume.Progress(iter=iteration, eval_pending=False)
    progress.load_state_dict({"best_loss": 2.5}, state)
    assert (progress.eval_pending, progress.best_loss) == (pending, 2.5)
    progress.load_state_dict({**progress.state_dict(), "eval_pending": not pending}, state)
    assert progress.eval_pending is not pending


def change_moment(state: dict, change) -> None:
    """Change the last moment of a state's second parameter."""
    moments = state["state"][1]
    name = list(moments)[-1]
    moments[name] = change(moments[name])


CHANGES = {
    "shape": lambda state: change_moment(state, lambda moment: moment[:-1].clone()),
    "dtype": lambda state: change_moment(state, lambda moment: moment.bfloat16()),
    "a number": lambda state: change_moment(state, lambda moment: moment.sum()),
    "no moment": lambda state: state["state"][1].popitem(),
    "no moments": lambda state: state["state"].pop(1),
    "too few": lambda state: state["param_groups"][-1]["params"].pop(),
    "swapped groups": lambda state: state["param_groups"].reverse(),
    "no groups": lambda state: state.pop("param_groups"),
}


@pytest.mark.parametrize("part", ["adamw alone", "adamw", "muon"])
def test_optimizer_state_of_another_model_is_refused(run_copy, tmp_path, part):
    """Every tensor is checked before anything is loaded."""
    optimizer = "adamw" if part == "adamw alone" else "muon"
    folder = train_here("--optimizer", optimizer, "--max_iters", 1, "--out_dir", NEW) / "ckpt/last"
    run, weights = make_run("--optimizer", optimizer), load_file(folder / "model.safetensors")
    state = {"iter": 1, "config": {}}
    before = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    for name, change in CHANGES.items():
        train_state = checkpoint.load_train_state(folder)
        change(train_state["optimizer"].get(part, train_state["optimizer"]))
        changed = checkpoint.save(tmp_path / name, state, weights, train_state, 1)
        with pytest.raises(UserError, match=r"train_state\.pt belongs to another model or optimizer"):
            resume.restore(changed, run)
    del train_state["optimizer"]
    with pytest.raises(UserError, match="it is not a train state"):
        resume.restore(checkpoint.save(tmp_path / "none", state, weights, train_state, 1), run)
    assert same((run.model.state_dict(), run.optimizer.state_dict()), before)
    resume.restore(folder, run)
    assert same(run.model.state_dict(), weights)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_named_setting_of_the_update_acts(tiny_data, optimizer):
    """The next update is another one, in every tensor that the setting concerns."""
    folder = train_here("--optimizer", optimizer, "--max_iters", 3, "--lr_decay_iters", 6, "--sample_tokens", 0)
    state = checkpoint.read_state(folder / "ckpt/last")

    def updated(words: str) -> dict:
        config = cli.parse(TrainConfig, ["--resume", *words.split()], initial_shape, run_settings)
        run = train.build_run(config, resumed=state)
        resume.restore(folder / "ckpt/last", run)
        train.train_step(run, 3)
        return {name: weight for name, weight in run.model.state_dict().items() if weight.dim() == 2}

    same_update, step = updated(""), updated("--max_iters 9 --eval_interval 2")
    assert same(same_update, step)
    adamw_only = {"--beta2 0.5", "--eps 1e-2"}
    for words in (
        *("--lr 1e-2", "--min_lr 1e-3", "--schedule linear", "--schedule wsd --decay_fraction 0.9"),
        *("--lr_decay_iters 9", "--warmup_iters 5", "--warmup_fraction 0.9", "--weight_decay 5", "--beta1 0.5"),
        *("--grad_clip 1e-5", "--dropout 0.5", "--dtype bfloat16", *adamw_only),
    ):
        found = updated(words)
        equal = {name for name, weight in found.items() if same(weight, same_update[name])}
        blocks = {name for name in found if ".h." in name} if optimizer == "muon" and words in adamw_only else set()
        assert equal <= blocks, words


def test_settings_of_the_call_replace_saved_ones(here):
    """torch's load_state_dict restores the old ones."""
    run = make_run("--weight_decay", "0.5", "--beta2", "0.9")
    resume.restore(RUN / "ckpt/iter_000030", run)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.5, 0.0]
    assert all(group["betas"] == (0.9, 0.9) for group in run.optimizer.param_groups)
    assert all(float(state["step"]) == 30 for state in run.optimizer.state.values())
    assert "train_state.pt" not in Path("/proc/self/maps").read_text(), "a file that may be deleted or truncated"
