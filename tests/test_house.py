"""The house's own rules: who imports whom, what is declared, what is read, and what --help leaves unloaded."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import typing
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from mutate import read_table
from processes import ROOT

from config import SCRIPT_CONFIGS

SCRIPTS = ("prepare_data", "train", "eval", "infer", "export", "plot", "app", "bench")
# What the modules of each folder import of this repository besides config.py and their own folder: DESIGN's arrows.
ARROWS = {
    "config": set(),
    "model": {"kernels"},
    "cli": set(),
    "kernels": set(),
    "runtime": set(),
    "data": {"runtime"},
    "runs": {"model", "runtime"},
    "inference": {"data", "model", "runtime"},
    "evaluation": {"data", "inference", "model", "runtime"},
    "interop": {"data", "model", "runs", "runtime"},
    "training": {"data", "evaluation", "inference", "interop", "kernels", "model", "runs", "runtime"},
}
# Methods of model.py that delegate: the folder that each may import when it is called.
DELEGATES = {"from_pretrained": "interop", "generate": "inference"}
ALLOWED = set(ARROWS) - {"config"}
ARROWS["flatgpt"] = {"cli", "data", "evaluation", "inference", "interop", "model", "runtime"}  # flatgpt.load
ARROWS["benchmarks"] = ALLOWED
ARROWS |= dict.fromkeys(SCRIPTS, ALLOWED)
ARROWS["bench"] = ALLOWED | {"benchmarks", "train"}
# The standard library, numpy, tiktoken and pyarrow are enough for the data side, and imports of what it lacks are slow.
WITHOUT_TORCH = ("config", "prepare_data", "flatgpt.cli.cli", "flatgpt.runtime.files", "flatgpt.benchmarks.data")
# Packages that are not in requirements.txt, and which modules use them where they are installed.
OPTIONAL = {
    "app": {"gradio"},
    "flatgpt.benchmarks.suites": {"pytest"},  # bench.py tests runs it
    "flatgpt.benchmarks.data": {"datasets"},
    # bench.py infer measures beside them
    "flatgpt.benchmarks.inference": {"ctranslate2", "gguf", "llama_cpp", "transformers"},
    "flatgpt.data.encode": {"gigatoken"},
    "flatgpt.data.tokenizer_training": {"tokenizers"},
    "flatgpt.data.workers": {"distributed"},
    "flatgpt.inference.api": {"starlette"},
    "flatgpt.evaluation.continuations": {"sacrebleu", "rouge_score"},
    "flatgpt.runs.trackers": {"tensorboard", "trackio"},
}
LIGHT = ("torch", "numpy", "tiktoken", "wandb", "matplotlib", "pyarrow", "huggingface_hub", "distributed", "gradio")
FILES = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "flatgpt").rglob("*.py"))]
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
DATA_SIDE = [name for name in MODULES if name.startswith("flatgpt.data.") and not name.endswith("__init__")]


def imported(file: Path, function: str | None = None) -> set[str]:
    """Full names of all that a module, or one of its functions, imports, at any depth of its code."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if function:
        (tree,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(file)}


def place(name: str) -> str:
    """The folder of flatgpt/ that a module is in, or the module itself on the top level."""
    parts = name.split(".")
    in_folder = parts[0] == "flatgpt" and len(parts) > 2 and (ROOT / "flatgpt" / parts[1]).is_dir()
    return parts[1] if in_folder else parts[0]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_import_arrows(name):
    names = imported(MODULES[name])
    if name == "model":
        for function, folder in DELEGATES.items():
            inside = imported(MODULES[name], function)
            assert {place(each) for each in inside} == {folder}
            names -= inside
        names.remove("flatgpt.inference.decoder.KVCache")  # for annotations, under TYPE_CHECKING
    house = {place(each) for each in names if each.split(".")[0] in {"flatgpt", *MODULES}}
    assert house - {"flatgpt", "config", place(name)} <= ARROWS[place(name)]


