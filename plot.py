"""Draw runs from their logs: losses, learning rate, gradient norm, speed, memory.

python plot.py                                            # the newest run: out/<run>/metrics.png
python plot.py out/shakespeare --svg
python plot.py out/a out/b --x tokens --out compared.png  # or --x time: several runs in one picture
python plot.py out/shakespeare --watch                    # drawn anew while the run goes on
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

# From one look at the logs to the next: seconds, and at least how many times as long as drawing took, as the run needs
# the processor too.
SECONDS, REST = 2.0, 5


def read_runs(folders: Sequence[Path]) -> list[History]:
    """Their histories, those of the same name by as much of the path as tells them apart."""
    found = [history.read(folder) for folder in folders]
    paths = [folder.resolve() for folder in folders]
    for depth in range(2, max(len(path.parts) for path in paths) + 1):
        if len({run.name for run in found}) == len(found):
            break
        found = [
            dataclasses.replace(run, name="/".join(path.parts[-depth:])) for run, path in zip(found, paths, strict=True)
        ]
    return found


def draw(config: PlotConfig, folders: Sequence[Path], target: str) -> str:
    """Draw the runs that have rows into the file; what was drawn."""
    runs = read_runs(folders)
    some = [any(map(math.isfinite, run.x_values(config.x))) for run in runs]
    empty = ", ".join(str(folder) for folder, there in zip(folders, some, strict=True) if not there)
    why = f"no rows in {history.LOG} there" + f" that tell {config.x}" * (config.x != "iter")
    if not any(some):
        raise UserError(f"{empty}: nothing to draw, {why}; name another run, or wait for this one with --watch")
    if empty:
        print(f"warning: {empty}: left out, {why}", file=sys.stderr)
    runs = [run for run, there in zip(runs, some, strict=True) if there]
    write_output(render(plot_runs(runs, config.x), config.format), target, "out")
    return f"{target}: {len(runs)} runs" if len(runs) > 1 else f"{target}: to iter {runs[0]['iter'][-1]:,.0f}"


def watch(config: PlotConfig, folders: Sequence[Path], target: str) -> None:
    """Draw whenever a file has changed that is read; what fails is tried again at the next change."""
    files = [folder / name for folder in folders for name in (history.LOG, history.CHECKPOINT)]
    before = None
    while True:
        began, now = time.monotonic(), [_mark(file) for file in files]
        if now != before:
            try:
                print(draw(config, folders, target), flush=True)
            except (UserError, OSError) as why:
                print(f"waiting: {why}", file=sys.stderr, flush=True)
            before = now
        time.sleep(max(SECONDS, REST * (time.monotonic() - began)))


def _mark(file: Path) -> tuple[int, int] | None:
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size


def main(config: PlotConfig) -> None:
    """Draw once, or again and again."""
    folders = list({Path(name).resolve(): Path(name) for name in config.runs}.values())
    if not folders:
        folders = [history.newest()]
        print(f"the newest run: {folders[0]}", file=sys.stderr)
    target = config.out or str((folders[0] if len(folders) == 1 else Path()) / f"metrics.{config.format}")
    read_runs(folders)  # a wrong name is said before anything waits
    require_writable(target, "out")
    if config.watch:
        watch(config, folders, target)
    print(draw(config, folders, target))


if __name__ == "__main__":
    run_script(main, CONFIG)
