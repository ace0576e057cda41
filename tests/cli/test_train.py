"""train.py: updates, evaluation, samples, resuming and stopping."""

import copy
import csv
import json
import math
import re
import shlex
import shutil
import time
from collections import Counter
from pathlib import Path
from unicodedata import category

import numpy as np
import pytest
import torch
from in_process import TINY, first_fast, make_dataset, train_here
from processes import ROOT, command
from run_files import links, logged_iters, rows, same, val_losses, weights
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import model
import train
from flatgpt.cli.cli import run_script
from config import SamplingConfig, TrainConfig, UserError
from flatgpt.cli.settings import parse
from flatgpt.data import tokenizer
from flatgpt.data.dataset import open_dataset
from flatgpt.evaluation import metrics
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.sampling import generate_batch
from flatgpt.interop.pretrained import initial_shape
from flatgpt.runs import checkpoint, history, plots
from flatgpt.runs.checkpoint_writer import CheckpointWriter
from flatgpt.training import reporting


def build(*words) -> train.TrainingRun:
    """Return a run at update 0."""
    return train.build_run(parse(TrainConfig, [*TINY, *map(str, words)], initial_shape))


# ---------------------------------------------------------------------------------------------------------------------
# the whole road


@pytest.mark.slow
def test_prepare_train_eval_infer_as_a_user_types_them(tmp_path):
    def done(*words, code: int = 0):
        process = command(*words, cwd=tmp_path)
        assert process.returncode == code, process.stderr
        return process

    text = tmp_path / "book.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. Größe 😀\n" * 200, encoding="utf-8")
    done("prepare_data", "text", "--input", text, "--name", "tiny", "--tokenizer", "byte")
    trained = done("train", *TINY, "--max_iters", 120, "--eval_interval", 60, "--lr", "5e-3")
    assert "\r" not in trained.stdout + trained.stderr.replace("\r\n", "")
    losses = list(val_losses(tmp_path / "out/quickstart").values())
    assert losses[0] > 5 > 2.5 > losses[-1], losses
    (error,) = done("train", *TINY, code=2).stderr.splitlines()
    assert error.startswith("error: ")
    assert "--resume" in error
    assert "--overwrite" in error
    report = json.loads(done("eval", "--model_path", "out/quickstart", "--json", "-").stdout)
    assert report["loss"] == pytest.approx(losses[-1], abs=1e-5)
    text = done("infer", "--prompt", "The quick", "--temperature", 0, "--max_new_tokens", 10).stdout
    assert text.startswith("The quick brown fox")


def test_a_run_ends_with_its_picture(tiny_data, monkeypatch, capsys):
    """Where it cannot be drawn the run is whole all the same."""
    run = train_here("--sample_tokens", 0, picture=True)
    picture = (run / "metrics.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    monkeypatch.setattr(plots, "plot_runs", lambda histories: 1 / 0)
    train_here("--sample_tokens", 0, "--resume", "--max_iters", 8, picture=True)
    assert capsys.readouterr().err.endswith("warning: out/quickstart/metrics.png was not drawn: division by zero\n")
    assert (run / "metrics.png").read_bytes() == picture
    assert checkpoint.read_state(run / "ckpt/last")["finished"]


class BlockWithGain(model.Block):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.gain = torch.nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x, *rest):
        return super().forward(self.gain * x, *rest)


def test_parameters_of_an_edited_model_are_counted(cli, tiny_data, monkeypatch):
    """In state.json, and from there in the list, which does not import torch; also by --plan."""
    monkeypatch.setattr(model, "Block", BlockWithGain)
    state = checkpoint.read_state(train_here("--sample_tokens", 0) / "ckpt/last")
    expected = 257 * 32 + 32 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32 + 2 * 32  # the last are the gains
    assert state["parameters"] == expected
    assert f"quickstart  {history.format_compact(expected):>6}  tiny" in cli("train", "--list").out
    assert f"model    {expected:,} parameters" in cli("train", *TINY, "--plan").out


def test_default_dataset_is_prepared_on_the_spot(in_tmp, capsys):
    words = TINY[2:]  # without --dataset tiny
    config = parse(TrainConfig, [*words, "--max_iters", "1", "--eval_batches", "2", "--data_dir", "elsewhere"])
    train.train(config)
    assert json.loads((in_tmp / "elsewhere/pydoc/meta.json").read_text())["tokenizer"] == "byte"
    printed = capsys.readouterr().out
    assert "\n--- sample after 1 update (still noise; whole in samples.txt): '\\n" in printed
    assert all(f"python {verb}.py" in printed for verb in ("infer", "eval", "prepare_data"))


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--config shakespeare_char_cpu", "--dataset shakespeare_byte --data_dir 'my data'"])
def test_small_dataset_of_a_recipe_is_prepared_at_the_start(cli, in_tmp, real_text, monkeypatch, words):
    """Where it cannot be downloaded, the error names the command. A folder of nanoGPT is not touched."""
    plan = [*shlex.split(words), "--max_iters", 1, "--eval_tokens", 64, "--device", "cpu", "--out_dir", "out/a"]
    folder = Path("my data" if "my data" in words else "data") / "shakespeare_byte"
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: gone())

    def gone():
        raise OSError("no network")

    command = "python prepare_data.py shakespeare --tokenizer byte" + " --data_dir 'my data'" * ("my data" in words)
    error = cli("train", *plan).error
    assert "could not be downloaded to data/raw/shakespeare/input.txt (no network)" in error
    assert error.endswith(f"; then run this command again, or {command}")
    Path("data/raw/shakespeare").mkdir(parents=True)
    shutil.copy(real_text / "shakespeare/input.txt", "data/raw/shakespeare")
    done = cli("train", *plan)
    assert f"{folder} does not exist yet: preparing it (a download of 1.1 MB" in done.out
    assert (done.code, json.loads((folder / "meta.json").read_text())["source"]) == (0, "shakespeare")
    (folder / "meta.json").unlink()
    for shard in folder.glob("*.bin"):  # nanoGPT's
        shard.rename(shard.with_name(shard.name.replace("_000000", "")))
    assert "read as nanoGPT shards" in cli("train", *plan, "--overwrite").out


