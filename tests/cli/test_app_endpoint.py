"""app.py's OpenAI-compatible endpoint: OpenAI's own client on a running server, and who may connect."""

import http.client
import json
import os
import urllib.request

import pytest
import torch
from app_server import Server, serving
from scripted import save_model, scripted_model

import app
from config import AppConfig
from flatgpt.inference.model_queue import ModelQueue
from model import GPT

pytestmark = pytest.mark.extra("gradio", "openai")
# Greedy text, seeded text, several at once, and a stop string.
SETTINGS = [
    {"temperature": 0, "max_tokens": 30},
    {"temperature": 0.8, "seed": 5, "n": 3, "max_tokens": 40, "top_k": 50},
    {"temperature": 1.2, "seed": 6, "max_tokens": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1},
    {"temperature": 0.8, "seed": 5, "max_tokens": 40, "stop": ["a", "o"]},
]
EXTRAS = ("top_k", "min_p", "repetition_penalty")  # that OpenAI's API does not have


@pytest.fixture(scope="module")
def server(tiny_home):
    words = ("--token_limit", 200_000, "--device", "cpu", "--dtype", "float32", "--queue_limit", 2)
    with serving(tiny_home, *words) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=90) as client:
        yield client


def create(client, prompt, **fields):
    """Call OpenAI's client, which passes fields that it does not know in extra_body."""
    extra = {key: fields.pop(key) for key in EXTRAS if key in fields}
    return client.completions.create(model="any", prompt=prompt, extra_body=extra, **fields)


@pytest.mark.parametrize("fields", SETTINGS)
def test_text_is_what_infer_writes(client, cli, tiny_home, monkeypatch, fields):
    """Also in parts, whose counts come last."""
    monkeypatch.chdir(tiny_home)
    names = {"max_tokens": "max_new_tokens", "n": "num_samples"}
    words = [f"--{names.get(key, key)}={value}" for key, value in fields.items() if key != "stop"]
    words += [f"--stop={text}" for text in fields.get("stop", [])]
    words += ["--prompt", "99 green", "--device", "cpu", "--dtype", "float32", "--json", "-"]
    texts = json.loads(cli("infer", *words).out)["texts"]
    whole = create(client, "99 green", **fields)
    assert [choice.text for choice in whole.choices] == [each["text"] for each in texts]
    reasons = {"length": "length", "stop": "stop", "end_of_text": "stop"}
    assert [choice.finish_reason for choice in whole.choices] == [reasons[each["ended"]] for each in texts]
    tokens = sum(each["tokens"] + (each["ended"] == "end_of_text") for each in texts)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (8, tokens)
    parts = [*create(client, "99 green", stream=True, stream_options={"include_usage": True}, **fields)]
    assert len(parts) > len(texts)
    assert parts.pop().usage == whole.usage
    for index, each in enumerate(texts):
        mine = [part.choices[0] for part in parts if part.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == each["text"]
        assert mine[-1].finish_reason


def test_kinds_of_prompts(client):
    """Ids, and several prompts, whose texts are those of each alone; an empty one starts a new text."""
    fields = {"temperature": 0, "max_tokens": 12}
    alone = [create(client, prompt, **fields).choices[0].text for prompt in ("99 green", "3", "")]
    for prompts in (["99 green", "3", ""], [[*b"99 green"], [*b"3"], [256]]):
        answer = create(client, prompts, **fields)
        assert [choice.text for choice in answer.choices] == alone
        assert answer.usage.prompt_tokens == 10
    assert create(client, [*b"99 green"], **fields).choices[0].text == alone[0]
    assert create(client, "99 green", echo=True, **fields).choices[0].text == "99 green" + alone[0]
    assert create(client, "a 🎈\n", echo=True, max_tokens=0).choices[0].text == "a 🎈\n"


def test_log_probabilities_equal_those_of_the_model(client, tiny_run):
    """Of prompts of several lengths at once and of the new token, from plain logits; up to the context and one more."""
    model = GPT.from_pretrained(str(tiny_run))
    longest = (b"98 green bottles hanging on the wall, " * 9)[: model.config.context_length + 1]
    prompts = [[*b"99 green"], [*"é🎈x".encode()], [*longest], [7]]
    answers = [*create(client, prompts[:3], echo=True, logprobs=3, max_tokens=1, temperature=0).choices]
    answers += create(client, prompts[3], echo=True, logprobs=3, max_tokens=1, temperature=0).choices
    for ids, answer in zip(prompts, answers, strict=True):
        got = answer.logprobs
        assert got.token_logprobs[0] is got.top_logprobs[0] is None
        assert len(got.tokens) == len(ids) + 1
        with torch.no_grad():
            log_p = model(torch.tensor([ids[: model.config.context_length]]))[0].log_softmax(-1)
        expected = log_p[range(len(ids) - 1), ids[1:]].tolist()
        assert got.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-4)
        for top, row, logprob in zip(got.top_logprobs[1:-1], log_p, got.token_logprobs[1:-1], strict=False):
            values = sorted(top.values(), reverse=True)
            assert values[:3] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
            assert logprob in values
        last = model(torch.tensor([ids[-model.config.context_length :]]))[0, -1].log_softmax(-1).max().item()
        assert got.token_logprobs[-1] == pytest.approx(last, abs=1e-4)
    whole = answers[1].text
    assert whole.startswith("é🎈x")
    assert answers[1].logprobs.tokens[:2] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert answers[1].logprobs.text_offset[:7] == [0, 0, 1, 1, 1, 1, 2]
    for token, offset in zip(answers[0].logprobs.tokens, answers[0].logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or answers[0].text[offset:].startswith(token)


def test_mistakes_are_errors_of_the_client(client):
    import openai

    for prompt, fields in (("x" * 4001, {}), ("a", {"max_tokens": 200_001}), ("a", {"best_of": 3}), ([300], {})):
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, prompt, **fields)
        assert caught.value.body["type"] == "invalid_request_error"
        assert "\n" not in caught.value.body["message"]
    with pytest.raises(openai.NotFoundError, match="the server answers POST /v1/completions"):
        client.chat.completions.create(model="any", messages=[{"role": "user", "content": "hi"}])
    assert [model.id for model in client.models.list()] == ["quickstart"]
    assert client.models.retrieve("quickstart").owned_by == "flatgpt"


