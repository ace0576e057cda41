"""What a run says: the settings that need less memory, and where the picture's messages appear."""

import dataclasses
import io
import re

import pytest
from tqdm import tqdm

from config import TrainConfig
from flatgpt.runs import plots
from flatgpt.runs.run_log import RunLog
from flatgpt.training import reporting
from flatgpt.training.reporting import out_of_memory_message


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_smaller_batches_in_the_message_make_the_same_updates(world):
    pattern = r"--batch_size (\d+) --grad_accum_steps (\d+) \((\d+) sequences = ([\d,]+) tokens an update, as before\)"
    for batch_size in range(2, 26):
        for steps in range(world, 4 * world, world):
            config = TrainConfig(batch_size=batch_size, grad_accum_steps=steps)
            text = out_of_memory_message(config, "NVIDIA T4", 14.9, world)
            smaller, more, total, tokens = (int(n.replace(",", "")) for n in re.search(pattern, text).groups())
            assert smaller * more == total == batch_size * steps
            assert smaller < batch_size
            assert more % world == 0
            assert tokens == total * config.context_length
            assert batch_size % 2 or smaller == batch_size // 2, "half of it, where that exists"


SMALLER, REST = ["--batch_size", "--grad_accum_steps"], ["--context_length", "--plan"]


@pytest.mark.parametrize(
    ("world", "settings", "flags"),
    [
        (1, {}, [*SMALLER, "--activation_checkpointing", *REST]),
        (1, {"activation_checkpointing": True}, [*SMALLER, *REST]),
        (1, {"batch_size": 1}, ["--activation_checkpointing", *REST]),
        (2, {"grad_accum_steps": 2}, [*SMALLER, "--activation_checkpointing", "--fsdp", *REST]),
        (2, {"grad_accum_steps": 2, "fsdp": True}, [*SMALLER, "--activation_checkpointing", *REST]),
        (2, {"grad_accum_steps": 2, "optimizer": "muon"}, [*SMALLER, "--activation_checkpointing", *REST]),
    ],
)
def test_settings_that_need_less_memory_are_listed_unless_they_are_on(world, settings, flags):
    text = out_of_memory_message(dataclasses.replace(TrainConfig(), **settings), "NVIDIA T4", 14.9, world)
    assert text.startswith("NVIDIA T4 is out of memory at batch_size = ")
    assert "the peak was 14.90 GB" in text
    assert re.findall(r"--[a-z_]+", text) == flags


def test_messages_while_the_picture_is_drawn_stand_below_the_bar(tmp_path, monkeypatch, capsys):
    """On a terminal the bar's line has no end until it is closed."""
    log = RunLog(tmp_path, 0, 3)
    log.bar = tqdm(total=3, file=io.StringIO())
    monkeypatch.setattr(plots, "plot_runs", lambda histories: print("\n" in log.bar.fp.getvalue()))
    reporting.draw_picture(log, tmp_path)
    log.close()
    assert capsys.readouterr().out == "True\n"