def test_second_try_of_a_recipe_is_offered_a_free_folder(tiny_data, cli):
    train_here("--max_iters", 1, "--out_dir", "out/a b")
    for taken, offered in (("out/a b", "'out/a b-2'"), ("out/a b-2", "'out/a b-4'")):
        error = cli("train", *TINY, "--max_iters", 1, "--out_dir", taken).error
        assert f"add --out_dir {offered} to keep both, --resume to continue it, or --overwrite" in error
        for n in (2, 3):
            train_here("--max_iters", 1, "--out_dir", f"out/a b-{n}", "--resume", "auto")


def test_plan_is_that_of_the_documentation(cli, in_tmp):
    """But for the speed of this machine."""
    page = (ROOT / "docs/devices.md").read_text(encoding="utf-8")
    command, *expected = re.search(r"^\$ python train\.py (.* --plan .*)\n((?:.*\n)+?)```", page, re.M).groups()
    *lines, here = cli("train", *command.split(), "--device", "cpu").out.splitlines()
    assert lines == expected[0].splitlines()[:-1]
    assert re.fullmatch(r" +here: cpu +[\d.]+ TFLOP/s +[\d.,]+ days", here)
    text = cli("train", "--plan", "--dataset", "absent", "--vocab_size", 99, "--epochs", 1, "--max_iters", "none").out
    assert re.findall(r"^\w+", text, re.M) == ["model", "data", "update", "memory"], "no epochs without data"
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--vocab_size", 100), "257 ids; remove vocab_size"),
        (("--context_length", 2000), "too little text: the val split"),
        (
            ("--dataset", "wikitext103"),
            "dataset data/wikitext103 does not exist: run python prepare_data.py wikitext103",
        ),
        (("--dataset", "fineweb_92m", "--data_dir", "a b"), "--name fineweb_92m --data_dir 'a b'"),
        (("--dataset", "shakespeare_bpe1000"), "run python prepare_data.py shakespeare --tokenizer bpe:1000"),
    ],
)
def test_mistakes_are_errors_before_the_first_update(tiny_data, words, part):
    with pytest.raises(UserError) as caught:
        train_here(*words)
    assert part in str(caught.value)
    assert not Path("out").exists()


def test_run_folder_that_cannot_be_written_is_one_error_line(tiny_data, capfd):
    Path("out").write_text("a file")
    with pytest.raises(SystemExit) as ended:
        run_script(train.train, parse(TrainConfig, TINY), every_rank=True)
    assert ended.value.code == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith("error: out")


# ---------------------------------------------------------------------------------------------------------------------
# what a run begins with


def test_plan_prints_sizes_and_trains_nothing(tiny_data, capsys):
    L, C, T, V = 2, 32, 32, 257
    words = "--batch_size 3 --grad_accum_steps 2 --max_iters 70 --plan --gpus 2 --mfu 0.5"
    before = set(tiny_data.rglob("*"))
    train.train(parse(TrainConfig, [*TINY, *words.split()]))
    assert set(tiny_data.rglob("*")) == before
    text = capsys.readouterr().out
    # in a block, two LayerNorms and four matrices with biases; the last LayerNorm; the two embeddings
    block = 2 * 2 * C + (3 * C * C + 3 * C) + (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C)
    params = L * block + 2 * C + V * C + T * C
    flops = 6 * (params - T * C) + 12 * L * C * T
    there = open_dataset(Path("data/tiny")).meta["splits"]["train"]["tokens"]
    windows, tokens = (there - 1) // T, 70 * 3 * 2 * T
    for line in (
        f"{params:,} parameters: {L} layers, 2 heads, n_embd {C}, context {T}, vocabulary {V}; ",
        f"; {flops:,} FLOPs per token\n",
        f"data/tiny: {there:,} training tokens, {windows:,} windows\n",
        f"3 sequences x 2 x {T} tokens = {6 * T:,} tokens; {windows / 6:,.1f} updates per epoch\n",
        f"70 updates = {tokens:,} tokens = {70 * 6 / windows:.2f} epochs",
        f", {tokens * flops:.3g} FLOPs\n",
    ):
        assert line in text
    assert re.search(rf"^ +weights +{4 * (params + 63 * C) / 1e9:.1g}$", text, re.M), "with the padded vocabulary"
    assert re.search(r"^ +here: cpu +[\d.]+ TFLOP/s +under a minute$", text, re.M)