class Stream:
    """A streamed request, whose lines are read one at a time."""

    def __init__(self, server: Server, **fields):
        body = {"prompt": "9", "max_tokens": 200_000, "ignore_eot": True, "stream": True} | fields
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=90)
        self.connection.request("POST", "/v1/completions", json.dumps(body))
        self.answer = self.connection.getresponse()

    def read_until(self, start: str) -> str:
        """Return the first line that begins with `start`."""
        return next(line for line in map(bytes.decode, self.answer) if line.startswith(start))

    def leave(self) -> None:
        """Close the connection, as a client that is interrupted."""
        self.answer.close()
        self.connection.close()


def test_page_and_endpoint_share_one_queue(server, client):
    """In the order in which they come, up to the limit. Who leaves makes room."""
    import openai

    page = urllib.request.urlopen(server.url + server.begin(max_new_tokens=200_000, ignore_eot=True), timeout=90)
    assert page.readline() == b"event: generating\n"  # a visitor of the page is served
    first = Stream(server)
    assert first.read_until(":") == ": 1 ahead\n"
    second = urllib.request.urlopen(server.url + server.begin(max_new_tokens=200_000, ignore_eot=True), timeout=90)
    assert second.readline() == b"event: generating\n"
    assert b"queue: 2/2" in second.readline()
    with pytest.raises(openai.APIStatusError, match="2 requests are waiting: try again later") as full:
        create(client, "9", max_tokens=1)
    assert full.value.status_code == 503
    page.close()
    assert json.loads(first.read_until("data: ")[6:])["choices"][0]["text"]
    first.leave()
    while b"queue:" in (line := second.readline()) or not line.startswith(b"data: [") or b"class" not in line:
        assert line
    second.close()
    assert create(client, "9", max_tokens=3).usage.completion_tokens <= 3


# ---------------------------------------------------------------------------------------------------------------------
# who may connect


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> tuple:
    """A model that writes `abcdefgh`, and ends with end-of-text."""
    model = scripted_model([*b"abcdefg", 256])
    return app.load(AppConfig(model_path=save_model(model, tmp_path_factory.mktemp("scripted")), device="cpu"))


@pytest.fixture
def connect(loaded):
    """connect(api_key=...) -> a client of the endpoint without a server, which sends such requests as a test likes."""
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    from flatgpt.inference.api import CompletionAPI, read_key

    queues = []

    def connect(host: str = "127.0.0.1:7860", make_writer=loaded[1], **settings) -> TestClient:
        config = AppConfig(**settings)
        queues.append(ModelQueue(config.queue_limit))
        api = CompletionAPI(config, queues[-1], make_writer, "scripted", read_key(config))
        return TestClient(Starlette(**api.arguments()), base_url=f"http://{host}")

    yield connect
    for queue in queues:
        queue.close()


BODY = {"prompt": "p", "temperature": 0, "max_tokens": 3}


@pytest.mark.parametrize(
    ("host", "settings", "status"),
    [
        ("127.0.0.1:7860", {}, 200),
        ("localhost:7860", {}, 200),
        ("[::1]:7860", {}, 200),
        ("192.168.7.7", {}, 200),  # a page cannot make its own name one of digits
        ("evil.example", {}, 403),
        ("127.0.0.1.evil.example:7860", {}, 403),
        ("localhost.evil.example", {}, 403),
        ("box.example", {"allowed_hosts": ("Box.example",)}, 200),
        ("box.example", {"server_name": "box.example"}, 200),
        ("evil.example", {"server_name": "0.0.0.0"}, 403),
        ("any.example", {"allowed_hosts": ("*",)}, 200),
    ],
)
def test_names_of_the_server(connect, host, settings, status):
    assert connect(host, **settings).get("/v1/models").status_code == status


