"""resume.py: which checkpoint a run goes on from, whether it may, and the exact way back."""

import copy
import csv
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from in_process import TINY, make_dataset, train_here
from processes import command
from safetensors.torch import load_file
from test_lock import QUIET, RUN, snapshot

import train
from config import TrainConfig, UserError
from flatgpt.cli import cli
from flatgpt.interop.pretrained import initial_shape
from flatgpt.runs import checkpoint
from flatgpt.runtime.stop import StopRequest
from flatgpt.training import resume

TIMES = ("step_ms", "tok_per_s", "mfu", "peak_mem_gb")


def make_config(*words) -> TrainConfig:
    return cli.parse(TrainConfig, [*TINY, *map(str, (*QUIET, *words))])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with data/tiny and the checkpoints 2, 4, 6 of a run in out/quickstart, to read from only."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_dataset(folder)
        train_here(*QUIET, "--eval_interval", 2, "--keep_checkpoints", 9)
    return folder


@pytest.fixture
def here(home, monkeypatch) -> Path:
    """That folder, as the current one."""
    monkeypatch.chdir(home)
    return home


# ---------------------------------------------------------------------------------------------------------------------
# where it goes on


def find(how: str | Path | None, overwrite: bool = False, run: Path = RUN):
    """The iteration that a run would go on from."""
    with resume.RunLock(run) as claim:
        start = resume.find_resume_checkpoint(claim, None if how is None else str(how), overwrite)
    return start and start[1]["iter"]