def test_plan_without_data_needs_the_vocabulary(in_tmp, capsys):
    words = [*TINY, "--plan"]
    with pytest.raises(UserError, match="or add --vocab_size for a plan without the dataset"):
        train.train(parse(TrainConfig, words))
    train.train(parse(TrainConfig, [*words, "--vocab_size", "300"]))
    text = capsys.readouterr().out
    assert "vocabulary 300" in text
    assert "data/tiny is not prepared\n" in text
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize(
    ("words", "warmup", "lr"),
    [
        ("--max_iters 50 --warmup_iters 100", 5, (2e-3, 2e-4)),
        ("--max_iters 100 --warmup_iters 100", 10, (2e-3, 2e-4)),
        ("--max_iters 101 --warmup_iters 100", 100, (2e-3, 2e-4)),
        ("--max_iters 5 --warmup_iters 100", 0, (2e-3, 2e-4)),
        ("--max_iters 50 --warmup_iters 100 --lr_decay_iters 500", 100, (2e-3, 2e-4)),
        ("--lr 2e-4", 2, (2e-4, 2e-4)),
        ("--lr 1e-4", 2, (1e-4, 1e-5)),
        ("--lr 1e-4 --min_lr 0", 2, (1e-4, 0)),
    ],
)
def test_short_runs_and_small_learning_rates_have_a_schedule(tiny_data, capsys, words, warmup, lr):
    """A warm-up that would not end is shortened, which is said; the schedule of a longer run is kept."""
    config = build(*words.split()).config
    assert (config.warmup_iters, config.lr, config.min_lr) == (warmup, *map(pytest.approx, lr))
    assert ("it is shortened to" in capsys.readouterr().out) == (warmup in (0, 5, 10))


def test_resumed_run_keeps_its_warmup_and_learning_rates(tiny_data, cli):
    """Also if the new end is within the warm-up, as in runs of earlier versions."""
    words = ("--warmup_iters", 4, "--lr_decay_iters", 9, "--lr", 1e-4, "--sample_tokens", 0)
    run = train_here("--max_iters", 3, *words)
    done = cli("train", "--resume", "--max_iters", 5, "--lr_decay_iters", 3)
    assert (done.code, "shortened" in done.out, "min_lr" in done.out) == (0, False, False)
    saved = checkpoint.read_state(run / "ckpt/last")["config"]
    assert (saved["warmup_iters"], saved["lr_decay_iters"]) == (4, 3)
    assert saved["min_lr"] == pytest.approx(1e-5)


def test_lengths_that_the_config_leaves_open(tiny_data):
    run = build("--max_iters", "none", "--epochs", 1.5, "--grad_accum_steps", 2)
    assert run.config.max_iters == run.config.lr_decay_iters == math.ceil(1.5 * len(run.batches.windows) / 8)
    run = build("--warmup_iters", "none", "--warmup_fraction", 0.5)
    assert (run.config.lr_decay_iters, run.config.warmup_iters) == (6, 3)


def test_split_has_to_have_a_window_and_its_last_target(tiny_data):
    T = len(open_dataset(Path("data/tiny")).tokens("val"))
    with pytest.raises(UserError, match=rf"^too little text: the val split of data/tiny has {T:,} tokens, one window"):
        build("--context_length", T)
    assert np.isfinite(train.evaluate(build("--context_length", T - 1))["val_loss"])


def test_validation_windows_do_not_depend_on_the_batch(tiny_data):
    """As many as eval_tokens needs, of the start of the split."""
    val, T = open_dataset(Path("data/tiny")).tokens("val"), 32
    ids = torch.from_numpy(val[: 4 * T + 1].astype(np.int64))
    model = build().model  # measures operators with their gradients
    with torch.no_grad():
        expected = float(model(ids[:-1].view(4, T), ids[1:].view(4, T)))
    for words in ("--eval_tokens 97", "--eval_tokens 128 --batch_size 3", "--eval_batches 1", "--eval_epochs 1"):
        assert train.evaluate(build(*words.split())) == {"val_loss": pytest.approx(expected, rel=1e-6)}


@pytest.mark.parametrize(("words", "largest"), [("", 2), ("--activation_checkpointing", 1), ("--batch_size 30", 10)])
def test_evaluation_takes_the_windows_that_fit_in_the_memory_of_an_update(tiny_data, monkeypatch, words, largest):
    """An update keeps the activations of both blocks, unless they are recomputed."""
    monkeypatch.setitem(metrics.TOKENS_PER_PASS, "cpu", 10 * 32)
    run, rows = build("--batch_size", 1, "--eval_tokens", 40 * 32, *words.split()), []
    run.model.register_forward_pre_hook(lambda model, args: rows.append(len(args[0])))
    train.evaluate(run)
    assert (max(rows), sum(rows)) == (largest, 40)


def test_vocabulary_may_be_larger_than_that_of_the_data(tiny_data):
    assert weights(train_here("--vocab_size", 300))["transformer.wte.weight"].shape[0] == 320


@pytest.mark.parametrize("words", [[], ["--deterministic"]])
def test_deterministic_kernels_are_torchs_setting(tiny_data, words):
    build(*words)
    assert torch.are_deterministic_algorithms_enabled() == bool(words)


def test_initial_weights_follow_the_seed(tiny_data):
    one, again, other = (build("--seed", seed).model.state_dict() for seed in (1, 1, 2))
    assert same(one, again)
    assert [name for name in one if torch.equal(one[name], other[name]) and one[name].unique().numel() > 1] == []


