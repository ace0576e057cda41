"""eval.py beside lm-evaluation-harness, which reads the folder that export.py writes; without a network."""

import contextlib
import importlib.util
import json
import os
import socket
from pathlib import Path

import pytest
from in_process import TEXT, make_dataset, train_here

import eval as verb
import export
from config import EvalConfig, ExportConfig
from flatgpt.cli import cli
from flatgpt.evaluation import windows

pytestmark = pytest.mark.extra

# Of several windows and of one that is not full; no white space at an end, where the harness counts a word.
LONG, SHORT = TEXT[1000:1400].strip(), "3 green bottles 🎈"
QUESTIONS = [
    {"ctx": "98 green bottles hanging on", "endings": ["the wall, and", "zzz", "Q"], "label": 0},
    {"ctx": "there will be", "endings": ["Q", "97 green bottles. Naïve café", "#!"], "label": 1},
    {"ctx": "if 5 green bottles should accidentally", "endings": ["fall, there", "of the", "X"], "label": 2},
    {"ctx": "hanging on the wall, and if", "endings": ["97 green bottles", "café"], "label": 1},
]
SHARED = {"dataset_path": "json", "test_split": "test"}
TASKS = {
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "local_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{ctx}}",
        "doc_to_choice": "endings",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The current folder: out/quickstart, trained for 300 updates, and exported, which is the same model."""
    if missing := [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]:
        reason = f"{' and '.join(missing)}: not installed: pip install -r requirements-extra.txt"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    folder = tmp_path_factory.mktemp("lm_eval")
    make_dataset(folder)
    with contextlib.chdir(folder):
        train_here("--max_iters", 300, "--eval_interval", 300, "--lr", "5e-3", "--sample_tokens", 0)
        export.main(cli.parse(ExportConfig, ["--model_path", "out/quickstart", "--out", "exported"]))
    return folder


@pytest.fixture(autouse=True)
def in_home(home, monkeypatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr(socket.socket, "connect", lambda *words: pytest.fail("the network was asked"))


@pytest.fixture(scope="module")
def reader(home):
    """The harness's own reader of the exported folder, told no more than that."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(home / "exported"), device="cpu", dtype="float32", batch_size=1)


def report(*words) -> dict:
    verb.main(cli.parse(EvalConfig, ["--device", "cpu", "--json", "report.json", *map(str, words)]))
    return json.loads(Path("report.json").read_text())


def log_likelihood(text: str) -> float:
    """eval.py's, of the run itself."""
    Path("text.txt").write_text(text, encoding="utf-8")
    got = report("--model_path", "out/quickstart", "--text", "text.txt", "--protocol", "rolling")
    assert got["iter"] == 300
    return -got["loss"] * got["tokens"]


def theirs(reader, text: str) -> float:
    from lm_eval.api.instance import Instance

    return reader.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)[0]


# Bytes are tokens: one less than a window has, as many and one more, two windows, and one more.
TEXTS = {"several windows": LONG, "one": SHORT} | {f"{n} tokens": "x" + LONG[: n - 1] for n in (31, 32, 33, 64, 65)}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_rolling_log_likelihood_is_the_harnesss_own(reader, text):
    assert log_likelihood(text) == pytest.approx(theirs(reader, text), rel=1e-5)


def test_a_last_window_of_short_context_would_show(reader, monkeypatch):
    """The control: the same, but that the last window begins where the one before it ends."""
    right = theirs(reader, LONG)
    window = windows.Protocol.window

    def short(self, k: int) -> tuple[int, int, int]:
        return window(windows.Protocol(self.length, self.T, self.stride, full=False), k)

    assert len(LONG.encode()) % 32
    monkeypatch.setattr(windows.Protocol, "window", short)
    got = log_likelihood(LONG)
    assert abs(got / right - 1) > 1e-5
    assert got == pytest.approx(right, rel=0.1)  # and it is no more than that


def evaluated(reader, folder: Path, name: str, rows: list[dict]) -> dict:
    """What the harness reports of a task that a YAML file describes, and whose data is a file."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    task = {"task": name, **SHARED, "dataset_kwargs": kwargs, **TASKS[name]}
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # which is YAML
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(reader, tasks=[name], task_manager=manager, bootstrap_iters=0)["results"][name]


def test_figures_of_a_text_equal_a_task_of_the_harness(reader, tmp_path):
    got = evaluated(reader, tmp_path, "local_text", [{"text": LONG}])
    Path("text.txt").write_text(LONG, encoding="utf-8")
    ours = report("--model_path", "exported", "--text", "text.txt", "--protocol", "rolling")
    assert ours["bits_per_byte"] == pytest.approx(got["bits_per_byte,none"], rel=1e-5)
    assert ours["word_perplexity"] == pytest.approx(got["word_perplexity,none"], rel=1e-3)
    assert 0 < ours["bits_per_byte"] < 4


def test_accuracies_equal_a_task_of_the_harness(reader, tmp_path):
    got = evaluated(reader, tmp_path, "local_choices", QUESTIONS)
    ours = report("--model_path", "exported", "--choices", tmp_path / "local_choices.jsonl")
    assert ours["choice_accuracy"] == got["acc,none"]
    assert ours["choice_accuracy_norm"] == got["acc_norm,none"]
    assert ours["choice_accuracy"] not in (0, 1)
