"""time_to_loss.py: seconds from a process's start to the evaluation that meets the target."""

import json
import os
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from in_process import TINY
from stand_in import nanogpt

import bench
from config import BenchConfig, UserError
from flatgpt.benchmarks import nanogpt as peer
from flatgpt.benchmarks import time_to_loss
from flatgpt.benchmarks.time_to_loss import OURS, THEIRS, bench_loss, until_loss
from flatgpt.cli import cli
from flatgpt.data.dataset import open_dataset
from flatgpt.runs.run_log import format_row


def script(folder: Path, text: str) -> list:
    (folder / "script.py").write_text(textwrap.dedent(text))
    return [sys.executable, "script.py"]


def test_clock_stops_at_the_first_loss_that_meets_the_target(in_tmp, monkeypatch):
    monkeypatch.delitem(peer.ENVIRONMENT, "PYTHONUNBUFFERED", raising=False)
    """While the process is still there; it is ended then."""
    words = script(
        in_tmp,
        """
        import os, time
        open("pid", "w").write(str(os.getpid()))
        print("iter      0 | val 4.1000 | lr 1e-3")
        print("iter     10 | loss 1.0000 | lr 1e-3")
        print("iter     20 | loss 1.0000 | val 2.0000 | norm 1.9")
        time.sleep(600)
        print("iter     30 | val 1.5000")
        """,
    )
    times = iter([100.0, 130.5])
    monkeypatch.setattr(time_to_loss, "time", SimpleNamespace(perf_counter=times.__next__))
    assert until_loss(words, OURS, 2.0, in_tmp) == {"seconds": 30.5, "iter": 20, "val_loss": 2.0}
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)


def test_one_that_never_gets_there(in_tmp):
    words = script(in_tmp, 'print("iter      0 | val 4.1000")\nprint("iter      9 | val 2.0001")')
    assert until_loss(words, OURS, 2.0, in_tmp) == {"seconds": None, "iter": 9, "val_loss": 2.0001}


def test_without_a_target_the_whole_process_counts(in_tmp, monkeypatch):
    """By a clock that is at 1 from the process's end on, which comes after more lines than a pipe holds."""
    words = script(
        in_tmp,
        """
        print("step 8: train loss 1.0000, val loss 2.5000", flush=True)
        print("more\\n" * 100_000, flush=True)
        open("ended", "w").close()
        """,
    )
    clock = SimpleNamespace(perf_counter=Path("ended").exists)
    monkeypatch.setattr(time_to_loss, "time", clock)
    assert until_loss(words, THEIRS, None, in_tmp) == {"seconds": 1, "iter": 8, "val_loss": 2.5}


def test_one_that_fails_says_why(in_tmp):
    words = script(in_tmp, 'import sys\nprint("iter 0 | val 4.1")\nsys.exit("error: no such thing")')
    with pytest.raises(UserError, match=r"script\.py failed: no such thing"):
        until_loss(words, OURS, 2.0, in_tmp)


def test_what_was_compiled_before_is_compiled_again(in_tmp):
    words = script(
        in_tmp,
        """
        import os
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        with open("folders", "a") as file:
            file.write(f"{folder} {len(os.listdir(folder))}\\n")
        """,
    )
    for _ in range(2):
        until_loss(words, OURS, 2.0, in_tmp)
    folders, counts = zip(*[line.rsplit(" ", 1) for line in (in_tmp / "folders").read_text().splitlines()], strict=True)
    assert len(set(folders)) == 2
    assert counts == ("0", "0")


def test_line_of_our_log_is_understood():
    row = {"iter": 250, "train_loss": 1.5, "val_loss": 1.8858, "lr": 1e-3, "grad_norm": 0.5, "step_ms": 12.0}
    match = time_to_loss.re.match(OURS, format_row(row))
    assert (match[1], match[2]) == ("250", "1.8858")
    assert not time_to_loss.re.match(OURS, format_row({**row, "val_loss": None}))


# a train.py that says what it was asked to do; its loss falls with the seed
FAKE = """
import json, sys
sys.path.insert(0, {root!r})
import dataclasses
from config import TrainConfig
from flatgpt.cli import cli
config = cli.parse(TrainConfig, sys.argv[1:])
with open("asked.jsonl", "a") as file:
    file.write(json.dumps(dataclasses.asdict(config)) + "\\n")
print(f"iter      0 | val 4.0000")
print(f"iter    100 | val {{4 - config.seed}}.0000")
"""