def test_init_from_begins_with_those_weights_and_their_shape(tiny_data):
    first = train_here("--tie_weights", "false", "--n_layer", 1, "--out_dir", "out/first")
    best = load_file(first / "ckpt/best/model.safetensors")
    shape = "--n_layer 2 --n_head 2 --n_embd 32 --context_length 32 "
    words = " ".join(TINY).replace(shape, "").split()
    words += ["--init_from", str(first), "--context_length", "16", "--dropout", "0.1"]
    config = parse(TrainConfig, words, initial_shape)
    assert (config.n_layer, config.n_embd, config.tie_weights, config.dropout) == (1, 32, False, 0.1)
    for name, tensor in train.build_run(config).model.state_dict().items():
        assert torch.equal(tensor, best[name][:16] if "wpe" in name else best[name]), name
    with pytest.raises(UserError, match="n_layer"):
        train_here("--init_from", first)  # TINY says 2 layers
    state = json.loads((first / "ckpt/best/state.json").read_text())
    state["tokenizer"]["name"] = "p50k_base"
    (first / "ckpt/best/state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="was trained with tokenizer p50k_base, but data/tiny is tokenised with byte"):
        train.build_run(config)


# ---------------------------------------------------------------------------------------------------------------------
# updates


def test_fifty_updates_are_those_of_a_slow_plain_loop(tiny_data):
    """Accumulation, clipping, schedule and AdamW, each written out here; only the model and autograd are shared."""
    words = "--max_iters 50 --warmup_iters 10 --lr_decay_iters 45 --lr 5e-3 --min_lr 1e-3 --schedule cosine "
    words += "--weight_decay 0.1 --beta1 0.9 --beta2 0.95 --eps 1e-8 --grad_clip 1.5 --grad_accum_steps 2 --dropout 0"
    run = build(*words.split(), "--compile", "false")
    files = sorted((tiny_data / "data/tiny").glob("train_*.bin"))
    ids = torch.from_numpy(np.concatenate([np.fromfile(file, dtype="<u2") for file in files]).astype(np.int64))
    model, T, clipped = copy.deepcopy(run.model), 32, 0
    params = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for i in range(50):
        total = 0.0
        for micro in range(2):
            starts = [T * int(w) for w in run.batches.indices(i, micro)]
            x, y = (torch.stack([ids[s + later : s + later + T] for s in starts]) for later in (0, 1))
            loss = model(x, y) / 2
            loss.backward()
            total += loss.item()
        norm = sum(float((p.grad.double() ** 2).sum()) for p in params) ** 0.5
        clipped += norm > 1.5
        lr = 5e-3 * (i + 1) / 11 if i < 10 else 1e-3
        if 10 <= i < 45:
            lr = 1e-3 + 4e-3 * (1 + math.cos(math.pi * (i - 10) / 35)) / 2
        with torch.no_grad():
            for p, m, v in zip(params, first, second, strict=True):
                grad = p.grad * min(1.0, 1.5 / norm)
                m.copy_(0.9 * m + 0.1 * grad)
                v.copy_(0.95 * v + 0.05 * grad**2)
                if p.dim() >= 2:
                    p -= lr * 0.1 * p
                p -= lr * (m / (1 - 0.9 ** (i + 1))) / ((v / (1 - 0.95 ** (i + 1))).sqrt() + 1e-8)
                p.grad = None
        got_loss, got_norm = train.train_step(run, i)
        assert float(got_loss) == pytest.approx(total, rel=1e-5), i
        assert float(got_norm) == pytest.approx(norm, rel=1e-4), i
    assert 5 < clipped < 45, "clipping is seen at work and at rest"
    assert total < 3


@pytest.mark.parametrize("grad_clip", [0.001, 0])
def test_gradient_is_clipped(tiny_data, grad_clip):
    """AdamW forgives a constant factor, so the second moment is looked at: it holds the squares after clipping."""
    run = build("--grad_clip", grad_clip)
    _, norm = train.train_step(run, 0)
    assert norm > 1.1
    squares = sum(state["exp_avg_sq"].sum() for state in run.optimizer.state.values()) / (1 - run.config.beta2)
    assert float(squares) ** 0.5 == pytest.approx(grad_clip or float(norm), rel=0.01), "0 turns clipping off"


def bad_step(run: train.TrainingRun, i: int, fault: str) -> None:
    """Run update i with a fault in its loss or its gradient."""
    factor = math.nan if "nan" in fault else math.inf
    if "gradient" in fault:
        hook = run.model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda grad: grad * factor)
        assert train.train_step(run, i)[0].isfinite()
        hook.remove()
        return
    forward = run.forward
    # an added number leaves the gradients finite
    run.forward = lambda x, y: forward(x, y) + factor if "added" in fault else forward(x, y) * factor
    train.train_step(run, i)
    run.forward = forward


def training_state(run: train.TrainingRun) -> dict:
    """Return a copy of weights and moments."""
    optimizers = getattr(run.optimizer, "optimizers", {"adamw": run.optimizer}).values()
    return copy.deepcopy([run.model.state_dict(), *(optimizer.state_dict()["state"] for optimizer in optimizers)])


