"""trackers.py, with stand-ins for the packages: a tracker that fails or is missing ends no run."""

import re
import sys
import warnings
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from config import TrainConfig
from flatgpt.runs.run_log import RunLog
from flatgpt.runs.trackers import start_tracker

IDS = {"wandb_id": None, "trackio_id": None}


def fake(monkeypatch, name: str, **functions) -> list[dict]:
    """Put a module of that name, a tracker's, in place of the installed one. Returns what is passed to its init."""
    started = []

    def init(**settings):
        started.append(settings)
        return SimpleNamespace(id=settings.get("id") or "new", define_metric=lambda *args, **kwargs: None, **functions)

    run = {"init": init, "Settings": dict, "teardown": lambda: None, "__file__": f"/{name}/__init__.py", **functions}
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**run))
    return started


def start(tracker: str, folder, **settings):
    return start_tracker(TrainConfig(tracker=tracker, **settings), folder, 0, IDS)


def test_a_tracker_that_fails_ends_no_run(tmp_path, monkeypatch, capsys):
    """Its service is gone for a while, its temporary folder is full: said once, and the log is whole."""
    took = []

    def fail(*args):
        raise OSError(28, "No space left on device")

    def take(row):
        took.append(row)
        if row.get("iter") == 10:
            raise ConnectionError

    fake(monkeypatch, "wandb", Table=fail, Image=fail, log=take, finish=lambda: took.append("end") or fail())
    run = RunLog(tmp_path, 0, 20, start("wandb", tmp_path, wandb="offline"))
    for i in (0, 10, 20):
        run.write({"iter": i})
    run.write_samples({"iter": 20}, ["a"], ["ab"])
    run.write_picture(b"png")
    run.close()
    assert took == [{"iter": 0}, {"iter": 10}, {"iter": 20}, "end"]
    assert capsys.readouterr().err == f"warning: wandb: ConnectionError; the missing data is in {tmp_path}\n"
    log = (tmp_path / "metrics.csv").read_text()
    assert [line.partition(",")[0] for line in log.split()] == ["iter", "0", "10", "20"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.png", "samples.txt"]


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_is_a_warning(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    run = RunLog(tmp_path, 0, 20, start(name, tmp_path))
    run.write({"iter": 0})
    run.close()
    assert re.fullmatch(f"warning: {name}: .* continuing without it .*pip install {name}\\)\n", capsys.readouterr().err)
    assert run.tracker.ids == IDS


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_cannot_be_started_is_a_warning(tmp_path, monkeypatch, capsys, name):
    """Hooks that it has set are removed, and the ids of an earlier part of the run are kept."""

    def fail(**settings):
        raise PermissionError("no room.")

    fake(monkeypatch, name)
    monkeypatch.setattr(sys.modules[name], "init", fail)
    hook, ids = warnings.showwarning, {"wandb_id": "abcd", "trackio_id": "x-1"}
    config = TrainConfig(tracker=name, wandb="offline" if name == "wandb" else "disabled")
    tracker = start_tracker(config, tmp_path, 0, ids)
    tracker.log({"iter": 0})
    assert (tracker.ids, warnings.showwarning) == (ids, hook)
    assert capsys.readouterr().err == f"warning: {name}: no room; continuing without it\n"


def test_wandb_without_a_key_logs_offline(tmp_path, monkeypatch, capsys):
    started = fake(monkeypatch, "wandb", login=lambda **how: False, errors=SimpleNamespace(UsageError=ValueError))
    start("wandb", tmp_path)
    assert [settings["mode"] for settings in started] == ["offline"]
    assert re.fullmatch("warning: wandb online: no API key .*; logging offline, .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("remote", [None, "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"])
def test_trackio_asks_no_one_unless_the_run_is_sent_somewhere(tmp_path, monkeypatch, remote):
    """trackio asks huggingface.co for the name of a user who is logged in."""
    offline = []
    fake(monkeypatch, "trackio")
    init = sys.modules["trackio"].init
    look = lambda **settings: offline.append(huggingface_hub.constants.is_offline_mode()) or init(**settings)  # noqa: E731
    monkeypatch.setattr(sys.modules["trackio"], "init", look)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    if remote:
        monkeypatch.setenv(remote, "user/space")
    start("trackio", tmp_path).finish()
    assert offline == [remote is None]
    assert not huggingface_hub.constants.is_offline_mode()


def test_another_run_in_a_folder_of_the_same_name_is_another_run_in_trackio(tmp_path, monkeypatch):
    """trackio continues runs by name. The rows of both would be one curve."""
    started = fake(monkeypatch, "trackio", finish=lambda: None)
    trackers = [start("trackio", tmp_path) for _ in range(2)]
    for tracker in reversed(trackers):
        tracker.finish()
    names = [settings["name"] for settings in started]
    assert len({*names}) == 2
    assert all(name.startswith(f"{tmp_path.name}-") for name in names)
    assert [tracker.ids["trackio_id"] for tracker in trackers] == names


def test_warnings_of_trackio_and_of_others(tmp_path, monkeypatch, capsys):
    """trackio turns its errors, also those of its threads, into Python warnings. Those of others stay what they are."""
    others = []
    fake(monkeypatch, "trackio", finish=lambda: None)
    monkeypatch.setattr(warnings, "showwarning", lambda *args, **kwargs: others.append(str(args[0])))
    tracker = start("trackio", tmp_path)
    for name, text in (("/trackio/utils.py", "full disk."), ("/numpy/core.py", "old"), ("/trackio/run.py", "again")):
        warnings.showwarning(UserWarning(text), UserWarning, name, 34)
    tracker.finish()
    warnings.showwarning(UserWarning("late"), UserWarning, "/trackio/utils.py", 34)
    assert capsys.readouterr().err == f"warning: trackio: full disk; the missing data is in {tmp_path}\n"
    assert others == ["old", "late"]
