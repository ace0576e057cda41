"""flatgpt.load: the texts are those of infer.py, the loss is eval.py's, and wrong arguments are UserErrors."""

import gc
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import TEXT
from processes import ROOT
from scripted import save_model, scripted_model, zero_model

import flatgpt
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.sampling import NonFiniteLogitsError


@pytest.fixture
def model(tiny_home, monkeypatch):
    """The newest run, loaded with defaults; the current folder has its dataset."""
    monkeypatch.chdir(tiny_home)
    return flatgpt.load()


def words_of(options: dict) -> list[str]:
    """The flags of infer.py for options of generate."""
    words = []
    for key, value in options.items():
        words += [f"--{key}"] if value is True else [f"--{key}", *(value if isinstance(value, list) else [str(value)])]
    return words


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 5, "temperature": 1.2, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
        {"greedy": True, "max_new_tokens": 70},
        {"stop": ["e ", "on"], "temperature": 2},
        {"num_samples": 5, "batch_size": 2, "stop": ["bottle"], "seed": 2**63 - 1},
    ],
    ids=str,
)
def test_texts_are_those_of_infer(cli, model, options, tmp_path):
    """With the same settings: dtype auto, and 70 tokens exceed the context. `stream` gives the first of them."""
    options = {"max_new_tokens": 20, **options}
    report = str(tmp_path / "report.json")
    done = cli("infer", "--device", "cpu", "--prompt", "9 green", "--json", report, *words_of(options))
    assert done.code == 0, done
    expected = [text["text"] for text in json.loads(Path(report).read_text())["texts"]]
    found = model.generate("9 green", **options)
    assert found == (expected if "num_samples" in options else expected[0])
    pieces = list(model.stream("9 green", **{**options, "num_samples": 1}))
    assert "".join(pieces) == expected[0]
    assert all(pieces)
    assert len(pieces) > 1 or len(expected[0]) < 2


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"dtype": torch.float32}, {"quantize": "int8"}], ids=str)
def test_precision_of_generation(cli, tiny_home, monkeypatch, settings):
    """The model that is returned stays in float32."""
    monkeypatch.chdir(tiny_home)
    model = flatgpt.load("out/quickstart", **settings)
    words = words_of({key: str(value).removeprefix("torch.") for key, value in settings.items()})
    done = cli("infer", "--device", "cpu", "--prompt", "9 ", "--max_new_tokens", 9, *words)
    assert f"9 {model.generate('9 ', max_new_tokens=9)}\n" == done.out
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    assert isinstance(model.model.lm_head, torch.nn.Linear)


@pytest.mark.parametrize("text", [TEXT[:9], TEXT[:33], TEXT[:7000], "é 東🎈\r\n"])
def test_loss_is_evals(cli, model, tmp_path, text):
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode())
    done = cli("eval", "--device", "cpu", "--text", file, "--json", "-")
    assert model.loss(text) == pytest.approx(json.loads(done.out)["loss"], rel=1e-6)


def test_loss_by_hand(model):
    """Of windows that do not overlap, each scored from its own tokens."""
    ids, T, total = list(TEXT[:80].encode()), 32, 0.0
    for start in range(0, len(ids) - 1, T):
        window = torch.tensor(ids[start : start + T + 1])
        log_p = model.model(window[None, :-1]).log_softmax(-1)[0]
        total -= float(log_p.gather(1, window[1:, None]).sum().detach())
    assert model.loss(TEXT[:80]) == pytest.approx(total / 79, rel=1e-6)