FAULTS = ("nan loss", "inf loss", "nan added", "inf added", "nan gradient", "inf gradient")
CASES = [("float32", fault) for fault in FAULTS] + [("bfloat16", "nan loss"), ("bfloat16", "inf gradient")]
CASES += [("float16", "nan loss"), ("float16", "inf gradient"), ("float16", "inf added")]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("dtype", "fault"), CASES)
def test_bad_update_leaves_no_trace(tiny_data, optimizer, dtype, fault):
    """The updates after it are those of a run that did not have it."""
    words = ("--optimizer", optimizer, "--dtype", dtype, "--grad_accum_steps", 2, "--dropout", 0.1)
    run, undisturbed = build(*words), build(*words)
    if dtype == "float16":  # a scale at which no gradient overflows
        run.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        undisturbed.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = copy.deepcopy(run.model.state_dict())
    bad_step(run, 0, fault)  # before the optimizer has any state
    assert same(run.model.state_dict(), before)
    for i in (1, 2, 4):
        if i == 4:
            before = training_state(run)
            bad_step(run, 3, fault)
            assert same(training_state(run), before)
            assert all(p.grad is None for p in run.model.parameters())
        undisturbed.scaler.load_state_dict(run.scaler.state_dict())  # the scale may have been halved
        train.train_step(run, i)
        train.train_step(undisturbed, i)
        assert same(training_state(run), training_state(undisturbed))
    counts = run.nonfinite_guard.state_dict()
    assert (counts["skipped"], counts["in_a_row"]) == (2, 0)