@pytest.fixture
def damaged(home, tmp_path, monkeypatch) -> Path:
    """A copy of it whose newest checkpoint is damaged, in the current folder."""
    shutil.copytree(home, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (RUN / "ckpt/iter_000006/model.safetensors").write_bytes(b"damaged")
    return tmp_path


def test_what_each_form_of_resume_takes(here):
    assert find("latest") == find("auto") == find(RUN) == find(RUN / "ckpt/last") == 6
    assert find(RUN / "ckpt/iter_000002") == 2
    assert find(None, overwrite=True) is None
    with pytest.raises(UserError, match=r"already holds a run \(at iter 6\): add --resume .* or --overwrite"):
        find(None)
    new = Path("out/new")
    assert find(None, run=new) is find("auto", run=new) is None
    assert find(RUN / "ckpt/iter_000004", run=new) == find(RUN, run=new) - 2 == 4
    with pytest.raises(
        UserError, match=r"nothing to resume in out/new: there is no checkpoint; start without --resume"
    ):
        find("latest", run=new)
    with pytest.raises(UserError, match=r"resume = out/none: out/none/state.json is missing or damaged"):
        find("out/none", run=new)
    assert not new.exists()


def test_damaged_checkpoint_is_passed_over_unless_it_was_named(damaged, capsys):
    for how in ("latest", "auto", RUN):
        assert find(how) == 4, how
        assert "iter_000006/model.safetensors is damaged" in capsys.readouterr().out
    for path in (RUN / "ckpt/iter_000006", RUN / "ckpt/last"):
        with pytest.raises(UserError, match=f"^resume = {path}: .*model.safetensors is damaged"):
            find(path)
    for file in RUN.glob("ckpt/iter_*/train_state.pt"):
        file.write_bytes(b"")
    before = snapshot(RUN / "ckpt")
    for how in ("latest", "auto"):  # auto must not begin anew where there is something to mourn
        with pytest.raises(UserError, match="every checkpoint there is damaged; add --overwrite instead"):
            find(how)
    with pytest.raises(UserError, match="this run has no usable checkpoint"):
        find(RUN, run=Path("out/new"))
    assert snapshot(RUN / "ckpt") == before


def test_checkpoint_of_another_run_needs_a_folder_of_its_own(damaged):
    (Path("out/other/ckpt")).mkdir(parents=True)
    (RUN / "ckpt/iter_000004").rename("out/other/ckpt/iter_000004")
    with pytest.raises(UserError, match=r"is of another run, and out/quickstart holds checkpoints of its own"):
        find("out/other/ckpt/iter_000004")


def test_damaged_state_is_named_too_and_nothing_begins_anew_over_it(tiny_data, capsys):
    """It was passed over in silence: with a single checkpoint `auto` began from nothing."""
    run = train_here(*QUIET)
    for content in ("[]", "", "null", "[" * 200_000, '{"format": 1, "iter": 6, "config": {}, "files": []}'):
        (run / "ckpt/iter_000006/state.json").write_text(content)
        found = find("auto")
        assert found == 3
        assert f"warning: {RUN}/ckpt/iter_000006/state.json is missing or damaged; trying" in capsys.readouterr().out
    shutil.rmtree(run / "ckpt/iter_000003")
    for how in ("auto", "latest"):
        with pytest.raises(UserError, match="every checkpoint there is damaged"):
            find(how)
    with pytest.raises(UserError, match="already holds a run"):
        find(None)
    assert (run / "ckpt/iter_000006").is_dir()


# ---------------------------------------------------------------------------------------------------------------------
# whether it may


def check(*words, change=lambda state: None) -> list[str]:
    """What a resuming with these words says; `change` makes something else of the state first."""
    folder = RUN / "ckpt/iter_000006"
    change(state := copy.deepcopy(checkpoint.read_state(folder)))
    return resume.require_same_run(folder, state, train.build_run(make_config(*words)))


def test_nothing_is_said_where_nothing_differs(here):
    assert check("--eval_interval", 2, "--keep_checkpoints", 9) == [f"resuming from {RUN}/ckpt/iter_000006"]


def test_differences_that_make_another_run_are_one_error(here):
    words = "--n_layer 3 --n_embd 64 --context_length 16 --seed 7 --batch_size 6 --no-bias --optimizer muon"

    def change(state):
        state["tokenizer"]["name"] = "gpt2"
        state["data"]["manifest_sha256"] = "0" * 64

    with pytest.raises(UserError) as caught:
        check(*words.split(), change=change)
    message = str(caught.value)
    assert message.startswith(f"{RUN}/ckpt/iter_000006 cannot go on with these settings: ")
    assert message.endswith("Set them back, or start a run of its own with another --out_dir")
    differing = message.split("settings: ")[1].split(". Set")[0].split("; ")
    assert differing == [
        "batch_size = 6 (was 4)",
        "bias = False (was True)",
        "context_length = 16 (was 32)",
        "n_embd = 64 (was 32)",
        "n_layer = 3 (was 2)",
        "optimizer = muon (was adamw)",
        "seed = 7 (was 1337)",
        "stride = 16 (was 32)",
        "tokenizer = byte (was gpt2)",
        "the data: data/tiny is not the dataset it was trained on",
    ]


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        ("--seed 7", "seed = 7 (was 1337)"),
        ("--grad_accum_steps 2", "grad_accum_steps = 2 (was 1)"),
        ("--batch_size 2 --grad_accum_steps 3", "batch_size = 2 (was 4); grad_accum_steps = 3 (was 1)"),
        ("--stride 16", "stride = 16 (was 32)"),
        ("--vocab_size 300", "vocab_size = 300 (was 257)"),
        ("--no-tie_weights", "tie_weights = False (was True)"),
        ("--position rope", "position = rope (was learned)"),
    ],
)
def test_each_alone_is_an_error(here, words, difference):
    with pytest.raises(UserError) as caught:
        check(*words.split())
    assert f"with these settings: {difference}. Set" in str(caught.value)


def test_same_ranks_under_another_name_and_other_ranks_under_the_same_are_another_tokenizer(here):
    for key in ("name", "ranks_sha256"):
        with pytest.raises(UserError, match="tokenizer = byte"):
            check(change=lambda state, key=key: state["tokenizer"].update({key: "other"}))


def test_differences_that_are_allowed_are_printed(here):
    words = (
        "--lr 1e-3 --min_lr 1e-4 --dropout 0.1 --batch_size 1 --grad_accum_steps 4 --weight_decay 0 --eval_interval 2"
    )
    words += " --keep_checkpoints 9 --out_dir out/elsewhere --attention manual --activation_checkpointing"
    (line,) = check(*words.split())
    start, _, allowed = line.partition(", with ")
    assert start == f"resuming from {RUN}/ckpt/iter_000006"
    assert set(allowed.split("; ")) == {
        *("lr = 0.001 (was 0.002)", "min_lr = 0.0001 (was 0.0002)", "dropout = 0.1 (was 0.0)"),
        *("batch_size = 1 (was 4)", "grad_accum_steps = 4 (was 1)", "weight_decay = 0.0 (was 0.1)"),
        *("attention = manual (was flash)", "activation_checkpointing = True (was False)"),
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [("threads", 64), ("ranks", 8), ("torch", "2.11.0"), ("cpu", "Another"), ("device", "NVIDIA T4")],
)
def test_another_machine_is_noted(here, key, value):
    lines = check(change=lambda state: state.update({key: value}))
    now = checkpoint.read_state(RUN / "ckpt/last")[key]
    assert lines[1:] == [f"note: equal to rounding, not to the bit: {key} = {now} (was {value})"]