def test_it_is_the_pair_of_model_and_tokenizer(model):
    plain, encoding = model
    assert (plain, encoding) == (model.model, model.tokenizer) == (model[0], model[1])
    assert encoding.name == "byte"
    assert not plain.training
    prompt = torch.tensor([encoding.encode("9 green")])
    ids = plain.generate(prompt, max_new_tokens=9, greedy=True)[0, 7:].tolist()
    assert encoding.decode(ids) == flatgpt.load(dtype="float32").generate("9 green", max_new_tokens=9, greedy=True)
    assert repr(model) == f"<flatGPT model {Path('out/quickstart/ckpt/iter_000060')}, iter 60: 34,720 parameters>"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_follows_the_weights(in_tmp, dtype):
    """Also after they were changed in place or replaced, and in a precision in which they are copied."""
    model = flatgpt.load(save_model(scripted_model("abcdefgh"), "out/one"), dtype=dtype)
    assert model.generate("p", max_new_tokens=3) == "abc"
    with torch.no_grad():
        model.model.lm_head.weight[ord("x"), 1] += 1000
    assert model.generate("p", max_new_tokens=3) == "axc"
    model.model.load_state_dict(scripted_model("hgfedcba").state_dict())
    assert model.generate("p", max_new_tokens=3) == "hgf"
    model.model.train()
    assert model.generate("p", max_new_tokens=3) == "hgf"
    assert model.model.training


def test_pieces_come_as_soon_as_they_are_known(in_tmp):
    model = flatgpt.load(save_model(scripted_model("naïve 東!"), "out/one"))
    assert list(model.stream("p", max_new_tokens=11)) == [*"naïve 東!"]
    assert list(model.stream("p", max_new_tokens=11, stop="東")) == [*"naïve "]
    assert list(model.stream("p", max_new_tokens=3)) == ["n", "a", "\ufffd"]


def test_closed_stream_ends_and_frees_its_memory(model, monkeypatch):
    """After three tokens of many; and one that was never started."""
    steps, real = [], Decoder.decode_step
    monkeypatch.setattr(
        Decoder, "decode_step", lambda self, tokens: steps.append(weakref.ref(self)) or real(self, tokens)
    )
    stream = model.stream("9 green", max_new_tokens=1000)
    for _ in range(3):
        next(stream)
    made, (decoder,) = len(steps), set(steps)
    gc.disable()
    try:
        stream.close()
        assert decoder() is None  # and with it the cache of keys and values
    finally:
        gc.enable()
    assert next(stream, "end") == "end"
    assert len(steps) == made < 10
    model.stream("9 green").close()
    assert len(model.generate("9 green", max_new_tokens=5)) > 0


def test_streams_can_be_interleaved_and_used_in_threads(model):
    """In a thread no signal handler can be set. Each text is that of its own seed."""
    expected = [model.generate("9 ", max_new_tokens=20, seed=seed) for seed in range(4)]
    streams = [model.stream("9 ", max_new_tokens=20, seed=seed) for seed in range(4)]
    texts = [""] * 4
    while pieces := [next(stream, "") for stream in streams]:
        if not any(pieces):
            break
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == expected
    found = [None] * 4

    def work(seed: int) -> None:
        found[seed] = model.generate("9 ", max_new_tokens=20, seed=seed), model.loss("9 green")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [(text, model.loss("9 green")) for text in expected]


