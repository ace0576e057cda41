"""What the trackers store without a network, read back with their own readers, and under which id a run goes on."""

import base64
import contextlib
import csv
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from in_process import TINY, train_here
from processes import ROOT

from flatgpt.runs.run_log import KEYS

pytestmark = pytest.mark.slow

DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="  # PNG, 1 x 1
LOG = f"""
import base64, json, sys
from pathlib import Path
from config import TrainConfig
from flatgpt.runs.run_log import RunLog
from flatgpt.runs.trackers import start_tracker
config = TrainConfig(lr=0.25, **json.loads(sys.argv[1]))
tracker = start_tracker(config, Path("."), int(sys.argv[2]), json.loads(sys.argv[3]))
log = RunLog(Path("."), int(sys.argv[2]), 3, tracker)
{{before}}
log.write({{{{"iter": 20, "train_loss": 2.5, "loss_scale": None}}}})
log.write_samples({{{{"iter": 20, "val_loss": 3.5}}}}, ["a", "東"], ["ab <b>", "東京 🎈\\n=== x"])
log.write_picture(base64.b64decode("{DOT}"))
log.close()
print(json.dumps(tracker.ids))
"""
NOWHERE = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
TABLE = [[20, "a", "ab <b>"], [20, "東", "東京 🎈\n=== x"]]
IDS = {"wandb_id": "abcd1234", "trackio_id": None}
EXTRAS = [pytest.param(name, marks=pytest.mark.extra(name)) for name in ("tensorboard", "trackio")]


def log_rows(folder: Path, before: str = "", start: int = 0, ids: dict = IDS, env: dict | None = None, **settings):
    """Log a row, samples and a picture in a new process, in that folder. Returns the process and the tracker's ids.

    Args:
        before: code that runs before them.
        settings: of TrainConfig.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TRACKIO_"))}
    environment |= {"HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(folder / "db")}
    call = {"cwd": folder, "env": environment | (env or {}), "stdin": subprocess.DEVNULL, "capture_output": True}
    words = [sys.executable, "-c", LOG.format(before=before), json.dumps(settings), str(start), json.dumps(ids)]
    done = subprocess.run(words, timeout=120, encoding="utf-8", **call)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done, json.loads(done.stdout.splitlines()[-1])


def events(folder: Path):
    """A reader of TensorBoard's files for scalars and images, with all that is in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(iteration, value) of each column in TensorBoard's files."""
    reader = events(folder)
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def texts(folder: Path, tag: str) -> list[tuple[int, str]]:
    """(iteration, text) of each text of that name in TensorBoard's files, as its page reads them."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload().Tensors(f"{tag}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]


def trackio_rows(folder: Path) -> list[tuple[str, int, dict]]:
    """(run, iteration, values) of each row of project flatgpt in trackio's database."""
    with contextlib.closing(sqlite3.connect(folder / "flatgpt.db")) as database:
        found = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    return [(run, step, json.loads(values)) for run, step, values in found]


# ---------------------------------------------------------------------------------------------------------------------
# rows, samples and the picture


@pytest.mark.parametrize(
    ("mode", "env", "said"),
    [
        ("offline", {}, ""),
        ("online", {}, "warning: wandb online: no API key"),
        pytest.param(
            "online", NOWHERE, "warning: wandb online: ", marks=pytest.mark.slow
        ),  # it tries for half a minute
    ],
)
def test_wandb_stores_a_run_and_asks_nothing(tmp_path, mode, env, said):
    """Also a row of a lower iteration, as after a resume. online becomes offline, with a warning."""
    before = 'log.write({"iter": 30, "train_loss": 2.25, "val_loss": 3.5})'
    done, ids = log_rows(tmp_path, before, env=env, tracker="wandb", wandb=mode)
    assert ids == IDS
    assert said in done.stderr
    assert bool(done.stderr) == ("wandb sync" in done.stderr) == bool(said)
    (stored,) = tmp_path.glob("wandb/offline-run-*/run-abcd1234.wandb")
    content = stored.read_bytes()
    assert content.count(b"train_loss") >= 2
    assert all(value in content for value in (b"2.5", b"2.25", b"3.5", b"0.25"))
    (table,) = stored.parent.glob("files/media/table/*.json")
    assert json.loads(table.read_text()) == {"columns": ["iter", "prompt", "text"], "data": TABLE}
    (picture,) = stored.parent.glob("files/media/images/*.png")
    assert picture.read_bytes() == base64.b64decode(DOT)