def test_own_name_is_allowed_if_other_machines_can_connect(connect, monkeypatch, capsys):
    monkeypatch.setattr("socket.gethostname", lambda: "Mybox.lan")
    for host in ("mybox.lan:7860", "mybox.local:7860"):
        assert connect(host, server_name="0.0.0.0").get("/v1/models").status_code == 200
        assert "any IP address, 0.0.0.0, localhost, mybox.lan, mybox.local are accepted" in capsys.readouterr().err
        assert connect(host).get("/v1/models").status_code == 403


def test_pages_of_other_sites_are_refused(connect):
    client = connect()
    for origin in ("http://evil.example", "null", "http://localhost:7860", "http://127.0.0.1:3000", ""):
        assert client.post("/v1/completions", json=BODY, headers={"Origin": origin}).status_code == 403
    for site in ("cross-site", "same-site"):
        assert client.get("/v1/models", headers={"Sec-Fetch-Site": site}).status_code == 403
    answer = client.post("/v1/completions", json=BODY, headers={"Origin": "http://127.0.0.1:7860"})
    assert answer.json()["choices"][0]["text"] == "abc"
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("by_variable", [False, True])
def test_key(connect, monkeypatch, by_variable):
    if by_variable:
        monkeypatch.setenv("FLATGPT_API_KEY", "geheim+/=")
    client = connect(api_key=None if by_variable else "geheim+/=")
    for header in ({}, {"Authorization": "Bearer geheim"}, {"Authorization": "geheim+/="}, {"Authorization": "é"}):
        headers = {name: value.encode() for name, value in header.items()}
        for answer in (client.get("/v1/models", headers=headers), client.post("/v1/completions", headers=headers)):
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert "geheim" not in answer.text
    assert client.get("/v1/models", headers={"Authorization": "Bearer geheim+/="}).status_code == 200


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "a\n"])
def test_key_that_no_client_can_send_is_refused(cli, tiny_home, monkeypatch, key):
    monkeypatch.chdir(tiny_home)
    for words, variable in (([f"--api_key={key}"], None), ([], key)):
        if variable is not None:
            monkeypatch.setenv("FLATGPT_API_KEY", variable)
        error = cli("app", *words).error
        assert "the key " in error or "is empty" in error
        assert not key or key not in error


def test_a_space_serves_the_endpoint_only_with_a_key(connect, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "user/name")
    host = "user-name.hf.space"
    assert connect(host).get("/v1/models").status_code == 404
    assert connect(host, api_key="x").get("/v1/models").status_code == 401
    assert connect(host, api_key="x").get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 200


def test_end_of_text_is_a_token(connect):
    """Clients that ask for one token and leave it out, as lm-evaluation-harness does, would leave out the prompt's."""
    fields = {"prompt": [*b"pabcdefg"], "echo": True, "logprobs": 0, "max_tokens": 1, "temperature": 0}
    answer = connect().post("/v1/completions", json=fields).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("pabcdefg", "stop")
    assert choice["logprobs"]["tokens"] == [*"pabcdefg", "<|endoftext|>"]
    assert answer["usage"]["completion_tokens"] == 1


def test_stop_string_is_in_neither_text_nor_tokens(connect):
    fields = BODY | {"max_tokens": 8, "stop": "cd", "logprobs": 1}
    choice = connect().post("/v1/completions", json=fields).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["tokens"], choice["finish_reason"]) == ("ab", ["a", "b"], "stop")


def test_large_bodies_and_other_paths(connect):
    client = connect(prompt_limit=10, sample_limit=1)
    assert client.post("/v1/completions", content=b"x" * 65_537 + b"x" * 120).status_code == 413
    assert client.get("/v1/completions").status_code == 404
    assert client.post("/v1/chat/completions", json={}).json()["error"]["message"].startswith("POST /v1/chat/")


def test_diverged_model_is_an_error_without_the_models_folder(tmp_path, connect):
    """Before a stream starts and within it, and the next request is answered."""
    model = scripted_model("abcdefgh")
    model.transformer.wpe.weight.data[3] = float("nan")
    path = save_model(model, tmp_path)
    client = connect(make_writer=app.load(AppConfig(model_path=path, device="cpu"))[1])
    for fields in ({"prompt": "p", "max_tokens": 8}, {"prompt": "ppppp", "echo": True, "logprobs": 0, "max_tokens": 0}):
        answer = client.post("/v1/completions", json=fields)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "the model's logits are NaN or infinite"
        streamed = client.post("/v1/completions", json=fields | {"stream": True})
        assert '"error": {"message": "the model' in streamed.text
        assert os.path.basename(path) not in streamed.text
    assert client.post("/v1/completions", json={"prompt": "p", "max_tokens": 1}).status_code == 200
