"""resume.py: which checkpoint a run resumes from, whether its settings fit, and what is restored."""

import copy
import shutil
from pathlib import Path

import pytest
from in_process import TINY, make_dataset, train_here
from run_files import same
from safetensors.torch import load_file

import train
from config import TrainConfig, UserError
from flatgpt.cli import cli
from flatgpt.runs import checkpoint
from flatgpt.training import resume

RUN = Path("out/quickstart")
QUIET = ("--sample_tokens", 0)


def make_config(*words) -> TrainConfig:
    return cli.parse(TrainConfig, [*TINY, *map(str, (*QUIET, *words))])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with data/tiny, and the checkpoints 2, 4, 6 of a run in out/quickstart. Read only."""
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


@pytest.fixture
def home_copy(home, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the current folder."""
    shutil.copytree(home, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# which checkpoint


def find(how: str | Path | None, overwrite: bool = False, run: Path = RUN) -> int | None:
    """Return the iteration that a run would resume from."""
    with resume.RunLock(run) as lock:
        found = resume.find_resume_checkpoint(lock, None if how is None else str(how), overwrite)
    return found and found[1]["iter"]


NEW = Path("out/new")


@pytest.mark.parametrize(
    ("how", "settings", "found"),
    [
        ("latest", {}, 6),
        ("auto", {}, 6),
        (RUN, {}, 6),
        (RUN / "ckpt/last", {}, 6),
        (RUN / "ckpt/iter_000002", {}, 2),
        (None, {"overwrite": True}, None),
        (None, {}, r"already holds a run \(at iter 6\): add --resume .* or --overwrite"),
        (None, {"run": NEW}, None),
        ("auto", {"run": NEW}, None),
        (RUN / "ckpt/iter_000004", {"run": NEW}, 4),
        ("latest", {"run": NEW}, "nothing to resume in out/new: there is no checkpoint; start without --resume"),
        ("out/none", {"run": NEW}, "resume = out/none: out/none/state.json is missing or damaged"),
    ],
)
def test_forms_of_resume(here, how, settings, found):
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            find(how, **settings)
    else:
        assert find(how, **settings) == found
    assert not NEW.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "train_state.pt", "state.json"])
def test_damaged_checkpoint_is_named_and_the_one_before_it_used(home_copy, capsys, file):
    """Unless the damaged one was asked for. Nothing starts from the beginning over a damaged run."""
    path = RUN / "ckpt/iter_000006" / file
    path.write_bytes(b"[]")
    for how in ("latest", "auto", RUN):
        assert find(how) == 4, how
        said = capsys.readouterr().out
        assert f"warning: {path} is" in said
        assert "damaged" in said
    with pytest.raises(UserError, match=f"^resume = {RUN}/ckpt/last: .*damaged"):
        find(RUN / "ckpt/last")
    for folder in RUN.glob("ckpt/iter_*"):
        (folder / file).write_bytes(b"")
    for how in ("latest", "auto"):
        with pytest.raises(UserError, match="every checkpoint there is damaged; add --overwrite instead"):
            find(how)
    with pytest.raises(UserError, match="already holds a run"):
        find(None)
    with pytest.raises(UserError, match="this run has no usable checkpoint"):
        find(RUN, run=NEW)
    assert len(list(RUN.glob("ckpt/iter_*"))) == 3


@pytest.mark.parametrize("content", ["null", "[" * 200_000, '{"format": 1, "iter": 6, "config": {}, "files": []}'])
def test_state_json_of_any_content_is_damaged(home_copy, content):
    (RUN / "ckpt/iter_000006/state.json").write_text(content)
    assert find("auto") == 4


def test_checkpoint_of_another_run_needs_a_folder_of_its_own(home_copy):
    Path("out/other/ckpt").mkdir(parents=True)
    (RUN / "ckpt/iter_000004").rename("out/other/ckpt/iter_000004")
    with pytest.raises(UserError, match=r"is of another run, and out/quickstart holds checkpoints of its own"):
        find("out/other/ckpt/iter_000004")


# ---------------------------------------------------------------------------------------------------------------------
# settings

SAME = ("--eval_interval", 2, "--keep_checkpoints", 9)
START = f"resuming from {RUN}/ckpt/iter_000006"


