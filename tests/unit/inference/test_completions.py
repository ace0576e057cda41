"""Requests of OpenAI's completion API, and answers in parts."""

import codecs
import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import AppConfig, UserError
from flatgpt.data import tokenizer
from flatgpt.inference.completions import Choice, body_limit, parse_request
from flatgpt.inference.writer import Text

CONFIG = AppConfig(prompt_limit=30, token_limit=40, sample_limit=3)
BYTE = tokenizer.load("byte")


def parse(**fields):
    return parse_request(json.dumps(fields).encode(), CONFIG)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b'{"prompt": "a"', "the body is not JSON"),
        (b'{"prompt": "\xff"}', "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b"null", "an object is expected"),
        ({}, "prompt = None: a string, a list of token ids"),
        ({"prompt": []}, "prompt = []"),
        ({"prompt": [[]]}, "prompt = [[]]"),
        ({"prompt": [1, "a"]}, "prompt = [1, 'a']"),
        ({"prompt": [True]}, "prompt = [True]"),
        ({"prompt": {"a": 1}}, "prompt = {'a': 1}"),
        (b'{"prompt": "\\ud83c"}', "half of a surrogate pair"),
        ({"prompt": "x" * 31}, "prompt: 31 characters, at most 30 here"),
        ({"prompt": [1] * 31}, "prompt: 31 token ids, at most 30 here"),
        ({"prompt": ["a", "b"], "n": 2}, "2 prompts times n = 2 are 4 texts: at most 3"),
        ({"max_tokens": 41}, "max_tokens = 41: at most 40 here (token_limit"),
        ({"max_tokens": -1}, "max_tokens = -1: at least 0"),
        ({"max_tokens": 1.5}, "max_tokens = 1.5: a whole number"),
        ({"n": 0}, "n = 0"),
        ({"n": True}, "n = True"),
        ({"n": 10**9}, "1,000,000,000 texts"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature = nan: a number is expected"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature = inf: a number is expected"),
        ({"temperature": 10**400}, "temperature = 1000"),
        ({"temperature": "1"}, "temperature = '1'"),
        ({"top_p": 0}, "top_p = 0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"seed": 2**63}, f"seed = {2**63}"),
        ({"stop": ""}, "stop = ['']"),
        ({"stop": ["a", 1]}, "stop = ['a', 1]"),
        ({"stop": ["x" * 101] * 2}, "stop: 202 characters in all"),
        ({"logprobs": True}, "logprobs = True"),
        ({"logprobs": 21}, "logprobs = 21"),
        ({"best_of": 2}, "best_of = 2: not supported"),
        ({"suffix": "x"}, "suffix = 'x': not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty = 0.5: not supported"),
        ({"logit_bias": {"1": 5}}, "logit_bias = {'1': 5}: not supported"),
        ({"promt": "a"}, "not supported: 'promt'; the fields are "),
        ({"stream": "yes"}, "stream = 'yes': true or false"),
        ({"stream_options": {"include_usage": True}}, "only with stream = true"),
        ({"stream": True, "stream_options": {"other": True}}, "only include_usage"),
        ({"model": 5}, "model = 5: a string"),
    ],
)
def test_refused_requests(body, message):
    if isinstance(body, dict) and set(body) - {"prompt"}:
        body = {"prompt": "a"} | body
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        parse_request(body if isinstance(body, bytes) else json.dumps(body).encode(), CONFIG)
    assert "\n" not in str(caught.value)


def test_defaults_are_openais_and_null_means_absent():
    asked = parse(prompt="a", temperature=None, stop=None, logprobs=None, suffix=None, seed=None)
    assert (asked.prompts, asked.logprobs, asked.echo, asked.stream) == (["a"], None, False, False)
    chosen = asked.settings
    assert (chosen.temperature, chosen.top_p, chosen.max_new_tokens, chosen.num_samples) == (1.0, 1.0, 16, 1)
    assert parse(prompt="a").settings.seed != parse(prompt="a").settings.seed
    # what other clients send, and what changes nothing
    assert parse(prompt=[1], best_of=2, n=2, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, user="me")
    greedy = parse(prompt="a", temperature=0, top_p=0.5, top_k=3, min_p=0.1).settings
    assert greedy.problems() == []
    assert parse(prompt=[[1, 2], "b"]).prompts == [[1, 2], "b"]
    assert parse_request(b'{"prompt": "\\ud83c\\udf88"}', CONFIG).prompts == ["🎈"]


def test_the_largest_request_fits():
    prompts = ["🎈" * CONFIG.prompt_limit] * CONFIG.sample_limit
    body = json.dumps({"prompt": prompts}).encode()
    assert body.count(b"\\u") == 2 * 30 * 3
    assert len(body) <= body_limit(CONFIG)
    assert parse_request(body, CONFIG).prompts == prompts


@settings(max_examples=60)
@given(
    st.text(st.sampled_from("ab東🎈"), max_size=6),
    st.lists(st.sampled_from([*b"aab", *"東🎈".encode(), 0xFF]), max_size=12),
    st.booleans(),
    st.sampled_from([None, "ab", "東a"]),
    st.booleans(),
)
def test_parts_of_an_answer_are_the_whole(prompt, tokens, echo, stop, as_ids):
    """Texts, tokens and their places; against Python's own decoder. Tokens of the stop string are left out."""
    prompt = prompt.encode()[:-1] if as_ids else prompt  # ids can end inside a character
    asked = parse(prompt=[*prompt] if prompt and as_ids else prompt.decode("utf-8", "replace") if as_ids else prompt)
    asked = parse(prompt=asked.prompts[0], echo=echo, logprobs=1, stream=True, stop=stop)

    def take_all(each_token: bool) -> list[dict]:
        text = Text(BYTE, asked.prompts[0], asked.settings.stop, [256])
        text.prompt_logprobs = [[(id, -1.0), (0, -0.5)] for id in text.ids[1:]]
        choice, parts = Choice(0, text, asked, BYTE), []
        for token in tokens:
            text.append(token, [(token, -2.0), (1, -float("inf"))])
            if each_token:
                parts.append(choice.take())
            if text.ended:
                break
        text.end("end_of_text", [(256, -3.0)])
        return [part for part in [*parts, choice.take(), choice.take()] if part]

    parts, (whole,) = take_all(True), take_all(False)
    assert "".join(part["text"] for part in parts) == whole["text"]
    for key, values in whole["logprobs"].items():
        assert [*itertools.chain(*(part["logprobs"][key] for part in parts))] == values
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]
    given = [*prompt] if as_ids else [*prompt.encode()]
    stopped = bool(stop) and "<|endoftext|>" not in whole["logprobs"]["tokens"]
    expected, decoder = [], codecs.getincrementaldecoder("utf-8")("replace")
    offset = 0
    for n, id in enumerate(given + tokens):
        if n >= len(given) or echo:
            expected.append(offset)
        length = len(decoder.decode(bytes([id])))
        offset += length if n >= len(given) or echo else 0
    got = whole["logprobs"]["text_offset"]
    if not stopped:
        assert got[:-1] == expected
        assert whole["logprobs"]["token_logprobs"][-1] == -3.0
    else:
        assert got == [place for place in expected if place < len(whole["text"])]
    assert all(value >= -9999.0 for top in whole["logprobs"]["top_logprobs"] if top for value in top.values())