def test_one_prompt_as_a_text_is_a_list_of_one(here):
    """Runs of earlier versions have it so."""

    def change(state):
        state["config"]["sample_prompt"] = "\n"

    plain = ("--eval_interval", 2, "--keep_checkpoints", 9)
    assert check(*plain, change=change) == [f"resuming from {RUN}/ckpt/iter_000006"]
    (line,) = check(*plain, "--sample_prompt", "a", change=change)
    assert line.endswith(r"with sample_prompt = ['a'] (was ['\n'])")


def test_another_machine_is_noted_in_a_run(tiny_data, capsys):
    train_here(*QUIET, "--max_iters", 3)
    path = RUN / "ckpt/iter_000003/state.json"
    state = json.loads(path.read_text()) | {"threads": 64, "ranks": 8}
    state.pop("sha256", None)  # its own
    path.write_text(json.dumps(state))
    train_here(*QUIET, "--max_iters", 3, "--resume")
    expected = (
        f"note: equal to rounding, not to the bit: threads = {torch.get_num_threads()} (was 64); ranks = 1 (was 8)"
    )
    assert expected in capsys.readouterr().out.splitlines()


def rows(run: Path) -> list[dict]:
    """metrics.csv, times left out."""
    with open(run / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def test_schedule_stays_when_the_run_grows_and_moves_when_it_is_told(tiny_data, capsys):
    train_here(*QUIET, "--max_iters", 4)
    capsys.readouterr()
    train_here(*QUIET, "--max_iters", 6, "--resume")
    printed = capsys.readouterr().out.splitlines()
    assert f"resuming from {RUN}/ckpt/iter_000004, with max_iters = 6 (was 4)" in printed
    assert "note: the schedule stays: lr_decay_iters = 4, as the run began" in printed
    assert [float(row["lr"]) for row in rows(RUN)[-2:]] == [2e-4, 2e-4]
    train_here(*QUIET, "--max_iters", 8, "--lr_decay_iters", 8, "--resume")
    printed = capsys.readouterr().out
    assert "with max_iters = 8 (was 6); lr_decay_iters = 8 (was 4)" in printed
    assert "schedule stays" not in printed
    assert [float(row["lr"]) > 2e-4 for row in rows(RUN)[-4:]] == [False, False, True, True]
    assert checkpoint.read_state(RUN / "ckpt/last")["config"]["lr_decay_iters"] == 8


def test_half_written_checkpoint_is_removed_at_the_next_start(tiny_data):
    train_here(*QUIET, "--max_iters", 3)
    (RUN / "ckpt/.iter_000009.tmp").mkdir()
    (RUN / "ckpt/.iter_000009.tmp/model.safetensors").write_bytes(b"half")
    train_here(*QUIET, "--max_iters", 4, "--resume")
    assert sorted(path.name for path in (RUN / "ckpt").iterdir()) == ["best", "iter_000003", "iter_000004", "last"]


def test_run_that_is_past_its_end_makes_no_update_and_says_so(tiny_data, capsys):
    before = rows(train_here(*QUIET, "--max_iters", 4))
    capsys.readouterr()
    train_here(*QUIET, "--max_iters", 3, "--resume")
    assert "\nnote: it is past max_iters = 3 already: nothing is left to train\n" in capsys.readouterr().out
    assert rows(RUN) == before


# ---------------------------------------------------------------------------------------------------------------------
# the way back


@pytest.fixture(scope="module")
def trained(home) -> dict:
    """{optimizer: (run, checkpoint)}; the run is another one, of one update, to lose."""
    both = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name in ("adamw", "muon"):
            words = ("--optimizer", name, "--max_iters", 3, "--out_dir", home / name)
            folder = train_here(*QUIET, *words) / "ckpt/iter_000003"
            train.train_step(run := train.build_run(make_config(*words)), 0)
            both[name] = run, folder
    return both


def saved_part(state: dict, part: str) -> dict:
    """Muon's, or AdamW's beside it or alone."""
    return state["optimizer"].get(part, state["optimizer"])


def shape(part: dict, moment: str) -> None:
    part["state"][1][moment] = part["state"][1][moment][:-1].clone()


def missing(part: dict, moment: str) -> None:
    del part["state"][1][moment]


def dtype(part: dict, moment: str) -> None:
    part["state"][1][moment] = part["state"][1][moment].bfloat16()


def no_tensor(part: dict, moment: str) -> None:
    part["state"][1][moment] = 0.0


def entry(part: dict, moment: str) -> None:
    del part["state"][1]


def all_entries(part: dict, moment: str) -> None:
    part["state"].clear()


def no_state(part: dict, moment: str) -> None:
    del part["state"]


def too_few(part: dict, moment: str) -> None:
    del part["state"][part["param_groups"][-1]["params"].pop()]


def swapped(part: dict, moment: str) -> None:
    """Groups that change places."""
    part["param_groups"].reverse()


def no_groups(part: dict, moment: str) -> None:
    del part["param_groups"]


def refused(run: train.TrainingRun, folder: Path, tmp_path: Path, change) -> str:
    """The one error for a changed train_state.pt, whose hash is right. Nothing of it is loaded."""
    train_state = checkpoint.load_train_state(folder)
    change(train_state)
    state = checkpoint.read_state(folder)
    weights = {k: t + 1 for k, t in load_file(folder / "model.safetensors").items()}
    changed = checkpoint.save(tmp_path, {k: v for k, v in state.items() if k != "files"}, weights, train_state, 1)
    checkpoint.verify(changed)
    before = copy.deepcopy(everything(run))
    with pytest.raises(UserError) as caught:
        resume.restore(changed, run)
    assert alike(everything(run), before)
    message = str(caught.value)
    assert message.startswith(f"{changed}/train_state.pt is ")
    assert "\n" not in message
    return message.removeprefix(f"{changed}/train_state.pt is ")


def everything(run: train.TrainingRun) -> list[dict]:
    return [
        run.model.state_dict(),
        run.optimizer.state_dict(),
        run.scaler.state_dict(),
        run.nonfinite_guard.state_dict(),
    ]


def alike(a, b) -> bool:
    """The same values to the bit, in dicts and lists."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def names_of(run: train.TrainingRun, part: str) -> list[str]:
    """The parameters of Muon, or of AdamW beside it or alone, by their number there."""
    names = {p: name for name, p in run.model.named_parameters()}
    return [names[p] for g in getattr(run.optimizer, part, run.optimizer).param_groups for p in g["params"]]


MOMENTS = [("adamw", "exp_avg"), ("adamw", "exp_avg_sq"), ("muon", "momentum_buffer")]
CASES = [
    *((part, moment, change) for part, moment in MOMENTS for change in (missing, dtype, no_tensor, shape)),
    *(("adamw", "step", change) for change in (missing, dtype, no_tensor)),
    *((part, "", change) for part in ("adamw", "muon") for change in (entry, all_entries, no_state)),
    *((part, "", change) for part in ("adamw", "muon") for change in (too_few, swapped, no_groups)),
]
CASES = [(case[0], *case) for case in CASES] + [("muon", "adamw", "exp_avg", missing)]


@pytest.mark.parametrize(("optimizer", "part", "moment", "change"), CASES)
def test_optimizer_that_does_not_fit_is_refused_and_nothing_is_loaded(
    here, trained, tmp_path, optimizer, part, moment, change
):
    run, folder = trained[optimizer]
    message = refused(run, folder, tmp_path, lambda state: change(saved_part(state, part), moment))
    assert message.startswith("of another model or optimizer: ")
    if change in (too_few, no_groups, swapped):
        assert "its groups have [" in message
    else:
        index = 0 if change in (all_entries, no_state) else 1
        assert f"{moment} of {names_of(run, part)[index]} is " in message


@pytest.mark.parametrize(("optimizer", "another"), [("adamw", "muon"), ("muon", "adamw")])
def test_train_state_without_an_optimizer_or_with_another_is_refused(here, trained, tmp_path, optimizer, another):
    run, folder = trained[optimizer]
    message = refused(run, folder, tmp_path, lambda state: state.pop("optimizer"))
    assert message == "not loaded: it is no train state"
    other = trained[another][0].optimizer.state_dict()
    message = refused(run, folder, tmp_path, lambda state: state.update(optimizer=other))
    assert message.startswith("of another model or optimizer: its groups have [")


def test_many_differences_are_three_and_a_number(here, trained, tmp_path):
    run, folder = trained["muon"]

    def change(state):
        for entries in saved_part(state, "adamw")["state"].values():
            entries["exp_avg"] = entries["exp_avg"].double()

    message = refused(run, folder, tmp_path, change)
    assert message.count("exp_avg of ") == 3
    assert message.endswith(f", and {len(names_of(run, 'adamw')) - 3} more")


def test_checkpoint_before_any_update_was_applied_has_no_moments(here, tmp_path):
    """All were left out, so Muon has none yet: that is how it goes on."""
    config = make_config("--optimizer", "muon")
    run = train.build_run(config)
    run.nonfinite_guard.skipped += 3
    row = {"iter": 3, "tokens": 384, "epoch": 0.1}
    saved = resume.checkpoint_state(run, resume.Progress(iter=3, row=row))
    folder = checkpoint.save(tmp_path, {"iter": 3, "config": {}}, saved["weights"], saved["train_state"], 1)
    again = train.build_run(config)
    assert resume.restore(folder, again)["row"] == row
    assert int(again.nonfinite_guard.skipped) == 3
    saved["train_state"]["row"] = {"iter": 4}
    folder = checkpoint.save(tmp_path, {"iter": 4, "config": {}}, saved["weights"], saved["train_state"], 1)
    with pytest.raises(UserError, match=r"momentum_buffer of transformer\.h\.0\.[a-z_.]+ is missing"):
        resume.restore(folder, train.build_run(config))


# ---------------------------------------------------------------------------------------------------------------------
# to the bit

ODD = (*QUIET, "--log_interval", 3, "--eval_interval", 4, "--save_interval", 5, "--max_iters", 14, "--dropout", 0.2)
ODD += ("--grad_accum_steps", 2, "--batch_size", 2, "--eval_batches", 3, "--lr", "2e-2", "--keep_checkpoints", 3)


def end(run: Path) -> dict:
    """All that the end of a run is, times left out."""
    state = checkpoint.load_train_state(run / "ckpt/last")
    state["row"] = {k: v for k, v in state["row"].items() if k not in TIMES}
    links = {name: os.readlink(run / "ckpt" / name) for name in ("last", "best")}
    return {"rows": rows(run), "weights": load_file(run / "ckpt/last/model.safetensors"), "links": links, **state}


def assert_same_end(run: Path, whole: dict) -> None:
    there = end(run)
    assert there["rows"] == whole["rows"]
    assert there.keys() == whole.keys()
    assert [key for key in whole if not alike(there[key], whole[key])] == []


class Impatient(StopRequest):
    """Is asked to stop at every so many looks, wherever that is."""

    looks = 10**9

    def __init__(self, *words):
        super().__init__(*words)
        self.seen = itertools.count(1)

    def reason(self) -> int:
        """SIGTERM from then on, as the signal would be noted."""
        return signal.SIGTERM if next(self.seen) >= self.looks else 0


@pytest.mark.parametrize(("dtype", "looks", "more"), [("float32", 4, ()), ("float16", 7, ("--save_minutes", 1e-9))])
def test_run_that_was_stopped_anywhere_ends_as_the_undisturbed_one(tiny_data, monkeypatch, dtype, looks, more):
    words, real, stops = (*ODD, "--dtype", dtype), train.evaluate, set()
    whole = end(train_here(*words, "--out_dir", "out/whole"))
    assert [row["iter"] for row in whole["rows"]] == [str(i) for i in (0, 3, 4, 5, 6, 8, 9, 10, 12, 14)]
    best = min((float(row["val_loss"]), row["iter"]) for row in whole["rows"][1:] if row["val_loss"])
    assert whole["links"] == {"last": "iter_000014", "best": f"iter_{int(best[1]):06d}"}

    def evaluate(run, asked):
        loss = real(run, asked)
        stops.update({"in an evaluation"} if loss is None else ())
        return loss

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "StopRequest", Impatient)
    for turn in range(30):
        Impatient.looks = looks + turn % 2
        try:
            run = train_here(*words, *more, "--resume", "auto")
            break
        except SystemExit:
            at = checkpoint.read_state(RUN / "ckpt/last")["iter"]
            stops.add("between rows" if all(at % n for n in (3, 4, 5)) else "at a row")
    assert_same_end(run, whole)
    assert stops == {"in an evaluation", "between rows", "at a row"}


def test_run_that_saves_all_the_time_ends_as_the_undisturbed_one(tiny_data):
    whole = end(train_here(*ODD, "--out_dir", "out/whole"))
    run = train_here(*ODD, "--save_minutes", 1e-9)
    assert [folder.name for folder in checkpoint.checkpoints(run)][1:3] == ["iter_000013", "iter_000012"]
    assert_same_end(run, whole)


# ---------------------------------------------------------------------------------------------------------------------
# secrets

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "76543210",
    "HF_TOKEN": "hf_" + "Quetzalcoatlus" * 2,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCY",
}


@pytest.mark.slow
def test_keys_of_the_environment_are_nowhere(tiny_data):
    done = command("train", *TINY, "--wandb", "offline", cwd=tiny_data, env=SECRETS)
    assert done.returncode == 0, done.stderr
    assert list(RUN.glob("wandb/offline-run-*/*.wandb")), "it is installed, and has written there"
    contents = {str(path): path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    contents |= {"standard output": done.stdout.encode(), "standard error": done.stderr.encode()}
    assert len(contents) > 8
    for name, value in SECRETS.items():
        assert [path for path, content in contents.items() if value.encode() in content] == [], name


def test_key_in_a_setting_is_masked_in_the_command_and_kept_as_a_setting(tiny_data, monkeypatch):
    """config.toml and the checkpoint's config have to make the same run again: what a user sets is there, as he set it.
    The command line is for people to read, and may have got the key from a shell's variable."""
    value = SECRETS["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", value)
    monkeypatch.setattr(
        sys, "argv", ["/home/me/train.py", "--sample_prompt", value, f"--data_dir=x{value}y", "--lr", "1"]
    )
    run = train_here("--max_iters", 1, "--sample_prompt", value)
    state = checkpoint.read_state(run / "ckpt/last")
    masked = "$AWS_SECRET_ACCESS_KEY"
    assert state["command"] == ["train.py", "--sample_prompt", masked, f"--data_dir=x{masked}y", "--lr", "1"]
    assert state["config"]["sample_prompt"] == [value]
    assert cli.parse(TrainConfig, ["--config", str(run / "config.toml")]).sample_prompt == (value,)
    found = [path.name for path in run.rglob("*") if path.is_file() and value.encode() in path.read_bytes()]
    assert sorted(set(found)) == ["config.toml", "samples.txt", "state.json"]


def test_resumed_run_keeps_its_shape_whatever_becomes_of_init_from(tiny_data):
    """The same command again, as Slurm's script does it, when the folder it names has gone, or holds another model."""

    def again(*more) -> list[str]:
        shape = "--n_layer 2 --n_head 2 --n_embd 32 --context_length 32 "
        words = [*" ".join(TINY).replace(shape, "").split(), "--init_from", "out/first", "--max_iters"]
        train.train(cli.parse(TrainConfig, [*words, *map(str, more)], initial_shape))
        return [row["iter"] for row in rows(RUN)]

    source = train_here("--out_dir", "out/first")
    assert again(3, "--resume", "auto") == ["0", "1", "2", "3"]
    source.rename("out/gone")
    assert again(4, "--resume", "auto") == ["0", "1", "2", "3", "4"]
    train_here("--n_layer", 3, "--out_dir", "out/first")
    assert again(5, "--resume") == ["0", "1", "2", "3", "4", "5"]
    assert again(6, "--resume", RUN / "ckpt/iter_000004") == ["0", "1", "2", "3", "4", "5", "6"]
    again(6, "--resume", "auto", "--out_dir", "out/new")  # nothing to go on from there: it begins with that one
    assert checkpoint.read_state(Path("out/new/ckpt/last"))["config"]["n_layer"] == 3
