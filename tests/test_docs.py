"""README.md and docs/: their length, links, tables and commands.

All commands are read by their scripts' own parsers. Those that need neither a network nor a GPU run, at toy size.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from in_process import TEXT, make_dataset
from processes import ROOT

from config import SCRIPT_CONFIGS, TrainConfig
from flatgpt.cli import settings
from flatgpt.runs.history import gpt2_parameters

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LOGS = {"speed.md", "reliability.md"}  # may be longer than the others
CONFIGS = {cls.__doc__.partition(".py")[0]: cls for cls in SCRIPT_CONFIGS}
# Records the words of each command after bash has expanded them, in place of running it.
RECORD = r"""
.() { :; }
cd() { :; }
command_not_found_handle() { printf '%s\x1e' "$@" $'\x1d' >&3; }
PATH=/none
"""
OTHERS = {
    "pip",
    "torchrun",
    "hf",
    "curl",
    "lm_eval",
    "ct2-transformers-converter",
    "llama-cli",
    "dask",
    "git",
    "sbatch",
}
OTHERS |= {"coverage", "head", "ruff", "tensorboard", "trackio", "uv"}


class Command(NamedTuple):
    """A command of a script.

    Args:
        page: name of the page.
        script: name of the script, without .py.
        words: its arguments.
        ranks: number of processes under torchrun; 0: without it.
    """

    page: str
    script: str
    words: list[str]
    ranks: int = 0

    def __str__(self):
        return f"{self.page}: {self.script}.py {shlex.join(self.words)}"


def blocks(page: Path) -> list[tuple[str, str]]:
    """The language and the text of each code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def shell_lines(page: Path) -> str:
    """All shell commands of a page: the blocks of sh, and the lines after $ in other blocks."""
    texts = [
        text if language == "sh" else "\n".join(re.findall(r"^\$ (.*)$", text, re.M)) for language, text in blocks(page)
    ]
    return "\n".join(texts)


def recorded(page: Path) -> list[list[str]]:
    """The words of each command on a page."""
    script = ["bash", "--norc", "-c", f"exec 3>&1 >/dev/null\n{RECORD}{shell_lines(page)}"]
    with tempfile.TemporaryDirectory() as folder:  # a command may write its output to a file
        answer = subprocess.run(
            script, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=folder, timeout=60
        )
    assert answer.stderr == "", f"{page.name}: {answer.stderr}"
    return [call.split("\x1e")[:-1] for call in answer.stdout.split("\x1d\x1e")[:-1]]


def commands(page: Path) -> list[Command]:
    """The commands of our scripts on a page."""
    found = []
    for program, *words in recorded(page):
        at = next((n for n, word in enumerate(words) if re.fullmatch(r"(\w+)\.py", word)), None)
        if program == "sbatch":
            found.append(Command(page.name, "train", words[words.index("docs/slurm.sh") + 1 :]))
        elif at is not None and words[at][:-3] in CONFIGS:
            assert program in ("python", "torchrun") or words[:at] == ["run", "--no-sync"], words
            ranks = re.search(r"--nproc_per_node=(\d)", shlex.join(words)) if program == "torchrun" else None
            found.append(Command(page.name, words[at][:-3], words[at + 1 :], int(ranks[1]) if ranks else 0))
        else:
            assert program in OTHERS or program.startswith("python"), f"{page.name}: what is {program}?"
    return found


COMMANDS = [command for page in PAGES for command in commands(page)]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1600


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_page_opens_with_commands_and_is_short(page):
    text = page.read_text(encoding="utf-8")
    assert page.name in LOGS or len(text.split()) < 1200
    assert page.name in LOGS or re.match(r"# .+\n\n```sh\n", text)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "AGENTS.md"], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)|<img src=\"([^\":]+)\"", text)
    assert [link for pair in links for link in pair if link and not (page.parent / link).exists()] == []


def test_table_of_recipes_is_that_of_their_meta():
    rows = []
    for path in settings.RECIPES.glob("*.toml"):
        meta = tomllib.loads(path.read_text(encoding="utf-8"))["meta"]
        config = TrainConfig(**settings.read_recipe(TrainConfig, path.stem, []))
        size = 1e99 if config.init_from else gpt2_parameters(config) or 0
        figures = [str(meta.get(key, "–")) for key in ("time", "bits_per_byte", "verified")]
        cells = [f"`{path.stem}`", meta["about"], meta["hardware"], *figures]
        rows.append(("verified" not in meta, size, f"| {' | '.join(cells)} |\n"))
    table = "".join(row for *_, row in sorted(rows))
    assert table in (ROOT / "README.md").read_text(encoding="utf-8"), table


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_is_understood(command):
    """Settings of a run, such as --resume, are not looked up."""
    settings.parse(CONFIGS[command.script], command.words)


