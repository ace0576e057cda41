"""Comparison with the golden files: losses, flags, exit codes, names in files, an old run and an old dataset.

Only command lines and files are used, so that these tests do not depend on the modules. tests/golden/make.py, which
writes the golden files, uses the functions above the tests.
"""

import csv
import json
import pickletools
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from forked import Scripts
from in_process import first_fast

GOLDEN = Path(__file__).resolve().parent / "golden"
RUNS = ("float16", "accumulation", "ranks", "muon")
COLUMNS = ("train_loss", "val_loss", "lr", "loss_scale")
SCRIPTS = ("train", "eval", "infer", "export", "prepare_data", "plot", "app", "bench")


def load(name: str):
    """A golden file's content."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def furnish(home: Path) -> Path:
    """Fill a folder with what the calls read: recipes, text, the old dataset and run, and damaged copies of them."""
    for path in (*GOLDEN.glob("*.toml"), GOLDEN / "bottles.txt"):
        shutil.copy(path, home)
    if (GOLDEN / "data").exists():  # not there yet when make.py writes it
        shutil.copytree(GOLDEN / "data", home / "data")
        shutil.copytree(GOLDEN / "data/bottles", home / "data/cut")
        shard = home / "data/cut/val_000000.bin"
        shard.write_bytes(shard.read_bytes()[:-2])
    if (GOLDEN / "run").exists():
        shutil.copytree(GOLDEN / "run", home / "out/ranks", symlinks=True)
        shutil.copytree(GOLDEN / "run", home / "broken", symlinks=True)
        for weights in home.glob("broken/ckpt/iter_*/model.safetensors"):
            weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (home / "empty.txt").touch()
    (home / "latin1.txt").write_bytes("Käse".encode("latin-1"))
    (home / "prompts.txt").write_text("3 green\n2 green\n")
    (home / "choices.jsonl").write_text('{"ctx": "3 green", "endings": ["bottles", "grass"], "label": 0}\n')
    return home


# ---------------------------------------------------------------------------------------------------------------------
# what is compared


def read_log(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def columns(rows: list[dict[str, str]]) -> dict[str, list[float]]:
    """The logged numbers that depend only on recipe and data, by column; empty cells are left out."""
    return {key: [float(row[key]) for row in rows if row[key]] for key in COLUMNS}


def train(scripts: Scripts, home: Path, name: str) -> dict[str, list[float]]:
    """Train a recipe and read its log."""
    line = f"train --config {name}.toml --out_dir out/new"
    results = scripts.run_ranks(line, home, 2) if name == "ranks" else [scripts.run(line, home)]
    assert [result.code for result in results] == [0] * len(results), results
    return columns(read_log(home / "out/new"))


def read_help(text: str) -> dict[str, dict]:
    """Each flag in a script's --help all: its form or allowed values, and default."""
    entries = []
    for line in text.splitlines():
        if re.match(r"  \S", line):  # a flag's help begins in column 35, on a line of its own after a long flag
            entries.append([line[2:34].strip(), line[35:]] if line[34:35] in (" ", "") else [line.strip(), ""])
        elif line.startswith(" " * 35):
            entries[-1][1] = f"{entries[-1][1]} {line.strip()}".strip()
    flags = {}
    for flag, text in entries:
        name, _, value = flag.partition(" ")
        entry = flags[name.removeprefix("--").removeprefix("[no-]").removeprefix("no-")] = {}
        if name.startswith("--") and not value:
            value = "true|false"
        elif not name.startswith("--"):
            value = f"{value} {text.rpartition(': ')[2]}" if ": " in text else value
        if text.endswith("]"):
            value, default = value.removesuffix(text[text.rindex(" [") :]), text[text.rindex(" [") + 2 : -1]
            entry["default"] = default
        entry["value"] = value.strip()
    return flags


def call(scripts: Scripts, home: Path, row: dict) -> dict:
    """Make a call of calls.json; its exit code, which streams it wrote to, and the number of `error:` lines."""
    result = scripts.run(row["call"], home, row.get("stdin", ""))
    lines = result.stderr.splitlines()
    found = {"code": result.code, "stdout": bool(result.stdout), "stderr": bool(result.stderr)}
    found["errors"] = sum(line.startswith("error: ") for line in lines)
    for word in row.get("names", ()):
        assert word in result.stderr, result
    assert "Traceback" not in result.stderr, result.stderr
    return found


