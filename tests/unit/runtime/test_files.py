"""files.py: files are replaced as a whole; pipes and devices are written to directly."""

import errno
import json
import math
import os
import subprocess
import sys

import pytest
from processes import ROOT

from config import UserError
from flatgpt.runtime import files


def test_write_json(tmp_path, capsys):
    figures = {"loss": 1.5, "name": "é", "none": None}
    files.write_json(figures, str(tmp_path / "a.json"))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == figures
    files.write_json(figures, "-")
    assert json.loads(capsys.readouterr().out) == figures
    with pytest.raises(UserError, match=r"json = .*b\.json.*cannot be written"):
        files.write_json(figures, str(tmp_path / "no" / "b.json"))


def test_devices_are_written_to_and_need_no_writable_folder(tmp_path, monkeypatch):
    files.write_json({"a": 1}, "/dev/null")
    files.require_writable("/dev/null", "json")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from flatgpt.runtime import files\n"
    code += "files.write_json({'a': 1}, '/dev/stdout')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stdout == b'{\n "a": 1\n}\n'
    monkeypatch.setattr(os, "access", lambda *words: False)  # a folder that is read-only
    files.require_writable(None, "json")
    files.require_writable("-", "json")
    with pytest.raises(UserError, match=r"plot = .*a\.png cannot be written, because no file can be created there"):
        files.require_writable(str(tmp_path / "a.png"), "plot")


def test_nan_and_infinity_become_null(capsys):
    files.write_json({"a": math.nan, "b": [{"c": math.inf}, (1.5, -math.inf)]}, "-")
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [{"c": None}, [1.5, None]]}


def test_of_two_processes_that_write_one_file_the_last_wins(tmp_path, monkeypatch):
    """For example train.py at its end, and plot.py --watch; or two prepare_data.py that download one file."""
    path, replace = tmp_path / "a.png", os.replace

    def meanwhile(*names):
        monkeypatch.setattr(os, "replace", replace)
        files.atomic_write(path, b"theirs")
        assert path.read_bytes() == b"theirs"
        replace(*names)

    monkeypatch.setattr(os, "replace", meanwhile)
    files.write_output(b"ours", str(path), "out")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"ours"]


def test_a_failed_write_keeps_the_previous_file(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"old")
    files.write_output(b"new", str(tmp_path / "a.png"), "plot")
    assert (tmp_path / "a.png").read_bytes() == b"new"
    monkeypatch.setattr(os, "replace", lambda *words: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"plot = .*a\.png cannot be written: No space left on device"):
        files.write_output(b"newer", str(tmp_path / "a.png"), "plot")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO, errno.ENOSPC])
def test_flush_that_the_file_system_does_not_have_is_no_error(tmp_path, monkeypatch, code):
    """Some network file systems flush no folders. A disk that is full or broken is an error, which names the file."""
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    for path in (tmp_path, tmp_path / "a"):
        path.exists() or path.write_bytes(b"")
        if code in (errno.EIO, errno.ENOSPC):
            with pytest.raises(OSError, match=os.strerror(code)) as caught:
                files.fsync(path)
            assert caught.value.filename == str(path)
        else:
            files.fsync(path)
