"""eval.py against lm-evaluation-harness, which reads the folder that export.py writes; without a network."""

import contextlib
import itertools
import json
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from app_server import serving
from in_process import TEXT, make_dataset, train_here
from scoring import ENCODINGS, FIRST, QUESTIONS, rolling_loop

import eval as script
import export
from config import EvalConfig, ExportConfig
from flatgpt.cli import cli
from flatgpt.evaluation.multiple_choice import Question, encode_pairs, read_choices

pytestmark = pytest.mark.extra("lm_eval", "accelerate")

# Of several windows and of one that is not full; no white space at an end, where the harness counts a word.
LONG, SHORT = TEXT[1000:1400].strip(), "3 green bottles 🎈"
TASK_QUESTIONS = [
    {"ctx": "98 green bottles hanging on", "endings": ["the wall, and", "zzz", "Q"], "label": 0},
    {"ctx": "there will be", "endings": ["Q", "97 green bottles. Naïve café", "#!"], "label": 1},
    {"ctx": "if 5 green bottles should accidentally", "endings": ["fall, there", "of the", "X"], "label": 2},
    {"ctx": "hanging on the wall, and if", "endings": ["97 green bottles", "café"], "label": 1},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The current folder: out/quickstart, trained for 300 updates, and exported, which is the same model."""
    folder = tmp_path_factory.mktemp("lm_eval")
    make_dataset(folder)
    with contextlib.chdir(folder):
        train_here("--max_iters", 300, "--eval_interval", 300, "--lr", "5e-3", "--sample_tokens", 0)
        export.main(cli.parse(ExportConfig, ["--model_path", "out/quickstart", "--out", "exported"]))
    return folder


@pytest.fixture(scope="module")
def reader(home):
    """The harness's own reader of the exported folder, told no more than that."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(home / "exported"), device="cpu", dtype="float32", batch_size=1)


@pytest.fixture(autouse=True)
def in_home(home, monkeypatch) -> None:
    monkeypatch.chdir(home)
    connect = socket.socket.connect

    def connect_here(self, address):
        assert address[0] == "127.0.0.1", "the network was asked"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)


def report(*words) -> dict:
    script.main(cli.parse(EvalConfig, ["--device", "cpu", "--json", "report.json", *map(str, words)]))
    return json.loads(Path("report.json").read_text())


# Bytes are tokens: as many as a window has and one more.
@pytest.mark.parametrize("text", [LONG, SHORT, "x" + LONG[:31], "x" + LONG[:32]], ids=["long", "short", "32", "33"])
def test_rolling_log_likelihood_equals_the_harness(reader, text):
    """eval.py reads the run itself."""
    from lm_eval.api.instance import Instance

    Path("text.txt").write_text(text, encoding="utf-8")
    got = report("--model_path", "out/quickstart", "--text", "text.txt", "--protocol", "rolling")
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    theirs = reader.loglikelihood_rolling([request], disable_tqdm=True)[0]
    assert -got["loss"] * got["tokens"] == pytest.approx(theirs, rel=1e-5)


