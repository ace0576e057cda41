"""Remove from this process what Python lacks on Windows, import every module, and run scripts one after another.

python windows.py '[["train", "--lr", "1e-3"], ...]'
"""

import ctypes
import errno
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = "fcntl", "grp", "pwd", "readline", "resource", "termios", "tty"
OF_OS = "fork", "forkpty", "getpgid", "getuid", "killpg", "mkfifo", "pread", "pwrite", "sched_getaffinity", "setsid"
OF_OS += "sysconf", "uname"  # others are guarded by sys.platform, here or in Python
SIGNALS = "SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2"


class Library(ctypes.CDLL):
    """A library, which must have a name."""

    def __init__(self, name, *args, **kwargs):
        if name is None:
            raise TypeError("argument 1 must be str, not None")
        super().__init__(name, *args, **kwargs)


def no_privilege(*args, **kwargs):
    """Fail as os.symlink does without developer mode."""
    raise OSError(errno.EINVAL, "A required privilege is not held by the client")


if __name__ == "__main__":
    import torch  # noqa: F401 - torch and others of this system may use what Windows lacks

    sys.modules.update(dict.fromkeys(MODULES))
    for name in OF_OS:
        if hasattr(os, name):
            delattr(os, name)
    for name in SIGNALS:
        delattr(signal, name)
    os.symlink, ctypes.CDLL = no_privilege, Library
    sys.path.insert(0, str(ROOT))
    for module in pkgutil.walk_packages([str(ROOT / "flatgpt")], "flatgpt."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name != "starlette":  # an extra
                raise
    for script, *words in json.loads(sys.argv[1]):
        sys.argv = [f"{script}.py", *words]
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