@pytest.mark.extra("tensorboard")
def test_tensorboard_reads_each_iteration_once(tmp_path):
    """Also after a resume, and after a start from the beginning in a folder that a killed run left."""
    later = "".join(f'log.write({{"iter": {i}, "train_loss": 0.{i}, "val_loss": 9}}); ' for i in (10, 20, 30))
    done, _ = log_rows(tmp_path, later, tracker="tensorboard")
    assert done.stderr == ""
    log_rows(tmp_path, start=20, tracker="tensorboard")
    folder = tmp_path / "tensorboard"
    assert scalars(folder) == {"train_loss": [(10, pytest.approx(0.1)), (20, 2.5)], "val_loss": [(10, 9)]}
    # blocks of code in Markdown
    assert texts(folder, "samples") == [(20, "    ab <b>\n\n---\n\n    東京 🎈\n    === x")]
    assert all("    lr = 0.25\n" in text for _, text in texts(folder, "config"))
    assert [i for i, _ in texts(folder, "config")] == [0, 20]
    (picture,) = events(folder).Images("metrics")
    assert (picture.step, picture.width, picture.height) == (20, 1, 1)
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    log_rows(tmp_path, tracker="tensorboard")
    assert scalars(folder) == {"train_loss": [(20, 2.5)], "val_loss": []}


@pytest.mark.extra("trackio")
def test_trackio_stores_a_run_and_continues_it(tmp_path):
    """The id that a checkpoint holds leads to the same run. Nothing of trackio's is printed."""
    done, ids = log_rows(tmp_path, 'log.write({"iter": 10, "mfu": float("nan")})', tracker="trackio")
    assert done.stderr == ""
    assert "rackio" not in done.stdout.replace(json.dumps(ids), "")
    done, again = log_rows(tmp_path, start=20, ids=ids, tracker="trackio")
    assert again == ids
    (first, *rows) = trackio_rows(tmp_path / "db")
    assert first == (ids["trackio_id"], 10, {"iter": 10, "mfu": "NaN"})
    assert [row[:2] for row in rows] == [(ids["trackio_id"], 20)] * 6
    assert rows[0][2] == {"iter": 20, "train_loss": 2.5}
    columns = ("iter", "prompt", "text")
    table = [dict(zip(columns, line, strict=True)) for line in TABLE]
    assert rows[1][2]["samples"] == {"_type": "trackio.table", "_value": table}
    assert rows[2][2]["picture"]["_type"] == "trackio.image"
    picture = tmp_path / "db" / "media" / rows[2][2]["picture"]["file_path"]
    assert picture.read_bytes() == base64.b64decode(DOT)
    with contextlib.closing(sqlite3.connect(tmp_path / "db" / "flatgpt.db")) as database:
        ((config,),) = database.execute("SELECT config FROM configs").fetchall()
    assert json.loads(config)["lr"] == 0.25
    _, other = log_rows(tmp_path, tracker="trackio")
    assert other != ids


@pytest.mark.parametrize("tracker", EXTRAS)
def test_a_tracker_that_cannot_write_is_one_warning(tmp_path, tracker):
    """No traceback of its threads, and the log is whole. TensorBoard: a full disk. trackio: its folder is a file."""
    before = """
import resource
limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
for name in ("log", "log_samples", "log_picture"):
    def call(*args, method=getattr(tracker, name)):
        limit(1)
        method(*args)
        limit(resource.RLIM_INFINITY)
    setattr(tracker, name, call)
"""
    before = before if tracker == "tensorboard" else ""
    if tracker == "trackio":
        (tmp_path / "db").touch()
    before += 'for i in range(20): log.write({"iter": i, "train_loss": 1.5})'
    done, _ = log_rows(tmp_path, before, tracker=tracker)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"warning: {tracker}: ")
    assert line.endswith("; the missing data is in .")
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 22
    assert (tmp_path / "metrics.png").read_bytes() == base64.b64decode(DOT)


# ---------------------------------------------------------------------------------------------------------------------
# runs


