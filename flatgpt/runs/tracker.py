"""Start a run on Weights & Biases."""

from __future__ import annotations

import sys
from pathlib import Path

from config import first_line


def start_wandb(mode: str, project: str, run_dir: Path, config: dict, run_id: str | None = None):
    """Start a wandb run without prompting; return None for mode `disabled` or if wandb fails.

    Without an API key or network, `online` becomes `offline` with a warning; `wandb sync` uploads the run later.

    Args:
        run_id: wandb id of the run to resume, so that its curves continue.
    """
    if mode == "disabled":
        return None
    try:
        import wandb
    except Exception as error:  # not installed, or a broken installation
        text = f"warning: wandb: {first_line(error)}; continuing without it (to install it: pip install wandb)"
        print(text, file=sys.stderr)
        return None

    settings = {"project": project, "name": run_dir.name, "id": run_id, "resume": "allow", "config": config}
    settings |= {"dir": str(run_dir), "settings": wandb.Settings(init_timeout=30, silent=True)}
    for attempt in ("online", "offline") if mode == "online" else ("offline",):
        try:
            if attempt == "online" and not wandb.login(prompt=False, verify=False):
                raise wandb.errors.UsageError("no API key (wandb login, or WANDB_API_KEY)")
            run = wandb.init(mode=attempt, **settings)
            run.define_metric("*", step_metric="iter")  # not step=: wandb drops rows of a lower step after a resume
            return run
        except Exception as error:  # UsageError, CommError, and other errors without a common base class
            fallback = "logging offline, wandb sync uploads it" if attempt == "online" else "continuing without wandb"
            print(f"warning: wandb {attempt}: {first_line(error)}; {fallback}", file=sys.stderr)
            wandb.teardown()  # otherwise its service still holds the run's id
    return None