def paths(value, prefix: str = "") -> set[str]:
    """The keys of nested dicts, and of the dicts in lists, as dotted paths."""
    if isinstance(value, list):
        return set().union(*(paths(item, f"{prefix}[]") for item in value), set())
    if not isinstance(value, dict):
        return set()
    found = set()
    for key, item in value.items():
        path = f"{prefix}.{key}" if prefix else key
        found |= {path} | paths(item, path)
    return found


def files(folder: Path) -> set[str]:
    """Names of the files in a folder, except for hidden files."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def strings(train_state: Path) -> set[str]:
    """The strings in a train_state.pt that are identifiers, among them its keys; read without torch."""
    with zipfile.ZipFile(train_state) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        return {
            arg for op, arg, _ in pickletools.genops(archive.read(name)) if "UNICODE" in op.name and arg.isidentifier()
        }


def tensors(weights: Path) -> set[str]:
    """Name, type and shape of each tensor in a file of safetensors."""
    with open(weights, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {f"{name} {t['dtype']} {t['shape']}" for name, t in header.items() if name != "__metadata__"}


def run(scripts: Scripts, home: Path, line: str) -> str:
    """The standard output of a call that has to succeed."""
    result = scripts.run(line, home)
    assert result.code == 0, result
    return result.stdout


def names_of_train(scripts: Scripts, home: Path) -> dict[str, set[str]]:
    line = "train --config muon.toml --max_iters 2 --eval_interval 1 --sample_tokens 4 --out_dir out/new"
    run(scripts, home, line)
    new, last = home / "out/new", home / "out/new/ckpt/last"
    samples = (new / "samples.txt").read_text(encoding="utf-8").splitlines()
    return {
        "run folder": files(new),
        "config.toml": set(re.findall(r"^(\w+) = ", (new / "config.toml").read_text(encoding="utf-8"), re.M)),
        "metrics.csv": set(read_log(new)[0]),
        "samples.txt": {re.sub(r"[\d.]+", "N", line) for line in samples if line.startswith("===")},
        "ckpt folder": files(new / "ckpt") & {"last", "best", "iter_000002"},
        "checkpoint folder": files(last),
        "state.json": paths(json.loads((last / "state.json").read_text())),
        "train_state.pt": strings(last / "train_state.pt"),
        "model.safetensors": tensors(last / "model.safetensors"),
    }


def names_of_prepare_data(scripts: Scripts, home: Path) -> dict[str, set[str]]:
    run(scripts, home, PREPARE)
    folder = home / "data/new"
    return {"dataset folder": files(folder), "meta.json": paths(json.loads((folder / "meta.json").read_text()))}


def names_of_eval(scripts: Scripts, home: Path) -> dict[str, set[str]]:
    found = {"report": json.loads(run(scripts, home, "eval --device cpu --json -"))}
    two = "eval --device cpu --model_path out/ranks out/ranks/ckpt/last --choices choices.jsonl --json -"
    found["report of two on questions"] = json.loads(run(scripts, home, two))
    return {name: paths(report) for name, report in found.items()}


def names_of_infer(scripts: Scripts, home: Path) -> dict[str, set[str]]:
    return {"report": paths(json.loads(run(scripts, home, "infer --device cpu --max_new_tokens 2 --json -")))}


def names_of_export(scripts: Scripts, home: Path) -> dict[str, set[str]]:
    run(scripts, home, "export --out exported")
    folder = home / "exported"
    found = {"folder": files(folder), "model.safetensors": tensors(folder / "model.safetensors")}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        found[name] = paths(json.loads((folder / name).read_text(encoding="utf-8")))
    return found


def names_of_bench(scripts: Scripts, home: Path) -> dict[str, set[str]]:
    words = "--config ranks.toml --warmup_updates 1 --timed_updates 2 --rounds 1 --json -"
    return {what: paths(json.loads(run(scripts, home, f"bench {what} {words}"))) for what in ("train", "save")}


PREPARE = (
    "prepare_data text --input bottles.txt --name new --tokenizer byte --val_fraction 0.1 --test_fraction 0.1 "
    "--shard_tokens 4000 --workers 1"
)
NAMES = {
    "train": names_of_train,
    "prepare_data": names_of_prepare_data,
    "eval": names_of_eval,
    "infer": names_of_infer,
    "export": names_of_export,
    "bench": names_of_bench,
}


def subset(report, golden):
    """The part of a report whose keys the golden report has."""
    if isinstance(golden, dict):
        return {key: subset(report[key], value) for key, value in golden.items()}
    if isinstance(golden, list):
        return [subset(*pair) for pair in zip(report, golden, strict=True)]
    return report


def near(value, tolerance: float):
    """The value with pytest.approx around each float, for a comparison."""
    if isinstance(value, dict):
        return {key: near(item, tolerance) for key, item in value.items()}
    if isinstance(value, list):
        return [near(item, tolerance) for item in value]
    return pytest.approx(value, rel=tolerance, abs=0) if isinstance(value, float) else value


# ---------------------------------------------------------------------------------------------------------------------
# tests


@pytest.fixture
def home(tmp_path):
    return furnish(tmp_path)


@pytest.mark.parametrize("name", first_fast(RUNS))
def test_first_50_losses(scripts, home, name):
    golden, found = load(f"{name}.json"), train(scripts, home, name)
    first_ten, all_of_them = golden["tolerance"]  # the rounding errors of half precision grow with each update
    expected = golden["columns"]
    assert len(expected["train_loss"]) == len(expected["lr"]) == 50
    assert found["train_loss"][:10] == near(expected["train_loss"][:10], first_ten)
    assert found == near(expected, all_of_them)


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_of(scripts, tmp_path, name):
    golden = load("help.json")[name]
    assert len(golden) >= 5
    found = read_help(run(scripts, tmp_path, f"{name} --help all"))
    for flag, entry in golden.items():
        allowed, now = (set(re.split("[|, ]+", of[flag]["value"])) for of in (golden, found))
        assert allowed <= now, flag
        assert found[flag] | {"value": entry["value"]} == entry, flag


@pytest.mark.parametrize("row", load("calls.json"), ids=lambda row: row["call"])
def test_call(scripts, home, row):
    golden = {key: value for key, value in row.items() if key not in ("call", "stdin", "names")}
    assert call(scripts, home, row) == golden


@pytest.mark.parametrize("name", NAMES)
def test_names_in_what_it_writes(scripts, home, name):
    found = NAMES[name](scripts, home)
    for what, golden in load("names.json")[name].items():
        assert set(golden) <= found[what], what


@pytest.mark.parametrize("row", load("reports.json"), ids=lambda row: row["call"])
def test_report_on_the_old_run(scripts, home, row):
    report = json.loads(run(scripts, home, row["call"]))
    assert subset(report, row["report"]) == near(row["report"], row["tolerance"])


@pytest.mark.parametrize(
    ("words", "first", "start"), [("--resume", 0, 40), ("--resume out/ranks/ckpt/best --out_dir out/again", 10, 10)]
)
def test_old_run_resumes_with_the_golden_losses(scripts, home, words, first, start):
    """On one rank; the golden losses are those of two."""
    golden, before = load("ranks.json"), read_log(home / "out/ranks")
    run(scripts, home, f"train --config ranks.toml --max_iters 50 {words}")
    rows = read_log(home / ("out/again" if "out/again" in words else "out/ranks"))
    assert [int(row["iter"]) for row in rows] == list(range(first, 51))
    old = [{key: row[key] for key in before[0]} for row in rows]  # columns may be added
    assert old[: start - first] == before[first:start]
    after = columns([row for row in rows if int(row["iter"]) > start])
    assert len(after["train_loss"]) == 50 - start
    expected = {key: values[len(values) - len(after[key]) :] for key, values in golden["columns"].items()}
    assert after == near(expected, golden["tolerance"][1])


def test_text_becomes_the_same_dataset(scripts, home):
    """meta.json names the encoder since then, and no longer counts words, which nothing read."""
    run(scripts, home, PREPARE)
    for old in (home / "data/bottles").glob("*.bin"):
        assert (home / "data/new" / old.name).read_bytes() == old.read_bytes(), old.name
    old, new = (json.loads((home / "data" / name / "meta.json").read_text()) for name in ("bottles", "new"))
    assert new.pop("encoder") == "tiktoken"
    for split in old["splits"].values():
        del split["words"]
    assert new == old