@pytest.mark.parametrize(("name", "setting"), [("wandb", "--wandb=offline"), ("trackio", "--tracker=trackio")])
def test_run_goes_on_under_its_id_after_a_part_of_the_training_without_tracker(tiny_data, monkeypatch, name, setting):
    asked = []
    key = {"wandb": "id", "trackio": "name"}[name]

    def init(**settings):
        asked.append(settings[key])
        done = dict.fromkeys(("log", "define_metric", "finish"), lambda *args, **kwargs: None)
        return SimpleNamespace(id="abcd1234", **done)

    module = {"init": init, "finish": lambda: None, "Settings": dict, "__file__": f"/{name}/__init__.py"}
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**module))
    for i, words in ((2, [setting]), (4, ["--tracker", "none"]), (6, [setting])):
        train_here("--max_iters", i, *words, "--sample_tokens", 0, "--resume", "auto")
    stored = json.loads(Path("out/quickstart/ckpt/last/state.json").read_text())[f"{name}_id"]
    assert asked == {"wandb": [None, "abcd1234"], "trackio": [stored] * 2}[name]
    train_here("--max_iters", 8, setting, "--sample_tokens", 0, "--resume", "out/quickstart", "--out_dir", "out/fork")
    assert asked[2] is None or asked[2].startswith("fork-")  # another run


@pytest.mark.parametrize("tracker", EXTRAS)
def test_a_run_that_is_killed_and_interrupted_is_whole_in_the_tracker(tiny_data, start_ranks, tracker):
    """kill -9 and then Ctrl-C after a row that no checkpoint has; the resumed run writes it again.

    At the row of iter 6, the checkpoint of iter 3 is complete, and that of iter 6 may be.
    """
    end = """
from flatgpt.runs.run_log import RunLog
real, ends = RunLog.write, "ENDS".split()
os.environ["TRACKIO_DIR"] = "db"
def write(self, row, *args):
    real(self, row, *args)
    if [str(row["iter"])] == ends[:1]:
        os.kill(os.getpid(), getattr(signal, ends[1]))
RunLog.write = write
"""
    words = (*TINY, "--tracker", tracker, "--resume", "auto", "--out_dir", "out/x", "--max_iters", 9)
    codes = []
    for ends in ("6 SIGKILL", "7 SIGINT", ""):
        (process,) = start_ranks(*words, cwd=tiny_data, code=end.replace("ENDS", ends))
        codes.append(process.wait(100))
        assert "Traceback" not in process.output
    assert codes == [-9, 130, 0]
    with open("out/x/metrics.csv", newline="") as file:
        logged = [{key: float(row[key]) for key in KEYS if row[key]} for row in csv.DictReader(file)]
    if tracker == "tensorboard":
        found = scalars(tiny_data / "out/x/tensorboard")
        assert found == {
            key: [(row["iter"], pytest.approx(row[key], rel=1e-6)) for row in logged if key in row]
            for key in KEYS[1:]
            if any(key in row for row in logged)
        }
    else:  # its thread writes twice a second: rows before the kill may be missing
        rows = trackio_rows(Path("db"))
        stored = {step: values for run, step, values in rows if "tokens" in values}
        assert len({run for run, _, _ in rows}) == 1
        assert {6, 7, 8, 9} <= stored.keys()
        for row in logged[6:]:
            assert stored[row["iter"]] == {key: pytest.approx(value, rel=1e-6) for key, value in row.items()}


@pytest.mark.parametrize("words", [["--list"], ["--plan", *TINY]], ids=["list", "plan"])
def test_list_and_plan_start_no_tracker(cli, tiny_data, monkeypatch, words):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # a start would print a warning
    done = cli("train", *words, "--tracker", "tensorboard")
    assert (done.code, done.err) == (0, "")
    assert not Path("out").exists()


@pytest.mark.extra("tensorboard")
def test_of_two_ranks_one_logs(tiny_data, ranks):
    process = ranks(2, *TINY, "--grad_accum_steps", 2, "--tracker", "tensorboard", cwd=tiny_data)
    assert process.code == 0, process.output
    assert len([*Path("out/quickstart/tensorboard").iterdir()]) == 1
    assert [i for i, _ in scalars(Path("out/quickstart/tensorboard"))["tokens"]] == list(range(7))
