"""Plot the logs of runs: losses, learning rate, gradient norm, speed, memory.

python plot.py                                            # the newest run: out/<run>/metrics.png
python plot.py out/shakespeare --svg
python plot.py out/a out/b --x tokens --out compared.png  # several runs in one plot; also --x time
python plot.py out/shakespeare --watch                    # update the plot while the run trains
"""

from __future__ import annotations

from flatgpt.cli.cli import from_command_line, run_script
from config import PlotConfig

if __name__ == "__main__":
    CONFIG = from_command_line(PlotConfig, __doc__)

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from config import UserError
from flatgpt.runs import history
from flatgpt.runs.history import History
from flatgpt.runs.plots import has_values, plot_runs
from flatgpt.runtime.files import require_writable, write_output

# --watch polls the logs every WATCH_SECONDS, and sleeps for at least SLEEP_RATIO times the plotting time, to leave the
# CPU to the run.
WATCH_SECONDS, SLEEP_RATIO = 2.0, 5


def read_runs(folders: Sequence[Path]) -> list[History]:
    """Read the runs. If two have the same name, all get their paths as names."""
    runs = [history.read(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        runs = [dataclasses.replace(run, name=str(folder)) for run, folder in zip(runs, folders, strict=True)]
    return runs


def draw(config: PlotConfig, folders: Sequence[Path], target: str) -> str:
    """Plot the runs that have values, write the plot to `target`, and return a message."""
    all_runs = read_runs(folders)
    runs = [run for run in all_runs if has_values(run, config.x)]
    empty = ", ".join(run.name for run in all_runs if not has_values(run, config.x))
    reason = f"{history.LOG} has no values to plot over {config.x}"
    if not runs:
        raise UserError(f"{empty}: {reason}; choose another run, or wait for this one with --watch")
    if empty:
        print(f"warning: {empty}: skipped, {reason}", file=sys.stderr)
    write_output(plot_runs(runs, config.x, config.format), target, "out")
    return f"{target}: {len(runs)} runs" if len(runs) > 1 else f"{target}: to iter {runs[0]['iter'][-1]:,.0f}"


def watch(config: PlotConfig, folders: Sequence[Path], target: str) -> None:
    """Plot whenever a log has changed. After an error, retry at the next change."""
    logs, previous = [folder / history.LOG for folder in folders], None
    while True:
        start, modified = time.monotonic(), [log.exists() and log.stat().st_mtime_ns for log in logs]
        if modified != previous:
            try:
                print(draw(config, folders, target), flush=True)
            except (UserError, OSError) as error:
                print(f"waiting: {error}", file=sys.stderr, flush=True)
            previous = modified
        time.sleep(max(WATCH_SECONDS, SLEEP_RATIO * (time.monotonic() - start)))


def main(config: PlotConfig) -> None:
    """Plot once, or with --watch after every change."""
    folders = list({Path(name).resolve(): Path(name) for name in config.runs}.values())
    files = [path for path in folders if path.is_file()]  # such as a result in out/*
    if 0 < len(files) < len(folders):
        print(f"warning: {', '.join(map(str, files))}: skipped, not a run's folder", file=sys.stderr)
        folders = [path for path in folders if path not in files]
    if not folders:
        folders = [history.newest()]
        print(f"the newest run: {folders[0]}", file=sys.stderr)
    target = config.out or str((folders[0] if len(folders) == 1 else Path()) / f"metrics.{config.format}")
    read_runs(folders)  # report a wrong name before --watch waits
    require_writable(target, "out")
    if config.watch:
        watch(config, folders, target)
    print(draw(config, folders, target))


if __name__ == "__main__":
    run_script(main, CONFIG)
