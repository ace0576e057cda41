"""Log a run to Weights & Biases, TensorBoard or trackio as well. An error of a tracker never ends the run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import secrets
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from config import TrainConfig, first_line

SAMPLE_COLUMNS = ["iter", "prompt", "text"]


def guarded(method: Callable) -> Callable:
    """Return a tracker's method that prints its exceptions, such as that of a full disk, as a warning."""

    @functools.wraps(method)
    def call(self, *args):
        try:
            method(self, *args)
        except Exception as error:  # the trackers' exceptions have no common base class
            self.warn(error)

    return call


class Tracker:
    """Logs nothing. Base class of the trackers.

    Args:
        run_dir: the run's folder.
        ids: {key of state.json: id with which a tracker continues the run, or None}. `start` sets the tracker's own.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, ids: dict[str, str | None]):
        self.config, self.run_dir, self.ids, self._warned = config, run_dir, dict(ids), False
        self._hooks = contextlib.ExitStack()  # removes the hooks that a tracker has set

    def warn(self, error: BaseException) -> None:
        """Print the first error as a warning, above the progress bar."""
        if not self._warned:
            text = f"{self.config.tracker}: {first_line(error).rstrip('.')}; the missing data is in {self.run_dir}"
            tqdm.write(f"warning: {text}", file=sys.stderr)
        self._warned = True

    def _set_hook(self, module, name: str, hook: Callable) -> None:
        self._hooks.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, hook)

    def start(self, start_iter: int) -> None:
        """Start or continue the tracker's run, without prompting.

        Args:
            start_iter: 0, or the iteration that the run resumes from.
        """

    def log(self, row: dict) -> None:
        """Log a row of metrics.csv, without its empty cells."""

    def log_samples(self, rows: Sequence[Sequence]) -> None:
        """Log samples: rows of SAMPLE_COLUMNS."""

    def log_picture(self, i: int, path: Path) -> None:
        """Log the picture of the run, a PNG file."""

    def finish(self) -> None:
        """Write what is left, and end the tracker's run."""
        self._hooks.close()


class WandbTracker(Tracker):
    """Weights & Biases. Without an API key or network, it logs offline; `wandb sync` uploads the run later."""

    picture = "metrics"  # key of the picture

    def start(self, start_iter):
        import wandb

        self.module = wandb
        settings = {"id": self.ids["wandb_id"], "resume": "allow", "config": dataclasses.asdict(self.config)}
        settings |= {"name": self.run_dir.absolute().name, "project": self.config.wandb_project}
        settings |= {"dir": str(self.run_dir), "settings": wandb.Settings(init_timeout=30, silent=True)}
        for mode in ("online", "offline") if self.config.wandb == "online" else ("offline",):
            try:
                if mode == "online" and not wandb.login(prompt=False, verify=False):
                    raise wandb.errors.UsageError("no API key (wandb login, or WANDB_API_KEY)")
                self.run = wandb.init(mode=mode, **settings)
                break
            except Exception as error:
                wandb.teardown()  # otherwise its service still holds the run's id
                if mode == "offline":
                    raise
                text = f"warning: wandb online: {first_line(error)}; logging offline, wandb sync uploads it"
                print(text, file=sys.stderr)
        self.run.define_metric("*", step_metric="iter")  # not step=: wandb drops rows of a lower step after a resume
        self.ids["wandb_id"] = self.run.id

    def _log(self, i: int, values: dict) -> None:
        self.run.log({"iter": i, **values})

    @guarded
    def log(self, row):
        self._log(row["iter"], row)

    @guarded
    def log_samples(self, rows):
        self._log(rows[0][0], {"samples": self.module.Table(SAMPLE_COLUMNS, rows)})

    @guarded
    def log_picture(self, i, path):
        self._log(i, {self.picture: self.module.Image(str(path))})

    @guarded
    def finish(self):
        self.run.finish()


