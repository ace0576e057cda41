"""Draw runs from their logs: losses, learning rate, gradient norm, speed, memory.

python plot.py                                            # the newest run: out/<run>/metrics.png
python plot.py out/shakespeare --svg
python plot.py out/a out/b --x tokens --out compared.png  # several runs in one picture; also --x time
python plot.py out/shakespeare --watch                    # drawn again while the run trains
"""

from __future__ import annotations

from config import PlotConfig
from flatgpt.cli.cli import from_command_line, run_script

if __name__ == "__main__":
    CONFIG = from_command_line(PlotConfig, __doc__)

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from config import UserError
from flatgpt.runs import history
from flatgpt.runs.history import History
from flatgpt.runs.plots import plot_runs, render
from flatgpt.runtime.files import require_writable, write_output

# --watch looks at the logs every WATCH_SECONDS, and at most so often that drawing takes a small part of the time: the
# run needs the processor too.
WATCH_SECONDS, PAUSE_PER_DRAWING = 2.0, 5


def read_runs(folders: Sequence[Path]) -> list[History]:
    """Read the runs. Runs of the same name get as much of their paths as tells them apart."""
    runs, paths = [history.read(folder) for folder in folders], [folder.resolve() for folder in folders]
    for depth in range(2, max(len(path.parts) for path in paths) + 1):
        if len({run.name for run in runs}) == len(runs):
            break
        names = ["/".join(path.parts[-depth:]) for path in paths]
        runs = [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    return runs


def draw(config: PlotConfig, folders: Sequence[Path], target: str) -> str:
    """Draw the runs that have rows into the file. Returns a line about it."""
    runs, empty = [], []
    for folder, run in zip(folders, read_runs(folders), strict=True):
        if any(map(math.isfinite, run.x_values(config.x))):
            runs.append(run)
        else:
            empty.append(str(folder))
    names = ", ".join(empty)
    reason = f"no rows in {history.LOG} there" + f" that tell {config.x}" * (config.x != "iter")
    if not runs:
        raise UserError(f"{names}: nothing to draw, {reason}; name another run, or wait for this one with --watch")
    if empty:
        print(f"warning: {names}: left out, {reason}", file=sys.stderr)
    write_output(render(plot_runs(runs, config.x), config.format), target, "out")
    return f"{target}: {len(runs)} runs" if len(runs) > 1 else f"{target}: to iter {runs[0]['iter'][-1]:,.0f}"


def watch(config: PlotConfig, folders: Sequence[Path], target: str) -> None:
    """Draw whenever a log or a checkpoint has changed. After an error, try again at the next change."""
    files = [folder / name for folder in folders for name in (history.LOG, history.CHECKPOINT)]
    before = None
    while True:
        began, now = time.monotonic(), [_version(file) for file in files]
        if now != before:
            try:
                print(draw(config, folders, target), flush=True)
            except (UserError, OSError) as error:
                print(f"waiting: {error}", file=sys.stderr, flush=True)
            before = now
        time.sleep(max(WATCH_SECONDS, PAUSE_PER_DRAWING * (time.monotonic() - began)))


def _version(file: Path) -> tuple[int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def main(config: PlotConfig) -> None:
    """Draw once, or with --watch again and again."""
    folders = list({Path(name).resolve(): Path(name) for name in config.runs}.values())
    if not folders:
        folders = [history.newest()]
        print(f"the newest run: {folders[0]}", file=sys.stderr)
    target = config.out or str((folders[0] if len(folders) == 1 else Path()) / f"metrics.{config.format}")
    read_runs(folders)  # an error in a name is reported before --watch waits
    require_writable(target, "out")
    if config.watch:
        watch(config, folders, target)
    print(draw(config, folders, target))


if __name__ == "__main__":
    run_script(main, CONFIG)