class NoSynchronisation(TorchDispatchMode):
    """Fails where a number is read from a tensor: on a GPU the host would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        return func(*args, **(kwargs or {}))


def test_update_does_not_synchronise_with_the_device(tiny_data, monkeypatch):
    def waits(*args):
        raise AssertionError("the host waits for the device")

    adamw, muon = build("--grad_accum_steps", 2), build("--optimizer", "muon")
    with monkeypatch.context() as patch, NoSynchronisation():
        for name in ("tolist", "numpy", "cpu"):  # on a CPU these do not pass the dispatcher
            patch.setattr(torch.Tensor, name, waits)
        for i in range(3):
            train.train_step(adamw, i)
            train.train_step(muon, i)
        with pytest.raises(AssertionError, match="waits"):
            adamw.nonfinite_guard.check({"iter": 3}, adamw.batches, adamw.ranks)


def test_time_of_an_update_is_without_saves_and_evaluations(tiny_data, monkeypatch):
    """Here an update takes 100 ms, a save or an evaluation 1,000 s."""
    now = [0.0]

    def taking(seconds: float, work):
        def timed(*words):
            now[0] += seconds
            return work(*words)

        return timed

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    # as with save_minutes, also between two rows of the log
    monkeypatch.setattr(CheckpointWriter, "timer_due", lambda self: True)
    for name, seconds in (("train_step", 0.1), ("save", 1000.0), ("evaluate", 1000.0)):
        monkeypatch.setattr(train, name, taking(seconds, getattr(train, name)))
    words = ("--max_iters", 9, "--log_interval", 3, "--eval_interval", 6, "--save_interval", 6)
    run = train_here(*words, "--grad_accum_steps", 2)
    with open(run / "metrics.csv", newline="") as file:
        _, *logged = csv.DictReader(file)
    assert [row["iter"] for row in logged] == ["3", "6", "9"]
    assert [float(row["step_ms"]) for row in logged] == pytest.approx([100] * 3)
    assert [float(row["tok_per_s"]) for row in logged] == pytest.approx([2 * 4 * 32 / 0.1] * 3)


@pytest.mark.slow
def test_compiled_run_equals_eager_run_and_itself(tiny_data):
    """Two threads of compiled code added up the gradient of the embedding in any order."""
    torch.set_num_threads(2)
    try:
        words = ("--grad_accum_steps", 2, "--max_iters", 30, "--eval_interval", 30)
        eager, compiled, again = (
            train_here(*words, *more, "--out_dir", f"out/{n}")
            for n, more in enumerate(((), ("--compile",), ("--compile",)))
        )
    finally:
        torch.set_num_threads(1)
    for a, b in zip(rows(eager)[1:], rows(compiled)[1:], strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-4)
    assert same(weights(compiled), weights(again))
    assert rows(compiled) == rows(again)


# ---------------------------------------------------------------------------------------------------------------------
# evaluations and samples


def test_evaluation_does_not_touch_training(tiny_data):
    often = train_here("--eval_interval", 1, "--save_interval", 6, "--dropout", 0.2, "--out_dir", "out/often")
    seldom = train_here("--eval_interval", 6, "--dropout", 0.2, "--sample_tokens", 0, "--out_dir", "out/seldom")
    assert same(weights(often), weights(seldom))


def test_every_evaluation_is_saved_first(tiny_data):
    """With the loss of the evaluation before it. At the end, that of the last one is added."""
    run = train_here("--max_iters", 7, "--eval_interval", 2, "--save_interval", 5, "--keep_checkpoints", 9)
    assert {p.name for p in run.glob("ckpt/iter_*")} == {f"iter_{i:06d}" for i in (2, 4, 5, 6, 7)}
    losses = val_losses(run)
    found = {state["iter"]: state["val_loss"] for state in map(checkpoint.read_state, checkpoint.checkpoints(run))}
    assert found == pytest.approx({2: losses[0], 4: losses[2], 5: losses[4], 6: losses[4], 7: losses[7]})


def test_best_is_the_best_and_stays(tiny_data):
    """The learning rate rises so far that the loss does too: best must not follow last."""
    run = train_here("--lr", 1, "--warmup_iters", 11, "--max_iters", 12, "--eval_interval", 2, "--keep_checkpoints", 1)
    losses = {i: loss for i, loss in val_losses(run).items() if i}
    best = min(losses, key=losses.get)
    assert best != 12
    assert links(run)["best"] == f"iter_{best:06d}"
    assert {p.name for p in run.glob("ckpt/iter_*")} == {f"iter_{best:06d}", "iter_000012"}


def test_train_split_is_evaluated_beside_validation(tiny_data, cli):
    """On as many tokens, from its start; in the log, in the plot, and not as the best loss."""
    words = ("--eval_train", "--sample_tokens", 0, "--lr", 5e-3, "--max_iters", 4, "--eval_interval", 2)
    run = train_here(*words, "--keep_checkpoints", 9)
    dataset, T = open_dataset(Path("data/tiny")), 32
    n = len(dataset.tokens("val")) - 1
    ids = dataset.tokens("train")[: n + 1].astype(np.int64)
    logged = {row["iter"]: row for row in rows(run) if row["val_loss"]}
    with torch.no_grad():
        model = build("--init_from", run / "ckpt/iter_000002").model
        losses = [
            float(model(torch.from_numpy(ids[None, s : e - 1]), torch.from_numpy(ids[None, s + 1 : e]))) * (e - 1 - s)
            for s in range(0, n, T)
            for e in [min(s + T, n) + 1]
        ]
    assert float(logged["2"]["train_split_loss"]) == pytest.approx(sum(losses) / n, rel=1e-5)
    assert links(run)["best"] == "iter_000004"
    resumed = train_here(*words, "--resume", run / "ckpt/iter_000002")
    assert {row["iter"]: row for row in rows(resumed) if row["val_loss"]} == logged
    assert "training split" in plots.plot_runs([history.read(run)], format="svg").decode()
    seen = []
    few = build("--eval_train", "--eval_tokens", 3 * T, "--batch_size", 1, "--n_layer", 1)
    train.evaluate(few, progress=lambda batches: seen.append(batches) or batches)
    assert list(map(len, seen)) == [3, 3], "of each split"


@pytest.mark.parametrize("external", first_fast([False, True]), ids=["own shards", "nanoGPT's"])
def test_dataset_without_a_val_split(tiny_data, cli, capsys, external):
    """It trains without validation, its newest checkpoint is used, and the commands that it prints work."""
    folder = Path("data/tiny")
    if external:
        (folder / "meta.json").unlink()
        np.fromfile(folder / "train_000000.bin", "<u2").tofile(folder / "train.bin")
    else:
        meta = json.loads((folder / "meta.json").read_text())
        del meta["splits"]["val"]
        (folder / "meta.json").write_text(json.dumps(meta))
    for shard in folder.glob("*_0*.bin" if external else "val*"):
        shard.unlink()
    done = cli("train", *TINY)
    assert done.code == 0, done.err
    assert "note: data/tiny has no val split: there is no validation loss and no best checkpoint" in done.out
    assert "done: 6 updates, " in done.out
    assert "None" not in done.out
    run = Path("out/quickstart")
    assert links(run) == {"last": "iter_000006"}
    assert {row["val_loss"] for row in rows(run)} == {""}
    assert (run / "samples.txt").read_text().startswith("=== iter 3 | prompt")
    assert (run / "metrics.png").exists()
    for line in [] if external else done.out.splitlines()[-3:-1]:  # GPT-2's vocabulary is a synthetic one here
        script, *words = shlex.split(line)[1:]
        assert cli(script.removesuffix(".py"), *words, "--device", "cpu").code == 0, line
    assert cli("train", "--resume", "--max_iters", 8, "--eval_train").code == 0
    assert rows(run)[-1]["train_split_loss"] != ""
    assert "out/quickstart" not in cli("train", "--list").err
    error = cli("train", *TINY, "--patience", 2, "--overwrite").error
    assert error.endswith("patience = 2: data/tiny has no val split; leave out patience, or prepare one")


def test_noise_is_one_line_and_a_new_model_has_no_sample(tiny_data, capsys):
    """The file has all that was generated. Weights that know the text are sampled from the start."""
    run = train_here("--lr", 1e-9, "--min_lr", 0, "--max_iters", 4, "--eval_interval", 2, "--sample_tokens", 100)
    shown = [line for line in capsys.readouterr().out.splitlines() if "sample after" in line]
    start = "--- sample after {} updates (still noise; whole in samples.txt): "
    assert [line.startswith(start.format(i)) for line, i in zip(shown, (2, 4), strict=True)] == [True, True]
    assert max(map(len, shown)) < 350
    samples = (run / "samples.txt").read_text()
    assert re.findall("^=== iter (.)", samples, re.M) == ["2", "4"]
    assert len(samples) > 200
    trained = train_here("--max_iters", 60, "--lr", 1e-2, "--eval_interval", 60, "--out_dir", "out/trained")
    assert "--- sample after 60 updates\n\n" in capsys.readouterr().out
    train_here("--max_iters", 1, "--init_from", trained, "--out_dir", "out/tuned")
    assert "--- sample after 0 updates\n\n" in capsys.readouterr().out


def test_unigram_entropy_is_the_loss_of_the_frequencies(tiny_data):
    run = build()
    tokens = open_dataset(Path("data/tiny")).tokens("train")
    counts = Counter(tokens[0 : len(tokens)].tolist())
    expected = -sum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values())
    assert run.unigram_entropy == pytest.approx(expected)


def test_each_prompt_is_continued_as_infer_would(tiny_data):
    run = build("--sample_prompt", "green", "", "東\u200c京", "--sample_tokens", "12")
    with torch.no_grad():
        for p in run.model.parameters():  # a new model's next token hardly depends on the text before it
            p.mul_(10)
    texts = reporting.generate_samples(run, seed=3)
    options, eot = SamplingConfig(temperature=0.8, seed=3), run.encoding.eot_token
    for row, prompt in enumerate(run.config.sample_prompt):
        ids = [*prompt.encode()] or [eot]
        steps = generate_batch(Decoder(run.model), [ids], 12, options, n_vocab=257, stop_ids=[eot], first_row=row)
        alone = bytes(ids[0] for ids in steps).decode(errors="replace")
        assert texts[row] == prompt + "".join("\ufffd" if category(c) == "Cc" and c not in "\n\t" else c for c in alone)
    assert reporting.generate_samples(run, seed=3) == texts
    assert reporting.generate_samples(run, seed=4) != texts


def test_sample_ends_at_end_of_text_and_has_no_control_characters(tiny_data, monkeypatch):
    """The terminal would obey them."""
    run = build("--sample_prompt", "a")
    ids = [98, 27, 9, run.encoding.eot_token, 99]
    monkeypatch.setattr(reporting, "generate_batch", lambda *_, **__: iter([[each] for each in ids]))
    assert reporting.generate_samples(run, seed=1) == ["ab\ufffd\t"]


def test_sample_that_cannot_be_drawn_is_a_warning(tiny_data, monkeypatch, capsys):
    """The loss is finite, the logits of the decoder are not: float16 can overflow for one text and not for another."""
    real = Decoder.prefill
    monkeypatch.setattr(Decoder, "prefill", lambda *words: real(*words) * math.nan)
    run = train_here("--sample_tokens", 3, "--max_iters", 4, "--eval_interval", 2)
    assert capsys.readouterr().out.count("warning: no sample at iter ") == 2
    assert logged_iters(run)[-1] == 4


def test_samples_need_a_vocabulary_and_training_does_not(tiny_data, monkeypatch, capsys):
    def out_of_reach(name, *_):
        raise UserError(f"tokenizer {name}: could not be fetched")

    monkeypatch.setattr(tokenizer, "load", out_of_reach)
    train_here()
    printed = capsys.readouterr()
    assert "warning: no samples will be written" in printed.err
    assert "sample after" not in printed.out


# ---------------------------------------------------------------------------------------------------------------------
# resuming


def test_rows_after_the_checkpoint_are_kept_aside(tiny_data):
    words = ("--max_iters", 7, "--eval_interval", 3, "--keep_checkpoints", 9)
    run = train_here(*words)
    before = rows(run)
    assert rows(train_here(*words, "--resume", run / "ckpt/iter_000003")) == before
    lost = (run / "metrics.lost.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lost] == ["iter", "4", "5", "6", "7"]
    assert {p.name for p in run.glob("ckpt/lost-*/*")} == {"iter_000006", "iter_000007"}


@pytest.mark.parametrize(
    ("words", "lr"), [("", 2e-4), ("--lr_decay_iters 6", 4.636e-4), ("--lr_decay_iters none", 4.636e-4)]
)
def test_resume_keeps_the_schedule_unless_another_is_named(tiny_data, cli, words, lr):
    """The note names the setting that extends it."""
    train_here("--max_iters", 4, "--sample_tokens", 0)
    done = cli("train", "--resume", "--max_iters", 6, *words.split())
    assert float(rows(Path("out/quickstart"))[-1]["lr"]) == pytest.approx(lr, rel=0.01)
    note = "note: the schedule is unchanged: lr_decay_iters = 4; to end it with the run, add --lr_decay_iters 6\n"
    assert (note in done.out) == (not words)
    assert "\n  max_iters = 6 (was 4)\n" in done.out


@pytest.mark.parametrize(("kept", "best"), [(9, 1), (2, 2)], ids=["there", "deleted"])
def test_going_back_to_before_the_best_takes_the_best_of_then(tiny_data, monkeypatch, kept, best):
    """Or, if it was deleted meanwhile, the first that is evaluated."""
    words = ("--max_iters", 3, "--eval_interval", 1, "--sample_tokens", 0, "--keep_checkpoints", kept)
    losses = iter((5.0, 3.0, 2.0, 1.0, 4.0, 4.0))
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": next(losses)})
    run = train_here(*words)
    assert links(run)["best"] == "iter_000003"
    train_here(*words, "--resume", run / "ckpt/iter_000002")
    assert next(losses, None) is None
    assert links(run)["best"] == f"iter_{best:06d}"


def test_a_resumed_run_counts_its_own_updates(tiny_data, capsys):
    train_here("--max_iters", 1, "--sample_tokens", 0)
    assert re.search(r"^done: 1 update, best .* at iter 1, \d+s\. Next:$", capsys.readouterr().out, re.M)
    train_here("--max_iters", 4, "--sample_tokens", 0, "--resume")
    printed = capsys.readouterr().out
    assert re.search(r"^done: 4 updates, of which 3 in this start, best .* at iter 4, \d+s\. Next:$", printed, re.M)


def test_mean_loss_is_that_of_the_updates_since_the_row_before(tiny_data):
    """Also where the run was stopped between two rows."""
    words = ("--max_iters", 8, "--eval_interval", 8, "--sample_tokens", 0)
    single = [float(row["train_loss"]) for row in rows(train_here(*words, "--out_dir", "out/each"))[1:]]
    run = train_here(*words, "--log_interval", 4, "--save_interval", 6, "--keep_checkpoints", 9)
    means = {row["iter"]: row["mean_loss"] for row in rows(run)}
    assert list(means) == ["0", "4", "6", "8"]
    assert float(means["4"]) == pytest.approx(np.mean(single[:4]), rel=1e-6)
    assert float(means["8"]) == pytest.approx(np.mean(single[6:]), rel=1e-6)


@pytest.mark.parametrize("saved", [False, True])
def test_error_in_training_ends_with_the_command_that_goes_on(tiny_data, cli, monkeypatch, saved):
    """It works in that state: without a checkpoint there is nothing to resume."""
    real = train.train_step

    def step(run, i):
        if i == (5 if saved else 2):
            raise UserError("data/tiny/train_000000.bin: truncated")
        return real(run, i)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", step)
        with pytest.raises(UserError) as caught:
            train_here("--out_dir", "out/x y")
    text, command = str(caught.value).split(". To " + ("resume: " if saved else "start again: "))
    assert text == "data/tiny/train_000000.bin: truncated"
    done = cli(*shlex.split(command.replace(".py", ""))[1:])
    assert done.code == 0, done.err
    assert "done: 6 updates, " in done.out


def test_overwrite_deletes_nothing(tiny_data):
    run = train_here()
    (run / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="does not exist"):
        train_here("--overwrite", "--dataset", "absent")
    assert (run / "note.txt").exists(), "a call that fails moves nothing"
    train_here("--overwrite")
    (old,) = Path("out").glob("quickstart.old-*")
    assert (old / "note.txt").read_text() == "mine"
    assert (old / "ckpt/last/model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# ends of all kinds


def test_patience_ends_a_run_that_gets_no_better(tiny_data, capsys):
    """The learning rate rises so far that the loss does too. The run is over, for Slurm's script as well."""
    words = ("--lr", 1, "--warmup_iters", 11, "--max_iters", 40, "--eval_interval", 2, "--keep_checkpoints", 99)
    run = train_here(*words, "--patience", 3)
    losses = list(val_losses(run).values())
    assert len(losses) == losses.index(min(losses)) + 1 + 3
    state = checkpoint.read_state(run / "ckpt/last")
    assert state["finished"]
    assert state["iter"] == 2 * (len(losses) - 1)
    assert not checkpoint.read_state(run / "ckpt/best")["finished"]
    printed = capsys.readouterr().out
    assert "no new best in 3 evaluations" in printed
    assert f"best validation loss {min(losses):.4f} at iter {2 * losses.index(min(losses))}, " in printed
    train_here(*words, "--patience", 3, "--resume")  # ends at once: the count went with the checkpoint
    assert checkpoint.read_state(run / "ckpt/last")["iter"] == state["iter"]
    train_here(*words, "--patience", 5, "--resume")
    losses = list(val_losses(run).values())
    assert len(losses) - 1 - losses.index(min(losses)) == 5


