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
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from config import UserError
from flatgpt.runs import history
from flatgpt.runs.history import History
from flatgpt.runs.plots import has_values, plot_runs
from flatgpt.runtime.files import require_writable, write_output

# --watch looks at the logs every WATCH_SECONDS, and at most so often that drawing takes a small part of the time: the
# run needs the processor too.
WATCH_SECONDS, PAUSE_PER_DRAWING = 2.0, 5


def read_runs(folders: Sequence[Path]) -> list[History]:
    """Read the runs. Where two have one name, all are named by their paths."""
    runs = [history.read(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        runs = [dataclasses.replace(run, name=str(folder)) for run, folder in zip(runs, folders, strict=True)]
    return runs


def draw(config: PlotConfig, folders: Sequence[Path], target: str) -> str:
    """Draw the runs that have values into the file. Returns a line about it."""
    found = read_runs(folders)
    runs = [run for run in found if has_values(run, config.x)]
    empty = ", ".join(run.name for run in found if not has_values(run, config.x))
    reason = f"nothing to draw along {config.x} in {history.LOG}"
    if not runs:
        raise UserError(f"{empty}: {reason}; name another run, or wait for this one with --watch")
    if empty:
        print(f"warning: {empty}: left out, {reason}", file=sys.stderr)
    write_output(plot_runs(runs, config.x, config.format), target, "out")
    return f"{target}: {len(runs)} runs" if len(runs) > 1 else f"{target}: to iter {runs[0]['iter'][-1]:,.0f}"


def watch(config: PlotConfig, folders: Sequence[Path], target: str) -> None:
    """Draw whenever a log has changed. After an error, try again at the next change."""
    logs, before = [folder / history.LOG for folder in folders], None
    while True:
        began, now = time.monotonic(), [log.exists() and log.stat().st_mtime_ns for log in logs]
        if now != before:
            try:
                print(draw(config, folders, target), flush=True)
            except (UserError, OSError) as error:
                print(f"waiting: {error}", file=sys.stderr, flush=True)
            before = now
        time.sleep(max(WATCH_SECONDS, PAUSE_PER_DRAWING * (time.monotonic() - began)))


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