class TrackioTracker(WandbTracker):
    """trackio, whose objects are those of wandb. Its database is in TRACKIO_DIR, by default in Hugging Face's cache.

    Nothing is sent unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says where to.
    """

    picture = "picture"  # trackio renames `metrics`

    def start(self, start_iter):
        import huggingface_hub.constants as hub
        import trackio

        self.module, self._show_warning, offline = trackio, warnings.showwarning, hub.HF_HUB_OFFLINE
        self._set_hook(warnings, "showwarning", self._take_warning)
        # trackio continues runs by name. The next run in a folder of this name is another one.
        name = self.ids["trackio_id"] or f"{self.run_dir.absolute().name}-{secrets.token_hex(3)}"
        settings = {"project": self.config.wandb_project, "config": dataclasses.asdict(self.config), "embed": False}
        local = not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))
        hub.HF_HUB_OFFLINE = offline or local  # otherwise it asks huggingface.co for the user's name
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.run = trackio.init(name=name, resume="allow", **settings)
        finally:
            hub.HF_HUB_OFFLINE = offline
        self.ids["trackio_id"] = name

    def _take_warning(self, message, category, filename, *args, **kwargs) -> None:
        """Print trackio's warnings, also those of its threads, like the errors of the other trackers."""
        if Path(filename).parent == Path(self.module.__file__).parent:
            self.warn(message)
        else:
            self._show_warning(message, category, filename, *args, **kwargs)

    def _log(self, i, values):
        self.run.log({"iter": i, **values}, step=i)

    @guarded
    def finish(self):
        with self._hooks, contextlib.redirect_stdout(io.StringIO()):
            self.module.finish()


class TensorBoardTracker(Tracker):
    """TensorBoard: event files in the run's folder. Readers ignore what earlier ones hold from start_iter on."""

    def start(self, start_iter):
        import tensorboard  # noqa: F401 - torch needs it
        from torch.utils.tensorboard import SummaryWriter

        excepthook = threading.excepthook
        # SummaryWriter's thread prints a traceback of its error, and the next call raises it
        hook = lambda args: None if "_AsyncWriter" in type(args.thread).__name__ else excepthook(args)  # noqa: E731
        self._set_hook(threading, "excepthook", hook)
        self.writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=start_iter)
        settings = "\n".join(f"{key} = {value}" for key, value in dataclasses.asdict(self.config).items())
        self.writer.add_text("config", as_code(settings), start_iter)

    @guarded
    def log(self, row):
        for key, value in row.items():
            if key != "iter":
                self.writer.add_scalar(key, value, row["iter"])
        self.writer.flush()  # a run that is killed has its rows on the disk

    @guarded
    def log_samples(self, rows):
        self.writer.add_text("samples", "\n\n---\n\n".join(as_code(text) for *_, text in rows), rows[0][0])
        self.writer.flush()

    @guarded
    def log_picture(self, i, path):
        from matplotlib.image import imread

        self.writer.add_image("metrics", imread(path), i, dataformats="HWC")

    @guarded
    def finish(self):
        with self._hooks:
            self.writer.close()


def as_code(text: str) -> str:
    """Return a text as a code block of Markdown, in which its lines stay as they are."""
    return textwrap.indent(text, "    ", lambda line: True)


TRACKERS = {None: Tracker, "wandb": WandbTracker, "tensorboard": TensorBoardTracker, "trackio": TrackioTracker}


def start_tracker(config: TrainConfig, run_dir: Path, start_iter: int, ids: dict[str, str | None]) -> Tracker:
    """Start the tracker that config.tracker names. If that fails, print a warning and return one that logs nothing."""
    tracker = TRACKERS[config.tracker](config, run_dir, ids)
    try:
        tracker.start(start_iter)
        return tracker
    except Exception as error:
        tracker._hooks.close()
        remedy = f" (to install it: pip install {config.tracker})" if isinstance(error, ImportError) else ""
        text = f"{config.tracker}: {first_line(error).rstrip('.')}; continuing without it{remedy}"
        print(f"warning: {text}", file=sys.stderr)
        return Tracker(config, run_dir, ids)
