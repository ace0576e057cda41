"""eval.py against lm-evaluation-harness, which reads the folder that export.py writes; without a network."""

import contextlib
import json
import socket
from pathlib import Path

import pytest
import torch
import transformers
from in_process import TEXT, make_dataset, train_here
from test_multiple_choice import ENCODINGS, MERGES, QUESTIONS, T, V
from test_windows import FIRST, START, batches, read

import eval as verb
import export
from config import EvalConfig, ExportConfig
from flatgpt.cli import cli
from flatgpt.evaluation.multiple_choice import encode_pairs, log_likelihoods
from flatgpt.interop.loading import read_weights
from flatgpt.interop.pretrained import read_config
from model import GPT

pytestmark = pytest.mark.extra("lm_eval", "accelerate")

# Of several windows and of one that is not full; no white space at an end, where the harness counts a word.
LONG, SHORT = TEXT[1000:1400].strip(), "3 green bottles 🎈"
TASK_QUESTIONS = [
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


def our_log_likelihood(text: str) -> float:
    """eval.py's, of the run itself."""
    Path("text.txt").write_text(text, encoding="utf-8")
    got = report("--model_path", "out/quickstart", "--text", "text.txt", "--protocol", "rolling")
    assert got["iter"] == 300
    return -got["loss"] * got["tokens"]


def their_log_likelihood(reader, text: str) -> float:
    from lm_eval.api.instance import Instance

    return reader.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)[0]


# Bytes are tokens: one less than a window has, as many and one more, two windows, and one more.
TEXTS = {"several windows": LONG, "one": SHORT} | {f"{n} tokens": "x" + LONG[: n - 1] for n in (31, 32, 33, 64, 65)}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_rolling_log_likelihood_equals_the_harness(reader, text):
    assert our_log_likelihood(text) == pytest.approx(their_log_likelihood(reader, text), rel=1e-5)


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
    figures = report("--model_path", "exported", "--text", "text.txt", "--protocol", "rolling")
    assert figures["bits_per_byte"] == pytest.approx(got["bits_per_byte,none"], rel=1e-5)
    assert figures["word_perplexity"] == pytest.approx(got["word_perplexity,none"], rel=1e-3)
    assert 0 < figures["bits_per_byte"] < 4


def test_accuracies_equal_a_task_of_the_harness(reader, tmp_path):
    got = evaluated(reader, tmp_path, "local_choices", TASK_QUESTIONS)
    figures = report("--model_path", "exported", "--choices", tmp_path / "local_choices.jsonl")
    assert figures["choice_accuracy"] == got["acc,none"]
    assert figures["choice_accuracy_norm"] == got["acc_norm,none"]
    assert figures["choice_accuracy"] not in (0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# pieces of it, without a run


def test_rolling_windows_equal_the_harness():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for width in range(1, 9):
        for length in range(1, 40):
            text = list(range(START, START + length))
            rolling = get_rolling_token_windows(text, FIRST, max_seq_len=width, context_len=1)
            # a context, and what is predicted after it; the model reads both but for the last id
            pairs = [((context + scored)[:-1], scored) for context, scored in map(make_disjoint_window, rolling)]
            assert read(batches(text, width, "rolling", width, 3)) == pairs


def their_tokenizer(folder: Path, use_regex: bool) -> transformers.PreTrainedTokenizerFast:
    """ENCODINGS as transformers has them."""

    def spell(raw: bytes) -> str:
        """Hugging Face writes byte b as a printable character."""
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        return "".join(chr(b) if b in printable else chr(256 + others.index(b)) for b in raw)

    merges = [(spell(a), spell(b)) for a, b in MERGES]
    vocabulary = {spell(bytes([b])): b for b in range(256)} | {a + b: 256 + n for n, (a, b) in enumerate(merges)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    settings = {"version": "1.0", "pre_tokenizer": level, "decoder": level}
    settings["model"] = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    file = str(folder / "tokenizer.json")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>")


@pytest.mark.parametrize("name", ENCODINGS)
def test_log_likelihoods_equal_the_harness(tmp_path, name):
    """Without blank contexts, which the harness refuses, and special tokens, which it encodes as such."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": T, "vocab_size": V, "bos_token_id": 262}
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, eos_token_id=262)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.3)
    reference.save_pretrained(tmp_path)
    model = GPT(read_config(str(tmp_path)))
    model.load_state_dict(read_weights(tmp_path, model.config))
    reader = HFLM(reference, tokenizer=their_tokenizer(tmp_path, name == "words"), batch_size=3, device="cpu")
    questions = [q for q in QUESTIONS if q.ctx != " \n" and "<|" not in q.ctx]
    asked = [(q.ctx, f" {ending}") for q in questions for ending in q.endings]
    answers = reader.loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(asked)])
    pairs = [pair for q in questions for pair in encode_pairs(ENCODINGS[name], q)]
    assert log_likelihoods(model, pairs, torch.from_numpy).tolist() == pytest.approx([a for a, _ in answers], rel=1e-5)
