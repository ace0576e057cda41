"""Break the product on purpose, one line at a time, and list the changes that no test notices. It takes minutes.

python tests/mutate.py                               # all of them; exit code 1 where one survives or is stale
python tests/mutate.py --only best --only secrets    # some of them
python tests/mutate.py --list

Each change is made in a copy of the tracked files, as the working tree has them. The tests that its row names have to
pass without the change. With it, they give the verdict: killed if one fails, survived if all pass or are skipped,
broken if they hang or cannot be collected. A change is stale if its old text does not occur exactly once in its file.
"""

import argparse
import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds for the tests of one change, against hanging


class Mutation(NamedTuple):
    """A row of mutations.txt: a change of one line, the promise that it breaks, and the tests that should fail."""

    file: str
    name: str
    promise: str
    old: str
    new: str
    tests: list[str]


def read_table() -> list[Mutation]:
    """Read mutations.txt. A row has the lines `FILE NAME: PROMISE`, `- OLD TEXT`, `+ NEW TEXT` and indented tests."""
    table = Path(__file__).with_name("mutations.txt").read_text(encoding="utf-8")
    pattern = r"^(\S+) (\S+): (.+)\n- (.+)\n\+ (.+)\n((?:  .+\n)+)"
    found = [
        Mutation(*groups[:5], [f"tests/{test}" for test in groups[5].split()])
        for groups in re.findall(pattern, table, re.M)
    ]
    assert len(found) == table.count("\n- "), "a row of mutations.txt cannot be parsed"
    return found


def copy_repository(folder: Path) -> Path:
    """Copy the tracked files, as they are in the working tree."""
    names = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def run_tests(folder: Path, tests: list[str]) -> tuple[int | None, str]:
    """Run tests in a copy; pytest's exit code, None where it took too long, and its output."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "", "-rfEs", "-p", "no:cacheprovider", *tests]
    # no bytecode: it would be reused after a change of the file within the same second
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder.parent)}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(words, cwd=folder, env=env, text=True, start_new_session=True, **streams)
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def try_mutation(mutation: Mutation, folder: Path) -> tuple[str, str]:
    """Make the change in a copy, run its tests and undo it. Returns the verdict and details of it."""
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(mutation.old) != 1:
        return "stale", f"its old text occurs {text.count(mutation.old)} times in {mutation.file}"
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        code, output = run_tests(folder, mutation.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    if code == 1:
        return "killed", "; ".join(re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", output, re.M)[:1])
    if code == 0:
        return "survived", mutation.promise
    return "broken", "its tests hang" if code is None else f"pytest ends with {code}: {output[-500:]}"


def main() -> int:
    """Try the changes and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="try this change; may be given several times")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="changes to try at once")
    parser.add_argument("--list", action="store_true", help="print names and promises")
    options = parser.parse_args()
    table = read_table()
    if unknown := set(options.only or ()) - {mutation.name for mutation in table}:
        parser.error(f"no such change: {', '.join(sorted(unknown))}")
    chosen = [mutation for mutation in table if not options.only or mutation.name in options.only]
    if options.list:
        print("\n".join(f"{mutation.name:<22} {mutation.promise}" for mutation in chosen))
        return 0
    with tempfile.TemporaryDirectory(prefix="mutate_") as temporary:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(min(options.jobs, len(chosen))):
            copies.put(copy_repository(Path(temporary, str(number), "copy")))
        tests = sorted({test for mutation in chosen for test in mutation.tests})
        code, output = run_tests(Path(temporary, "0", "copy"), tests)
        if code != 0 or re.search(r"^SKIPPED ", output, re.M):
            print(output, "error: without any change, these tests have to pass and none may be skipped", sep="\n")
            return 1

        def one(mutation: Mutation) -> str:
            folder, began = copies.get(), time.monotonic()
            verdict, details = try_mutation(mutation, folder)
            copies.put(folder)
            print(f"{verdict:<9}{mutation.name:<22}{time.monotonic() - began:5.0f} s  {details}", flush=True)
            return verdict

        with ThreadPoolExecutor(copies.qsize()) as pool:
            verdicts = list(pool.map(one, chosen))
    counts = {verdict: verdicts.count(verdict) for verdict in ("killed", "survived", "broken", "stale")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(counts["killed"] < len(verdicts))


if __name__ == "__main__":
    sys.exit(main())