def test_documents_of_a_split_equal_the_harness(reader):
    """Each of them alone, after end-of-text; and the harness's own averages over words and bytes."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity

    texts = [LONG, SHORT, "x", LONG[:32], TEXT[:333].strip()]
    np.array([i for text in texts for i in [*text.encode(), 256]], "<u2").tofile("documents.bin")
    words = ["--test_data_path", "documents.bin", "--protocol", "rolling"]
    got = report("--model_path", "out/quickstart", *words)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    theirs = reader.loglikelihood_rolling(requests, disable_tqdm=True)
    per_word = [(nats, len(text.split())) for nats, text in zip(theirs, texts, strict=True)]
    per_byte = [(nats, len(text.encode())) for nats, text in zip(theirs, texts, strict=True)]
    assert (got["documents"], got["end_of_text_tokens"]) == (len(texts), 0)
    assert -got["loss"] * got["tokens"] == pytest.approx(sum(theirs), rel=1e-5)
    assert got["word_perplexity"] == pytest.approx(weighted_perplexity(per_word), rel=1e-4)
    assert got["bits_per_byte"] == pytest.approx(bits_per_byte(per_byte), rel=1e-5)
    assert 2 ** got["bits_per_byte"] == pytest.approx(weighted_perplexity(per_byte), rel=1e-5)  # byte_perplexity
    part = report("--model_path", "out/quickstart", *words, "--eval_tokens", len(LONG.encode()) + 1)
    assert (part["documents"], part["tokens"]) == (2, sum(size for _, size in per_byte[:2]))
    assert -part["loss"] * part["tokens"] == pytest.approx(sum(theirs[:2]), rel=1e-5)
    assert (part["bytes"], part["words"]) == tuple(sum(size for _, size in of[:2]) for of in (per_byte, per_word))


def test_accuracies_equal_a_task_of_the_harness(reader, tmp_path):
    """A task that a YAML file describes, and whose data is a file."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    data = tmp_path / "choices.jsonl"
    data.write_text("\n".join(map(json.dumps, TASK_QUESTIONS)))
    task = {"task": "choices", "output_type": "multiple_choice", "dataset_path": "json", "test_split": "test"}
    task["dataset_kwargs"] = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
    task |= {"doc_to_text": "{{ctx}}", "doc_to_choice": "endings", "doc_to_target": "label"}
    task["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
    (tmp_path / "choices.yaml").write_text(json.dumps(task))  # which is YAML
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(reader, tasks=["choices"], task_manager=manager, bootstrap_iters=0)["results"]
    ours = report("--model_path", "exported", "--choices", data)
    assert ours["choice_accuracy"] == results["choices"]["acc,none"] not in (0, 1)
    assert ours["choice_accuracy_norm"] == results["choices"]["acc_norm,none"]


@pytest.mark.extra("gradio", "tenacity")
def test_the_endpoint_of_app_is_a_model_of_the_harness(reader, home):
    """local-completions asks a running app.py, in batches; the answers are those of the exported folder."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    pairs = [(LONG[:20], LONG[20:27]), ("", SHORT), (SHORT, " on"), ("x", LONG[:31]), (LONG[:30], LONG[30:61])]
    pairs += [(q["ctx"], f" {ending}") for q in TASK_QUESTIONS for ending in q["endings"]]
    texts = [(LONG,), (SHORT,), ("x",), (LONG[:32],), (LONG[:33],)]
    until = [(LONG[:n], {"until": stop, "max_gen_toks": 12}) for n in (1, 9, 16) for stop in (["\n"], ["e", "ll"])]
    with serving(home, "--model_path", "out/quickstart", "--device", "cpu", "--dtype", "float32") as server:
        theirs = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model="any",
            tokenizer=str(home / "exported"),
            tokenizer_backend="huggingface",
            max_length=32 + 2,  # the context, one more that is only predicted, and the token that it always asks for
            batch_size=4,
            max_retries=1,
        )
        for kind, arguments in (("loglikelihood", pairs), ("loglikelihood_rolling", texts), ("generate_until", until)):
            requests = [Instance(kind, {}, each, 0) for each in arguments]
            got, expected = (getattr(model, kind)(requests, disable_tqdm=True) for model in (theirs, reader))
            if kind == "loglikelihood":
                assert [is_greedy for _, is_greedy in got] == [is_greedy for _, is_greedy in expected]
                got, expected = ([nats for nats, _ in answers] for answers in (got, expected))
            assert got == (expected if kind == "generate_until" else pytest.approx(expected, abs=1e-4)), kind


def test_texts_of_hellaswag_equal_the_harness(tmp_path):
    """Rows as in its validation split, of ActivityNet and of WikiHow, and some with unusual blanks and brackets."""
    from datasets import Dataset
    from lm_eval.tasks.hellaswag.utils import process_docs

    parts = [
        "A man is  on a roof.",
        "he",
        "",
        " [header] How to sing [title] Breathe. ",
        "éCOLE [x] and [y]",
        "a [b",
        "  ",
    ]
    rows = [
        {"ind": n, "activity_label": label, "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}", "label": str(n % 4)}
        | {"endings": [f"{a}.", f" [title] Then {b} [substeps] go.", "x  y", f"[step] {label}!"]}
        for n, (label, a, b) in enumerate(itertools.product(parts[:4], parts, parts))
    ]
    (tmp_path / "hellaswag.jsonl").write_text("\n".join(map(json.dumps, rows)))
    theirs = [(doc["query"], doc["choices"], doc["gold"]) for doc in process_docs(Dataset.from_list(rows))]
    questions, format = read_choices(tmp_path / "hellaswag.jsonl")
    assert (questions, format) == ([Question(*doc) for doc in theirs], "hellaswag")


def test_windows_and_borders_equal_the_harness():
    """The plain loop that test_metrics.py compares with; contexts and endings, but blank contexts, which it refuses."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for width in range(1, 9):
        for length in range(1, 40):
            text = list(range(100, 100 + length))
            rolling = get_rolling_token_windows(text, FIRST, max_seq_len=width, context_len=1)
            # a context, and what is predicted after it; the model reads both but for the last id
            pairs = [((context + scored)[:-1], scored) for context, scored in map(make_disjoint_window, rolling)]
            assert rolling_loop(text, width) == pairs
    for encoding in ENCODINGS.values():
        theirs = SimpleNamespace(backend="causal", tok_encode=encoding.encode_ordinary)
        for question in (q for q in QUESTIONS if q.ctx.strip()):
            pairs = [TemplateLM._encode_pair(theirs, question.ctx, f" {ending}") for ending in question.endings]
            assert encode_pairs(encoding, question) == pairs
        assert encode_pairs(encoding, QUESTIONS[2])[2] == ([encoding.eot_token], encoding.encode(" x"))
