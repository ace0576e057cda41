"""The Python cells of the documentation, in one namespace a file, as a notebook runs them."""

import re
from pathlib import Path

import pytest
from in_process import TINY
from processes import ROOT

# Files with cells. Their models are in out/, and made by the fixture below.
NOTEBOOKS = ("docs/inference_library.md",)


@pytest.fixture
def trained(cli, tiny_data):
    """A tiny model in out/shakespeare."""
    done = cli("train", *TINY, "--out_dir", "out/shakespeare")
    assert done.code == 0, done


def cells(file: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", file.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_run_as_they_stand(trained, capsys, name):
    namespace: dict = {}
    found = cells(ROOT / name)
    assert len(found) > 3
    for cell in found:
        exec(compile(cell, name, "exec"), namespace)
    shown = capsys.readouterr().out
    assert len(namespace["texts"]) == 3
    assert f"{namespace['loss']:.3f} nats per token" in shown
    assert shown.endswith("temperature = -1: at least 0 is expected\n")
