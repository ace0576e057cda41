"""Write the files of this folder anew, from what the scripts do now.

python tests/golden/make.py losses help calls names reports    # or some of them
python tests/golden/make.py data run                           # made once, by commit 0832fec: do not replace them

Only for an issue that asks for a change of behaviour, in a commit that names it. Kept are `call`, `stdin` and
`names` of calls.json, and `call`, `tolerance` and the keys of `report` of reports.json. To add a row, write these by
hand; this script fills in the rest.
"""

import hashlib
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "support")]
import test_golden as golden  # noqa: E402
from forked import Scripts  # noqa: E402

# Emulated CPUs: smaller instruction sets for torch's own kernels, for oneDNN, for MKL, and for all of them.
CPUS = [
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    {"MKL_CBWR": "COMPATIBLE"},
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
]


def text_of(value, indent: str = "") -> str:
    """JSON; a value that does not fit on one line has one item per line."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) <= 200 or not isinstance(value, dict | list):
        return line
    inner = indent + " "
    if isinstance(value, list):
        items = [text_of(item, inner) for item in value]
    else:
        items = [f"{json.dumps(key)}: {text_of(item, inner)}" for key, item in value.items()]
    return line[0] + ",".join(f"\n{inner}{item}" for item in items) + f"\n{indent}{line[-1]}"


def write(name: str, value) -> None:
    """Write a golden file."""
    (HERE / name).write_text(text_of(value) + "\n", encoding="utf-8")


def fresh() -> Path:
    """A new folder with the files that the calls read."""
    return golden.furnish(Path(tempfile.mkdtemp(dir=TEMPORARY)))


def deviations(found: dict[str, list[float]], base: dict[str, list[float]]) -> list[float]:
    """The largest relative deviation among the first ten training losses, and among all numbers."""
    found = {key: [abs(a - b) / abs(b) for a, b in zip(found[key], base[key], strict=True)] for key in base}
    return [float(f"{max(values):.1e}") for values in (found["train_loss"][:10], itertools.chain(*found.values()))]


def losses(scripts: Scripts) -> None:
    """Write the losses. The tolerance is ten times the largest deviation seen, at least 1e-6 (float32's resolution)."""
    base = {name: golden.train(scripts, fresh(), name) for name in golden.RUNS}
    seen = {name: {} for name in golden.RUNS}
    for env in CPUS:
        other = Scripts(env)
        for name in golden.RUNS:
            key = " ".join(f"{variable}={value}" for variable, value in env.items())
            seen[name][key] = deviations(golden.train(other, fresh(), name), base[name])
        other.close()
    for name in golden.RUNS:
        tolerance = [max(1e-6, float(f"{10 * max(each):.0e}")) for each in zip(*seen[name].values(), strict=True)]
        write(f"{name}.json", {"tolerance": tolerance, "deviations": seen[name], "columns": base[name]})


def flags(scripts: Scripts) -> None:
    write("help.json", {s: golden.read_help(golden.run(scripts, fresh(), f"{s} --help all")) for s in golden.SCRIPTS})


def calls(scripts: Scripts) -> None:
    rows = golden.load("calls.json")
    kept = ("call", "stdin", "names")
    rows = [{key: row[key] for key in kept if key in row} for row in rows]
    write("calls.json", [row | golden.call(scripts, fresh(), row) for row in rows])


def names(scripts: Scripts) -> None:
    found = {script: function(scripts, fresh()) for script, function in golden.NAMES.items()}
    write("names.json", {s: {what: sorted(names) for what, names in each.items()} for s, each in found.items()})


def reports(scripts: Scripts) -> None:
    rows = golden.load("reports.json")
    for row in rows:
        row["report"] = golden.subset(json.loads(golden.run(scripts, fresh(), row["call"])), row["report"])
    write("reports.json", rows)


def data(scripts: Scripts) -> None:
    home = fresh()
    golden.run(scripts, home, golden.PREPARE)
    shutil.copytree(home / "data/new", HERE / "data/bottles")


def run(scripts: Scripts) -> None:
    """A run of 40 updates; the name of the CPU is replaced."""
    home = fresh()
    golden.run(scripts, home, "train --config ranks.toml --max_iters 40 --sample_tokens 8")
    for path in (home / "out/ranks/ckpt").glob("iter_*/state.json"):
        state = json.loads(path.read_text(encoding="utf-8")) | {"cpu": "a CPU"}
        del state["sha256"]
        state["sha256"] = hashlib.sha256(json.dumps(state).encode()).hexdigest()
        path.write_text(json.dumps(state, indent=1), encoding="utf-8")
    left_out = shutil.ignore_patterns(".lock", "metrics.png")
    shutil.copytree(home / "out/ranks", HERE / "run", symlinks=True, ignore=left_out)


PARTS = {"data": data, "run": run, "losses": losses, "help": flags, "calls": calls, "names": names, "reports": reports}

if __name__ == "__main__":
    if not sys.argv[1:] or set(sys.argv[1:]) - set(PARTS):
        sys.exit(f"{__doc__}\nparts: {', '.join(PARTS)}")
    shared = Scripts()
    with tempfile.TemporaryDirectory() as TEMPORARY:
        for part in sys.argv[1:]:
            PARTS[part](shared)
    shared.close()