def test_nothing_is_printed_to_standard_output(model, capsys):
    model.generate("9 green", max_new_tokens=100)
    model.loss(TEXT)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "the context holds 32" in shown.err


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"temperature": -1}, ["temperature = -1", "at least 0"]),
        ({"temperature": "hot"}, ["temperature = 'hot'", "a number is expected"]),
        ({"top_p": 0, "top_k": 2.5}, ["top_p = 0", "more than 0", "top_k = 2.5", "a whole number is expected"]),
        ({"seed": True}, ["seed = True", "a whole number"]),
        ({"seed": None}, ["seed = None", "a whole number"]),
        ({"max_new_tokens": 0}, ["max_new_tokens = 0", "at least 1"]),
        ({"greedy": True, "top_k": 3}, ["greedy", "leave out top_k"]),
        ({"stop": ""}, ["stop = ''", "non-empty"]),
        ({"stop": [1]}, ["stop = [1]", "strings"]),
        ({"stop": 3}, ["stop = 3", "strings"]),
        ({"prompt": 5}, ["prompt = 5", "a string is expected"]),
        ({"temprature": 1}, ["temprature: no such option", "did you mean temperature?"]),
        ({"max_tokens": 5}, ["max_tokens: no such option", "did you mean max_new_tokens?"]),
        ({"json": "a.json"}, ["json: no such option", "temperature, greedy"]),
        ({"device": "cpu"}, ["device: no such option", "flatgpt.load"]),
    ],
    ids=str,
)
def test_wrong_options(model, options, parts):
    """One line, at the call; also of a stream, before its first piece."""
    for call in (model.generate, model.stream):
        with pytest.raises(flatgpt.UserError) as caught:
            call(**options)
        assert all(part in str(caught.value) for part in parts), caught.value
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda m: flatgpt.load("nowhere"), ["nowhere", "no such folder"]),
        (lambda m: flatgpt.load(3), ["model_path = 3", "a string is expected"]),
        (lambda m: flatgpt.load(device="gpu"), ["device = 'gpu'", "auto, cuda"]),
        (lambda m: flatgpt.load(dtype="half"), ["dtype = 'half'", "bfloat16"]),
        (lambda m: flatgpt.load(dtype="float32", quantize="int8"), ["quantize = int8"]),
        (lambda m: flatgpt.load(context_length=0), ["context_length = 0", "at least 1"]),
        (lambda m: flatgpt.load(context_length=99), ["99", "32"]),
        (lambda m: m.stream("a", num_samples=2), ["num_samples = 2", "generate"]),
        (lambda m: m.loss(""), ["0 tokens", "at least 2"]),
        (lambda m: m.loss("a"), ["1 token;", "at least 2"]),
        (lambda m: m.loss(b"abc"), ["text = b'abc'", "a string is expected"]),
    ],
)
def test_wrong_arguments(model, call, parts):
    with pytest.raises(flatgpt.UserError) as caught:
        call(model)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_values_that_notebooks_have(model, tiny_run):
    """Paths, devices of torch and scalars of numpy; None where it is infer.py's default."""
    same = flatgpt.load(tiny_run, torch.device("cpu"), dtype=torch.float32)
    options = {"temperature": np.float32(0.5), "top_k": np.int64(5), "seed": np.int64(3), "stop": None}
    plain = flatgpt.load(dtype="float32").generate("9 ", temperature=0.5, top_k=5, seed=3, max_new_tokens=9)
    assert same.generate("9 ", max_new_tokens=9, **options) == plain
    assert model.generate("9 ", max_new_tokens=5, temperature=None) == model.generate("9 ", max_new_tokens=5)


def test_logits_that_are_not_finite(in_tmp):
    """A stream gives the pieces before them."""
    broken = scripted_model("abcdefgh")
    broken.transformer.wpe.weight.data[3] = float("nan")
    model, pieces = flatgpt.load(save_model(broken, "out/broken"), dtype="float32"), []
    with pytest.raises(NonFiniteLogitsError, match="out/broken"):
        pieces.extend(model.stream("p"))
    with pytest.raises(flatgpt.UserError, match="NaN or infinite"):
        model.generate("p")
    assert np.isnan(model.loss("abcdefgh"))


def test_empty_prompt_and_end_of_text(in_tmp):
    """A new text begins after end-of-text, as in infer.py, and ends there."""
    eot = 256
    model = zero_model()
    with torch.no_grad():
        model.transformer.wte.weight[eot, 0] = 1
        model.transformer.wte.weight[ord("E"), 1] = 1
        model.lm_head.weight[ord("E"), 0] = model.lm_head.weight[eot, 1] = 100
    loaded = flatgpt.load(save_model(model, "out/start", end_of_text=True))
    assert loaded.generate(max_new_tokens=5) == "E"
    assert list(loaded.stream(max_new_tokens=3, ignore_eot=True)) == ["E", "<|endoftext|>", "E"]


def test_import_is_light():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import flatgpt; flatgpt.UserError; "
    code += "print([m for m in ('torch', 'numpy', 'tiktoken') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_program_may_end_with_open_streams(tiny_home):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import flatgpt; model = flatgpt.load('out/quickstart'); "
    code += "held = [model.stream(max_new_tokens=9, ignore_eot=True) for _ in range(2)]; next(held[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny_home, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
