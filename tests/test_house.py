"""The house's own rules: who imports whom, what is declared, what is read, and what --help leaves unloaded."""

import ast
import re
import subprocess
import sys
import typing

import pytest
from conftest import ROOT

import cli

VERBS = {"prepare_data", "train", "eval", "infer", "export", "bench", "plot", "app"}
# What each module imports of the house, besides the configs and (verbs only) cli: DESIGN's arrows.
ARROWS = {
    "config": set(),
    "cli": {"pretrained"},
    "data_config": set(),
    "reader_config": set(),
    "bpe": set(),
    "tokenizer": {"bpe"},
    "shards": {"tokenizer"},
    "dataset": {"tokenizer", "shards"},
    "documents": {"tokenizer"},
    "hub": {"shards"},
    "repositories": {"hub", "documents", "shards"},
    "sources": {"documents", "repositories", "shards"},
    "tasks": {"tokenizer", "documents"},
    "workers": set(),
    "plan": {"documents", "shards", "sources", "tasks"},
    "progress": {"dataset", "documents", "shards"},
    "preparation": {
        *("tokenizer", "shards", "dataset", "repositories", "sources", "tasks", "workers", "plan", "progress")
    },
    "latency": {"checkpoint", "decoder", "model", "packing", "runtime", "sampling", "tokenizer"},
    "strided": {"dataset", "formats", "metrics", "model", "packing", "protocols", "runtime", "trained"},
    "throughput": {"tokenizer", "documents", "sources", "workers"},
    "model": {"fused_loss"},
    "fused_loss": set(),
    "feed": set(),
    "muon": set(),
    "speed": {"runlog"},
    "peer": {"dataset", "precision", "runtime", "speed"},
    "precision": {"outputs", "runtime"},
    "time_to_loss": {"dataset", "peer", "runtime", "speed"},
    "suites": {"dataset", "outputs", "peer", "runtime"},
    "checks": {"peer", "runtime"},
    "packing": {"model", "precision", "runtime"},
    "decoder": {"model", "runtime"},
    "sampling": {"decoder", "runtime"},
    "pretrained": {"formats", "model_hub", "vocabulary"},
    "formats": {"model"},
    "checkpoint": {"shards", "model"},
    "trained": {"checkpoint", "formats", "model", "pretrained", "tokenizer"},
    "vocabulary": {"tokenizer"},
    "model_hub": {"hub"},
    "choices": {"metrics", "model"},
    "continuation": {"decoder", "sampling", "shards"},
    "card": {"model_hub", "repositories"},
    "history": set(),
    "samples": {"decoder", "run", "runtime", "sampling"},
    "listing": {"claim", "history"},
    "curves": set(),
    "chart": {"curves", "history"},
    "space": {"card", "checkpoint", "model_hub", "tokenizer", "trained"},
    "resume": {"checkpoint", "claim", "muon", "optim", "parallel", "run", "runtime", "shards"},
    "claim": set(),
    "saver": {"checkpoint"},
    "health": {"dataset", "ranks"},
    "metrics": set(),
    "outputs": set(),
    "protocols": {"shards"},
    "words": {"shards"},
    "report": {"metrics", "words"},
    "runlog": {"outputs"},
    "optim": {"muon"},
    "runtime": set(),
    "ranks": set(),
    "parallel": {"ranks"},
    "run": {
        *("budget", "dataset", "feed", "health", "model", "optim", "parallel", "precision", "preparation"),
        *("pretrained", "ranks", "runlog", "runtime", "tokenizer", "trained"),
    },
    "budget": {"fused_loss", "model", "runlog"},
}
WITHOUT_TORCH = ("config", "cli", "prepare_data", "throughput")  # and with the last two all of the data side
# Packages that are not in requirements.txt, and who uses them where they are installed.
OPTIONAL = {
    "app": {"gradio"},
    "checks": {"pytest"},  # bench.py tests runs it
    "continuation": {"sacrebleu", "rouge_score"},
    "latency": {"gguf", "llama_cpp", "transformers"},  # bench.py infer measures beside them
    "strided": {"transformers"},
    "throughput": {"datasets"},
    "workers": {"distributed"},
}
LIGHT = ("torch", "numpy", "tiktoken", "wandb", "matplotlib", "pyarrow", "huggingface_hub", "distributed", "gradio")
MODULES = sorted(p.stem for p in ROOT.glob("*.py"))


def imports(name: str) -> set[str]:
    """Top-level names of all that a module imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", MODULES)
def test_import_arrows(name):
    house = imports(name) & set(MODULES)
    if name in VERBS:
        allowed = set(ARROWS) | {"bench": {"train"}, "app": {"infer"}}.get(name, set())
        assert house <= allowed, f"{name}.py imports {house - allowed}"
    else:
        assert name in ARROWS, f"{name}.py is new: give it a place in ARROWS"
        assert house - {"config", "data_config", "reader_config"} == ARROWS[name]


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_data_side_never_loads_torch(name):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_readme_names_every_module():
    named = set(re.findall(r"^(\w+)\.py  ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M))
    assert named == set(MODULES) - {"data_config", "reader_config"}  # config.py's line has these


def declared(file: str) -> set[str]:
    """Package names in a requirements file, -r lines followed."""
    found = set()
    for line in (ROOT / file).read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            found |= declared(line[3:])
        elif line:
            package = re.split(r"[<>=!~\[ ]", line)[0].lower()
            found.add({"scikit-learn": "sklearn"}.get(package, package.replace("-", "_")))  # as it is imported
    return found


def third_party(names: set[str]) -> set[str]:
    return {n for n in names if n not in sys.stdlib_module_names and n not in MODULES}


def test_packages_imported_are_packages_declared():
    base, dev, extra = (declared(f"requirements{name}.txt") for name in ("", "-dev", "-extra"))
    used = {name: third_party(imports(name)) for name in MODULES}
    assert {name: found - base for name, found in used.items() if found - base} == OPTIONAL
    assert base <= set().union(*used.values()), "a requirement that nothing imports"
    tests = {p.stem for p in (ROOT / "tests").glob("*.py")}
    in_tests = third_party(set().union(*(imports(f"tests/{name}") for name in tests))) - tests - {"tiktoken_ext"}
    optional = set().union(*OPTIONAL.values())
    assert extra - dev <= optional | in_tests, "an extra that nothing imports"
    # llama-cpp-python compiles for a quarter of an hour: nothing declares it
    assert optional | in_tests <= extra | {"llama_cpp"}


def test_every_config_field_is_read_somewhere():
    """A flag that nothing reads is a lie. A field counts as read where some module has `.field` in an expression."""
    read = set()
    for name in MODULES:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    for cls in cli.VERBS:
        assert set(typing.get_type_hints(cls)) <= read, cls


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_is_light_and_names_every_key(verb):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{verb}.py', '--help']\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"try: runpy.run_path({str(ROOT / f'{verb}.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: print('exit', end.code)\n"
        f"print('loaded', [m for m in {LIGHT!r} if m in sys.modules])\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.endswith("exit 0\nloaded []\n"), answer
    cls = next(c for c in cli.VERBS if c.__doc__.startswith(f"{verb}.py"))
    for field in typing.get_type_hints(cls):
        assert field in answer.stdout
    assert f"python {verb}.py" in answer.stdout


def test_help_into_a_closed_pipe_is_no_traceback():
    words = [sys.executable, str(ROOT / "train.py"), "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