@pytest.fixture
def fake_house(tiny_data, monkeypatch):
    """train.py is FAKE."""
    root = str(time_to_loss.REPO_ROOT)
    (tiny_data / "house").mkdir()
    (tiny_data / "house" / "train.py").write_text(FAKE.format(root=root))
    monkeypatch.setattr(time_to_loss, "REPO_ROOT", tiny_data / "house")
    return tiny_data


def run(folder: Path, *words) -> dict:
    bench.main(cli.parse(BenchConfig, ["loss", *TINY, *map(str, words), "--json", "loss.json"]))
    return json.loads((folder / "loss.json").read_text())


def test_each_seed_is_a_run_of_train_with_all_settings(fake_house, capsys):
    before = {*fake_house.iterdir(), fake_house / "loss.json", fake_house / "asked.jsonl"}
    found = run(fake_house, "--target", "2.5", "--seeds", "3", "--lr", "3e-3", "--activation", "relu")
    asked = [json.loads(each) for each in (fake_house / "asked.jsonl").read_text().splitlines()]
    assert [each["seed"] for each in asked] == [1, 2, 3]
    assert {(each["lr"], each["activation"], each["n_embd"], each["dataset"]) for each in asked} == {
        (3e-3, "relu", 32, "tiny")
    }
    assert len({each["out_dir"] for each in asked}) == 3
    first, second, third = found["runs"]
    assert (first["seed"], first["seconds"], first["iter"], first["val_loss"]) == (1, None, 100, 3)
    assert (second["iter"], second["val_loss"], third["val_loss"]) == (100, 2, 1)
    # the middle of two seconds and one that never came
    assert found["seconds"] == max(second["seconds"], third["seconds"])
    assert "peers" not in found
    assert "not reached, iter    100, val 3.0000" in capsys.readouterr().out
    assert set(fake_house.iterdir()) == before, "nothing is left behind"


def test_half_of_the_runs_without_the_loss_have_no_median(fake_house):
    assert run(fake_house, "--target", "2.5", "--seeds", "2")["seconds"] is None


def test_nanogpt_beside_it_on_the_same_ids(fake_house, capsys):
    folder = nanogpt(fake_house / "nanoGPT")
    found = run(fake_house, "--target", "2.05", "--seeds", "3", "--peer", "nanoGPT", "nanoGPT")
    said = [json.loads(each) for each in (folder / "said.jsonl").read_text().splitlines()]
    assert len(said) == 3
    dataset = open_dataset(Path("data/tiny"))
    for each in said:
        assert each["words"] == ["config/train_shakespeare_char.py", *time_to_loss.CPU_RECIPE]
        assert each["meta"] == {"vocab_size": 257}
        assert (each["train"], each["val"]) == tuple(2 * len(dataset.tokens(split)) for split in ("train", "val"))
    ours, theirs = found["runs"], found["peers"]["nanoGPT"]["runs"]
    assert [each["val_loss"] for each in theirs] == [2.1] * 3
    assert None not in [each["seconds"] for each in theirs]  # its recipe's whole process, whatever it reaches
    assert ours[0]["seconds"] is None  # and makes no pair
    rounds = [theirs[n]["seconds"] / ours[n]["seconds"] for n in (1, 2)]
    assert found["ratios"]["nanoGPT"]["rounds"] == pytest.approx(rounds)
    assert f"times as fast: {sum(rounds) / 2:.2f}" in capsys.readouterr().out


def test_nanogpts_shards_are_our_ids(tiny_data):
    dataset, theirs = open_dataset(Path("data/tiny")), nanogpt(tiny_data / "nanoGPT")
    place = time_to_loss.nanogpt_folder(tiny_data / "place", theirs, dataset)
    val = dataset.tokens("val")
    assert (place / "data" / "shakespeare_char" / "val.bin").read_bytes() == val[0 : len(val)].astype("<u2").tobytes()
    assert (place / "train.py").read_text() == (theirs / "train.py").read_text()


def test_a_peer_without_its_files_is_refused_before_the_first_run(fake_house):
    (nanogpt(fake_house / "nanoGPT") / "configurator.py").unlink()
    config = cli.parse(BenchConfig, ["loss", *TINY, "--target", "3", "--peer", "nanoGPT", "nanoGPT"])
    with pytest.raises(UserError, match=r"no configurator\.py"):
        bench_loss(config, "", print)
    assert not (fake_house / "asked.jsonl").exists()


@pytest.mark.slow
def test_a_run_of_train(tiny_data):
    found = run(tiny_data, "--target", "5.5", "--seeds", "1", "--max_iters", "200", "--eval_interval", "5")
    (only,) = found["runs"]
    assert only["val_loss"] <= 5.5
    assert 0 < only["iter"] < 200
    assert only["seconds"] > 0