def test_patience_leaves_the_evaluation_before_the_first_update_out(tiny_data, monkeypatch):
    """It has no checkpoint that could be the best."""
    losses = iter((5.0, 4.0, 3.0))
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": next(losses)})
    run = train_here("--patience", 1, "--sample_tokens", 0)
    assert checkpoint.read_state(run / "ckpt/best")["iter"] == 6


def test_max_minutes_ends_a_run_in_peace(tiny_data, capsys):
    run = train_here("--max_iters", 100_000, "--eval_interval", 100_000, "--max_minutes", 0.02, picture=True)
    assert (run / "metrics.png").exists()
    state = checkpoint.verify(run / "ckpt/last")
    assert 0 < state["iter"] < 100_000
    assert not state["finished"]
    assert "(max_minutes = 0.02); saved. To resume:" in capsys.readouterr().out
    train_here("--max_iters", state["iter"] + 1, "--resume")
    assert checkpoint.read_state(run / "ckpt/last")["finished"]


def test_each_slot_of_time_makes_an_update(tiny_data):
    """Also one that is shorter than the evaluation which it begins with: else a queue would run it for ever."""
    for slot in (1, 2, 3):
        run = train_here("--max_minutes", 1e-7, "--resume", "auto", "--eval_interval", 2)
        assert checkpoint.read_state(run / "ckpt/last")["iter"] == slot


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
def test_gpu_resumes_bit_for_bit_when_it_is_deterministic(tmp_path, dtype, compiled):
    """In processes of their own: cuBLAS reads its setting once."""
    make_dataset(tmp_path)
    words = [*TINY, "--device", "cuda", "--dtype", dtype, compiled, "--deterministic", "--dropout", "0.1"]
    words += ["--grad_accum_steps", "2", "--lr_decay_iters", "30", "--eval_interval", "10", "--lr", "5e-3"]
    for more in (("--max_iters", 20), ("--max_iters", 30, "--resume"), ("--max_iters", 30, "--out_dir", "out/whole")):
        done = command("train", *words, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    resumed, whole = tmp_path / "out/quickstart", tmp_path / "out/whole"
    assert same(weights(resumed), weights(whole))
    assert rows(resumed) == rows(whole)
    assert val_losses(whole)[30] < val_losses(whole)[0] - 1