# ---------------------------------------------------------------------------------------------------------------------
# at toy size

SMALL = {
    "train": "--eval_tokens 32 --sample_tokens 0 --device cpu --dtype float32 --optimizer adamw --n_layer 1 --n_head 1 "
    "--n_embd 16 --context_length 16 --batch_size 2 --max_iters 4",
    "resume": "--max_iters 61 --sample_tokens 0",
    "eval": "--eval_tokens 32 --device cpu",
    "infer": "--max_new_tokens 4 --device cpu --dtype float32",
}
SIZES = {"bpe:8192": "bpe:300", "100": "2"}
# why a command of a script does not run here
NETWORK = r"prepare_data (wikitext103|wikipedia|fineweb|hub)\b|\bgpt2\b|user/model|--push user/name --private$"
# needs another program or a GPU, measures, or serves until Ctrl-C
OTHER = r"^(app|bench) |--watch|--wandb|--tracker wandb|nanoGPT|~/models|--interactive|cuda:1"
PACKAGES = {
    "--generate": ("sacrebleu", "rouge_score"),
    "bpe:": ("tokenizers",),
    "--tracker": ("tensorboard", "trackio"),
}
RUNS = ("shakespeare", "a", "b", "mine", "char_1", "wikitext103_22m")
TEXTS = ("book.txt", "notes/a.md", "papers/b.md", "hindi/c.txt", "more/d.txt", "chats/e.txt")


def runnable(command: Command) -> bool:
    line = f"{command.script} {shlex.join(command.words)}"
    raw = "FLATGPT_TEST_DATA" in os.environ or "prepare_data shakespeare" not in line
    return raw and not re.search(f"{NETWORK}|{OTHER}", line) and command.ranks <= 2


@pytest.fixture
def home(tiny_home, in_tmp) -> Path:
    """A current folder with the datasets, runs and files that the pages name."""
    shutil.copytree(tiny_home, in_tmp, symlinks=True, dirs_exist_ok=True)
    for name in RUNS:
        shutil.copytree("out/quickstart", f"out/{name}", symlinks=True, dirs_exist_ok=True)
    for name in ("pydoc", "shakespeare", "shakespeare_byte", "mine", "wikitext103", "hindi", "fineweb", "fineweb_92m"):
        make_dataset(in_tmp, name, test_fraction=0.1)
    if raw := os.environ.get("FLATGPT_TEST_DATA"):
        shutil.copytree(Path(raw) / "shakespeare", "data/raw/shakespeare")
    for name in TEXTS:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(TEXT, encoding="utf-8")
    Path("prompts.txt").write_text("one\ntwo\n")
    return in_tmp


def toy_words(command: Command, number: int) -> list[str]:
    """The words of a command with its sizes replaced by small ones."""
    words = [SIZES.get(word, word) for word in command.words]
    if command.script == "train" and not {"--list", "--plan", "--show_batch"} & {*words}:
        resumed = "--resume" in words and words[words.index("--resume") + 1] != "auto"
        return [
            *words,
            *SMALL["resume" if resumed else "train"].split(),
            *([] if resumed else ["--out_dir", f"new/{number}"]),
        ]
    if command.script == "prepare_data" and words[0] in ("shakespeare", "text"):
        words.append("--overwrite")
    return [*words, *SMALL.get(command.script, "").split()]


@pytest.mark.parametrize(
    "page",
    [PAGES[0], *(pytest.param(page, marks=pytest.mark.slow) for page in PAGES[1:])],
    ids=lambda page: page.name,
)
def test_commands_run(page, home, cli, ranks):
    """All of a page, one after the other, as a reader would run them."""
    found = [command for command in COMMANDS if command.page == page.name and runnable(command)]
    for number, command in enumerate(found):
        names = [name for part, needed in PACKAGES.items() if part in str(command) for name in needed]
        if all(map(importlib.util.find_spec, names)):
            words = toy_words(command, number)
            if command.ranks:
                done = ranks(command.ranks, *words, cwd=home, script=ROOT / f"{command.script}.py")
                assert done.code == 0, done.output
            else:
                done = cli(command.script, *words, stdin="Hello\n")
                assert done.code == 0, (str(command), done)


def test_cells_of_a_notebook_run_as_they_stand(home, capsys):
    """In one namespace, as a notebook runs them."""
    namespace: dict = {}
    cells = [text for language, text in blocks(ROOT / "docs/inference.md") if language == "python"]
    assert len(cells) > 3
    for cell in cells:
        exec(compile(cell, "inference.md", "exec"), namespace)
    shown = capsys.readouterr().out
    assert len(namespace["texts"]) == 3
    assert f"{namespace['loss']:.3f} nats per token" in shown
    assert namespace["fast"].generate("ROMEO:", max_new_tokens=50) in shown
    assert shown.endswith("temperature = -1: at least 0 is expected\n")