def test_data_side_never_loads_torch():
    names = ", ".join([*WITHOUT_TORCH, *DATA_SIDE])
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_model_on_the_meta_device_loads_no_compiler():
    """Random numbers on the meta device import torch._dynamo, which takes a second."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from model import GPT; from config import ModelConfig; "
    code += "GPT.on_meta_device(ModelConfig(vocab_size=99, tie_weights=False)); print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_readme_names_every_module():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^ *(\w+)(?:\.py|/) ", text, re.M)
    files = {name for name in MODULES if "." not in name}
    folders = {file.parent.name for file in MODULES.values() if file.parent.parent.name == "flatgpt"}
    assert files | folders <= set(named)


def test_agents_md_is_short_and_names_paths_that_exist():
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    paths = re.findall(r"(?:flatgpt|tests|docs)/[a-z_/]*(?:\.\w+)?", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def package_of(requirement: str) -> str:
    """The name of a package, as it is imported."""
    package = re.split(r"[<>=!~\[ ]", requirement)[0].lower()
    return {"scikit-learn": "sklearn"}.get(package, package.replace("-", "_"))


def requirements(file: str) -> set[str]:
    """The lines of a requirements file, -r lines followed, without comments."""
    found = set()
    for line in (ROOT / file).read_text().splitlines():
        line = line.split("#")[0].strip()
        found |= requirements(line[3:]) if line.startswith("-r ") else {line} if line else set()
    return found


def declared(file: str) -> set[str]:
    """Package names in a requirements file, -r lines followed."""
    return set(map(package_of, requirements(file)))


def third_party(names: set[str]) -> set[str]:
    return names - sys.stdlib_module_names - {"flatgpt", "tiktoken_ext", *MODULES}  # tiktoken_ext is tiktoken's


def test_packages_imported_are_packages_declared():
    base, dev, extra = (declared(f"requirements{name}.txt") for name in ("", "-dev", "-extra"))
    used = {name: third_party(packages(file)) - {"tiktoken_ext"} for name, file in MODULES.items()}  # of tiktoken
    assert {name: found - base for name, found in used.items() if found - base} == OPTIONAL
    assert base <= set().union(*used.values()), "a requirement that nothing imports"
    tests = [*(ROOT / "tests").rglob("*.py")]
    in_tests = third_party(set().union(*map(packages, tests))) - {file.stem for file in tests}
    optional = set().union(*OPTIONAL.values())
    assert extra - dev <= optional | in_tests, "an extra that nothing imports"
    # llama-cpp-python compiles for a quarter of an hour: nothing declares it
    assert optional | in_tests <= extra | {"llama_cpp"}


def test_pyproject_names_the_packages_of_the_requirements_files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base, dev = declared("requirements.txt"), declared("requirements-dev.txt")
    extras = {name: set(map(package_of, lines)) for name, lines in project["optional-dependencies"].items()}
    assert set(map(package_of, project["dependencies"])) == base
    assert extras.pop("dev") == dev - base
    optional = set().union(*(OPTIONAL[name] for name in OPTIONAL if not name.startswith("flatgpt.benchmarks")))
    assert set().union(*extras.values()) == optional, "what the scripts import where it is installed"
    ranges = {*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())}
    # requirements.txt pins torch
    assert {line for line in ranges - requirements("requirements-extra.txt") if package_of(line) != "torch"} == set()


def test_an_installed_flatgpt_has_every_module_and_recipe(tmp_path):
    """The wheel that `pip install .` makes, without its download of setuptools, which torch depends on."""
    for name in ("flatgpt", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in (*ROOT.glob("*.py"), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))):
        shutil.copy(path, tmp_path)
    code = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    paths = (*FILES, *ROOT.glob("configs/*.toml"), *ROOT.glob("flatgpt/**/*.toml"))
    assert {path.relative_to(ROOT).as_posix() for path in paths} <= set(zipfile.ZipFile(wheel).namelist())


def test_mutations_can_be_made_and_their_tests_exist():
    for row in read_table():
        assert (ROOT / row.file).read_text(encoding="utf-8").count(row.old) == 1, f"{row.name} is stale: {row.old}"
        for test in row.tests:
            path, _, function = re.sub(r"\[.*", "", test).partition("::")
            text = (ROOT / path).read_text(encoding="utf-8")
            assert f"def {function}(" in text if function else text, f"{row.name}: {test}"


def test_every_config_field_is_read_somewhere():
    """A flag that nothing reads is a lie. A field counts as read where some module has `.field` in an expression."""
    read = set()
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    for cls in SCRIPT_CONFIGS:
        assert set(typing.get_type_hints(cls)) <= read, cls


@pytest.mark.parametrize("verb", SCRIPTS)
def test_help_is_light_and_names_every_key(verb):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{verb}.py', '--help', 'all']\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"try: runpy.run_path({str(ROOT / f'{verb}.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: print('exit', end.code)\n"
        f"print('loaded', [m for m in {LIGHT!r} if m in sys.modules])\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.endswith("exit 0\nloaded []\n"), answer
    cls = next(c for c in SCRIPT_CONFIGS if c.__doc__.startswith(f"{verb}.py"))
    for field in typing.get_type_hints(cls):
        assert field in answer.stdout
    assert f"python {verb}.py" in answer.stdout