def check(*words, change=lambda state: None) -> list[str]:
    """Return what a resume with these words prints. `change` modifies the saved state."""
    folder = RUN / "ckpt/iter_000006"
    change(state := copy.deepcopy(checkpoint.read_state(folder)))
    return resume.require_same_run(folder, state, train.build_run(make_config(*words)))


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
    assert message.split("settings: ")[1].split(". Set")[0].split("; ") == [
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


@pytest.mark.parametrize("key", ["name", "ranks_sha256"])
def test_another_tokenizer_is_an_error(here, key):
    with pytest.raises(UserError, match="tokenizer = byte"):
        check(change=lambda state: state["tokenizer"].update({key: "other"}))


def test_differences_that_are_allowed_are_printed(here):
    words = "--lr 1e-3 --min_lr 1e-4 --dropout 0.1 --batch_size 1 --grad_accum_steps 4 --weight_decay 0"
    words += " --out_dir out/elsewhere --attention manual --activation_checkpointing"
    assert check(*SAME) == [START]
    (line,) = check(*SAME, *words.split())
    start, _, allowed = line.partition(", with ")
    assert start == START
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
    lines = check(*SAME, change=lambda state: state.update({key: value}))
    now = checkpoint.read_state(RUN / "ckpt/last")[key]
    assert lines == [START, f"note: equal to rounding, not to the bit: {key} = {now} (was {value})"]


def test_prompt_of_earlier_versions_is_a_list_of_one(here):
    def change(state):
        state["config"]["sample_prompt"] = "\n"

    assert check(*SAME, change=change) == [START]
    (line,) = check(*SAME, "--sample_prompt", "a", change=change)
    assert line.endswith(r"with sample_prompt = ['a'] (was ['\n'])")


def test_run_that_is_past_its_end_is_noted(here):
    assert "note: it is past max_iters = 3 already: nothing is left to train" in check("--max_iters", 3)


# ---------------------------------------------------------------------------------------------------------------------
# what is restored


@pytest.mark.parametrize("max_iters", [6, 7])
@pytest.mark.parametrize(("iteration", "pending"), [(3, True), (5, False), (7, True)])
def test_interrupted_evaluation_is_pending(iteration, pending, max_iters):
    """Earlier versions did not store it: they saved before each evaluation, at eval_interval and at the end."""
    state = {"config": {"eval_interval": 3, "max_iters": 7}, "wandb_id": None}
    progress = resume.Progress(iter=iteration, eval_pending=False)
    progress.load_state_dict({"best_loss": 2.5}, state)
    assert (progress.eval_pending, progress.best_loss) == (pending, 2.5)
    progress.load_state_dict({**progress.state_dict(), "eval_pending": not pending}, state)
    assert progress.eval_pending is not pending


@pytest.fixture(scope="module")
def trained(home) -> dict:
    """{optimizer: (run, checkpoint)}: a run of one update, and the checkpoint of another of three."""
    both = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name in ("adamw", "muon"):
            words = ("--optimizer", name, "--max_iters", 3, "--out_dir", home / name)
            folder = train_here(*QUIET, *words) / "ckpt/iter_000003"
            train.train_step(run := train.build_run(make_config(*words)), 0)
            both[name] = run, folder
    return both


def everything(run: train.TrainingRun) -> list[dict]:
    return [part.state_dict() for part in (run.model, run.optimizer, run.scaler, run.nonfinite_guard)]


def refusal(run: train.TrainingRun, folder: Path, tmp_path: Path, change) -> str:
    """Return the error for a train_state.pt that was changed and has a valid hash. Nothing of it is loaded."""
    change(train_state := checkpoint.load_train_state(folder))
    state = {key: value for key, value in checkpoint.read_state(folder).items() if key != "files"}
    weights = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    changed = checkpoint.save(tmp_path, state, weights, train_state, 1)
    before = copy.deepcopy(everything(run))
    with pytest.raises(UserError) as caught:
        resume.restore(changed, run)
    assert same(everything(run), before)
    return str(caught.value).removeprefix(f"{changed}/train_state.pt is ")


def saved_part(state: dict, part: str) -> dict:
    """Return the state of Muon, or that of AdamW with or without it."""
    return state["optimizer"].get(part, state["optimizer"])


def parameter_names(run: train.TrainingRun, part: str) -> list[str]:
    names = {p: name for name, p in run.model.named_parameters()}
    return [names[p] for g in getattr(run.optimizer, part, run.optimizer).param_groups for p in g["params"]]


CHANGES = {
    "shape": lambda part, moment: part["state"][1].update({moment: part["state"][1][moment][:-1].clone()}),
    "dtype": lambda part, moment: part["state"][1].update({moment: part["state"][1][moment].bfloat16()}),
    "no tensor": lambda part, moment: part["state"][1].update({moment: 0.0}),
    "missing": lambda part, moment: part["state"][1].pop(moment),
    "no entry": lambda part, moment: part["state"].pop(1),
    "no entries": lambda part, moment: part["state"].clear(),
    "no state": lambda part, moment: part.pop("state"),
    "too few": lambda part, moment: part["param_groups"][-1]["params"].pop(),
    "swapped groups": lambda part, moment: part["param_groups"].reverse(),
    "no groups": lambda part, moment: part.pop("param_groups"),
}
MOMENTS = [("adamw", "exp_avg"), ("adamw", "exp_avg_sq"), ("adamw", "step"), ("muon", "momentum_buffer")]
CASES = [(part, moment, change) for part, moment in MOMENTS for change in list(CHANGES)[:4]]
CASES.remove(("adamw", "step", "shape"))
CASES += [(part, "", change) for part in ("adamw", "muon") for change in list(CHANGES)[4:]]
CASES = [(part, *case) for case in CASES for part in case[:1]] + [("muon", "adamw", "exp_avg", "missing")]


@pytest.mark.parametrize(("optimizer", "part", "moment", "change"), CASES)
def test_optimizer_state_of_another_model_is_refused(here, trained, tmp_path, optimizer, part, moment, change):
    run, folder = trained[optimizer]
    message = refusal(run, folder, tmp_path, lambda state: CHANGES[change](saved_part(state, part), moment))
    assert message.startswith("of another model or optimizer: ")
    if "groups" in change or change == "too few":
        assert "its groups have [" in message
    else:
        index = 0 if change in ("no entries", "no state") else 1
        assert f"{moment} of {parameter_names(run, part)[index]} is " in message


@pytest.mark.parametrize(("optimizer", "other"), [("adamw", "muon"), ("muon", "adamw")])
def test_train_state_without_an_optimizer_or_with_another_is_refused(here, trained, tmp_path, optimizer, other):
    run, folder = trained[optimizer]
    message = refusal(run, folder, tmp_path, lambda state: state.pop("optimizer"))
    assert message == "not loaded: it is no train state of tensors and plain types"
    other_state = trained[other][0].optimizer.state_dict()
    message = refusal(run, folder, tmp_path, lambda state: state.update(optimizer=other_state))
    assert message.startswith("of another model or optimizer: its groups have [")


def test_only_three_of_many_mismatches_are_listed(here, trained, tmp_path):
    run, folder = trained["muon"]

    def change(state):
        for entries in saved_part(state, "adamw")["state"].values():
            entries["exp_avg"] = entries["exp_avg"].double()

    message = refusal(run, folder, tmp_path, change)
    assert message.count("exp_avg of ") == 3
    assert message.endswith(f", and {len(parameter_names(run, 'adamw')) - 3} more")


def test_checkpoint_without_an_applied_update_has_no_moments(here, tmp_path):
    """All its updates were skipped, so Muon has no state yet."""
    config = make_config("--optimizer", "muon")
    run = train.build_run(config)
    run.nonfinite_guard.skipped += 3
    for iteration in (3, 4):
        progress = resume.Progress(iter=iteration, row={"iter": iteration, "tokens": 384, "epoch": 0.1})
        saved = resume.checkpoint_state(run, progress)
        state = {"iter": iteration, "config": {}}
        folder = checkpoint.save(tmp_path, state, saved["weights"], saved["train_state"], 1)
        again = train.build_run(config)
        if iteration == 3:
            assert resume.restore(folder, again)["row"] == progress.row
            assert int(again.nonfinite_guard.skipped) == 3
        else:
            with pytest.raises(UserError, match=r"momentum_buffer of transformer\.h\.0\.[a-z_.]+ is missing"):
                resume.restore(folder, again)


def test_settings_of_the_call_replace_saved_ones(here):
    """torch's load_state_dict restores the old ones."""
    run = train.build_run(make_config("--weight_decay", "0.5", "--beta2", "0.9"))
    resume.restore(RUN / "ckpt/iter_000004", run)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.5, 0.0]
    assert all(group["betas"] == (0.9, 0.9) for group in run.optimizer.param_groups)
    assert all(float(state["step"]) == 4 for state in run.optimizer.state.values())
