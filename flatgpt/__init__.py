"""The parts that flatGPT's scripts share, a folder a concern."""

from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parent.parent
