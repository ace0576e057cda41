"""app.py: the HTML of texts, the limits for visitors, the server, and the page in a real browser."""

import asyncio
import contextlib
import html
import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import urllib.error
import urllib.request

import pytest
from app_server import serving, values
from processes import ROOT, command
from scripted import save_model, scripted_model
from vocabularies import HINDI, bpe, characters, save_run_of

import app
from config import AppConfig, UserError
from flatgpt.data import tokenizer
from flatgpt.inference import web
from flatgpt.inference.model_queue import ModelQueue
from flatgpt.inference.writer import Text

BYTE = tokenizer.load("byte")


def visible(page: str) -> str:
    """Return the text that HTML shows."""
    return html.unescape(re.sub("<[^>]*>", "", page))


def odds(page: str) -> list[str]:
    """Return the table of each token in HTML."""
    return [html.unescape(table) for table in re.findall(r'data-odds="([^"]*)"', page)]


# ---------------------------------------------------------------------------------------------------------------------
# HTML and requests


def test_html_shows_text_as_text_and_only_grows():
    """Each span has a table for each of its tokens, and the chosen one is marked."""
    text = Text(BYTE, '<b>"&')
    view, pages = web.HtmlView(text, BYTE), []
    for token in "<é\n".encode():
        text.append(token, [(token, math.log(0.001)), (ord("<"), math.log(0.5)), (10, math.log(0.25))])
        view.update()
        pages.append(view.html)
    assert visible(pages[-1]) == '<b>"&<é\n'
    assert set(re.findall("<(/?[a-z]+)", pages[-1])) == {"div", "span", "/span"}
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(pages))
    assert odds(pages[-1]) == [
        "▸   0.1%  “<”\n   25.0%  “\\n”",
        "   50.0%  “<”\n   25.0%  “\\n”\n▸   0.1%  “\\xc3”\n\n   50.0%  “<”\n   25.0%  “\\n”\n▸   0.1%  “\\xa9”",
        "   50.0%  “<”\n▸   0.1%  “\\n”",
    ]


@pytest.fixture(scope="module")
def config(tiny_run) -> AppConfig:
    return AppConfig(model_path=str(tiny_run), device="cpu", token_limit=60)


@pytest.fixture(scope="module")
def loaded(config) -> tuple:
    return app.load(config)


def test_visitor_gets_what_infer_writes(cli, config, loaded, tiny_home, monkeypatch):
    """Also while the iterator of an earlier visitor is not finished. Each token has a table of probabilities."""
    monkeypatch.chdir(tiny_home)
    words = ("--prompt", "99 green", "--num_samples", 2, "--max_new_tokens", 40, "--top_k", 50, "--seed", 5)
    expected = json.loads(cli("infer", "--device", "cpu", *words, "--json", "-").out)["texts"]
    settings, make_writer = app.request(config, **values(num_samples=2, max_new_tokens=40, top_k=50)), loaded[1]
    with contextlib.closing(web.stream_html(make_writer(app.request(config, **values(seed=9))))) as unfinished:
        next(unfinished)
        *_, (pages, status) = web.stream_html(make_writer(settings))
    assert [visible(page) for page in pages] == ["99 green" + each["text"] for each in expected]
    assert re.match(r"80 tokens, the first after ", status)
    for table in "\n\n".join(odds(pages[0])).split("\n\n"):
        assert table.count("\n") + 1 in (web.ALTERNATIVES, web.ALTERNATIVES + 1)
    assert app.request(config, **values(stop="x y\n\\n\n")).stop == ("x y", "\n"), "one string per line"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "x" * 4001}, "prompt: 4,001 characters, at most 4,000 here"),
        ({"stop": "x" * 201}, "stop: 201 characters, at most 200 here"),
        ({"num_samples": 0}, "num_samples = 0"),
        ({"top_k": 1.5}, "top_k = 1.5"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"seed": None}, "seed = None"),
        ({"temperature": 0, "top_k": 5}, "leave out top_k"),
        ({"top_p": "--model_path=/etc"}, "top_p = --model_path=/etc"),
    ],
)
def test_refused_options(config, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        app.request(config, **values(**changes))


@pytest.mark.parametrize("make", [characters, bpe])
def test_page_of_a_tokenizer_of_its_own(in_tmp, make):
    """Whole characters are shown; --parse_special of the command line holds for visitors; errors name the place."""
    save_run_of(make())
    config = AppConfig(device="cpu", parse_special=True)
    make_writer = app.load(config)[1]
    writer = make_writer(app.request(config, **values(prompt=HINDI, max_new_tokens=8)))
    pages, texts = list(web.stream_html(writer))[-1][0], writer.text(HINDI + "<|user|>" * (make is bpe))
    assert visible(pages[0]).startswith(HINDI)
    assert len(texts.ids) == len(writer.encoding.encode_ordinary(HINDI)) + (make is bpe)
    if make is characters:
        with pytest.raises(UserError, match=r"has no character 'Z' \(U\+005A\), which is in line 2, column 1"):
            list(web.stream_html(make_writer(app.request(config, **values(prompt="\nZ")))))


# ---------------------------------------------------------------------------------------------------------------------
# the page


def test_about_names_no_folder_of_the_machine(loaded, tiny_home):
    found, _, described = loaded
    name, card, plots = app.about(found)
    assert name == "quickstart"
    assert "34,720 parameters" in card
    assert "## Training" in card
    assert plots.startswith('<picture class="curve"><source ')
    assert str(tiny_home) not in card + plots + described


def test_card_that_is_not_utf8_and_has_no_heading(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "ckpt/best", tmp_path / "its name")
    (tmp_path / "its name/README.md").write_bytes(b"---\na: b\n---\nMod\xe8le\n")
    found, *_ = app.load(AppConfig(model_path=str(tmp_path / "its name"), device="cpu"))
    assert app.about(found) == ("its name", "Mod\ufffdle", "")


@pytest.mark.extra("gradio")
def test_page_starts_with_the_settings_of_the_command_line(tiny_run):
    given = {"temperature": 3.0, "top_k": 1000, "top_p": 0.01, "repetition_penalty": 0.5, "max_new_tokens": 9000}
    for changes, expected in ((given, given | {"max_new_tokens": 500}), ({"greedy": True}, {"temperature": 0})):
        config = AppConfig(model_path=str(tiny_run), device="cpu", **changes)
        blocks = app.build(config, ("name", "", ""), *app.load(config)[1:], ModelQueue(1))
        parts = [part["props"] for part in blocks.get_config_file()["components"]]
        sliders = {part["label"].replace(" ", "_"): part for part in parts if "maximum" in part and "minimum" in part}
        for key, value in expected.items():
            slider = sliders[key]
            assert slider["minimum"] <= slider["value"] == value <= slider["maximum"], key
        assert not blocks.analytics_enabled


async def read_all(iterator) -> list:
    return [item async for item in iterator]


@pytest.mark.extra("gradio")
def test_diverged_model_is_an_error_on_the_page(tmp_path):
    """Without a traceback in the terminal, and the next visitor is served."""
    import gradio

    model = scripted_model("abcdefgh")
    model.transformer.wpe.weight.data[3] = float("nan")
    config = AppConfig(model_path=save_model(model, tmp_path), device="cpu")
    queue = ModelQueue(1)
    blocks = app.build(config, ("name", "", ""), *app.load(config)[1:], queue)
    write = next(event for event in blocks.fns.values() if event.api_name == "write").fn
    for _ in range(2):
        with pytest.raises(gradio.Error, match="its logits are NaN or infinite") as caught:
            asyncio.run(read_all(write(*values(prompt="p").values())))
        assert not caught.value.print_exception
    queue.close()


def test_without_gradio_it_says_what_to_install(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install gradio" in cli("app").error


# ---------------------------------------------------------------------------------------------------------------------
# the server


@pytest.fixture(scope="module")
def server(tiny_home):
    # Up to 20,000 tokens and no end-of-text: a text must not end before a test has looked at it.
    words = ("--max_new_tokens", 20_000, "--token_limit", 20_000, "--ignore_eot", "--device", "cpu")
    with serving(tiny_home, *words) as server:
        yield server
        events = urllib.request.urlopen(server.url + server.begin(max_new_tokens=20_000), timeout=90)
        assert events.readline() == b"event: generating\n"  # Ctrl-C comes while a text is written


@pytest.mark.extra("gradio")
def test_server_is_private(server, tiny_home):
    """It listens on this machine only, and the page contains nothing of the machine and no analytics."""
    assert server.url == f"http://127.0.0.1:{server.port}"
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.2", server.port), 5):
        pass
    for path in ("/", "/config", "/gradio_api/info"):
        status, text = server.get(path)
        assert status == 200, path
        for private in (str(tiny_home), str(ROOT), sys.prefix, os.path.expanduser("~") + "/"):
            assert private not in text, f"{path} contains {private}"
    assert json.loads(server.get("/config")[1])["analytics_enabled"] is False


@pytest.mark.extra("gradio")
def test_files_are_neither_served_nor_accepted(server, tiny_run):
    for file in (tiny_run / "config.toml", ROOT / "app.py", "/etc/passwd", "../../etc/passwd"):
        for route in (f"/gradio_api/file={file}", f"/file={file}", f"/gradio_api/static/{file}"):
            assert server.get(route)[0] in (403, 404), route
    head = b"--b\r\nContent-Disposition: form-data; name=files; filename=a\r\n\r\n"
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for size in (0, 1, 100):
        answer = server.get("/gradio_api/upload", head + size * b"x" + b"\r\n--b--\r\n", **form)
        assert answer[0] in (413, 500), answer  # 413: gradio 6.24
    assert server.get("/monitoring")[0] in (403, 404)


@pytest.mark.extra("gradio")
def test_requests_cannot_bypass_the_queue(server):
    for route in ("run", "api"):
        assert server.get(f"/gradio_api/{route}/write", {"data": list(values(max_new_tokens=1).values())})[0] == 404


@pytest.mark.extra("gradio")
def test_limits_hold_without_the_page(server):
    for changes in ({"max_new_tokens": 20_001}, {"num_samples": 5}, {"prompt": "x" * 4001}, {"seed": "<img src=x>"}):
        events = server.write(**changes)
        assert events.startswith("event: error"), events
        assert "<" not in events
    for events in (server.write(prompt={"a": 1}, max_new_tokens=1), server.write(num_samples=[])):
        assert "event: " in events
        assert not re.search(r"Traceback|\.py", events)


@pytest.mark.extra("gradio")
def test_port_in_use_is_refused(server, tiny_home):
    taken = command("app", "--server_port", server.port, cwd=tiny_home)
    assert taken.returncode == 2
    assert re.search(rf"^error: .*server_port = {server.port}: .*\n\Z", taken.stderr, re.M)


# ---------------------------------------------------------------------------------------------------------------------
# in Chromium


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium: nothing is downloaded."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None and not os.environ.get("CI"):
        pytest.skip("Chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root cannot have a sandbox
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, server, width: int):
    """The page as a visitor sees it. It sends no request to another machine, fits the window and logs no error."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(90_000)
    requests, errors = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(server.url)
    page.get_by_label("Prompt").wait_for()
    yield page
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    page.close()
    assert not errors
    assert [url for url in requests if not url.startswith((server.url, "data:", "blob:"))] == []


def set_option(page, name: str, value: float) -> None:
    """Type a value into the number box of an option."""
    box = page.get_by_label(re.compile(f"(number input for )?{name}$")).and_(page.locator("input[type=number]"))
    for _ in range(300):
        box.fill(str(value))
        box.press("Tab")
        page.wait_for_timeout(200)
        if float(box.input_value()) == value:  # Gradio sets options once more after they are opened
            return
    pytest.fail(f"{name} does not become {value}")


def click(page, button: str) -> None:
    page.get_by_role("button", name=button, exact=True).click()


def stop(page) -> None:
    with page.expect_response("**/gradio_api/cancel"):
        click(page, "Stop")


@pytest.mark.browser
@pytest.mark.extra("gradio", "playwright")
def test_text_grows_until_it_is_stopped_and_others_wait(browser, server):
    prompt = '99 <b onclick="alert(1)">green</b> & <script>alert(2)</script> 東京 🎈'
    with opened(browser, server, 390) as page:
        page.get_by_label("Prompt").fill(prompt)
        click(page, "Write")
        page.locator(".token").nth(20).wait_for()
        text = page.locator(".text").first
        length = len(text.inner_text())
        page.wait_for_function(f"document.querySelector('.text').innerText.length > {length + 20}")
        assert text.inner_text().startswith(prompt)
        assert page.locator(".text b, .text script").count() == 0
        with opened(browser, server, 390) as other:
            click(other, "Write")
            other.get_by_text("queue: 1/1").wait_for()
            stop(other)
        stop(page)
        server.write(max_new_tokens=300)  # returns only if the stopped text has made room
        assert length < len(text.inner_text()) < 20_000


@pytest.mark.browser
@pytest.mark.extra("gradio", "playwright")
def test_options_change_the_text_tokens_show_their_odds_and_mistakes_are_explained(browser, server):
    with opened(browser, server, 1280) as page:
        page.get_by_label("Prompt").fill("99 green bottles")
        page.get_by_text("Options", exact=True).click()
        set_option(page, "max new tokens", 40)
        set_option(page, "num samples", 3)
        click(page, "Write")
        page.get_by_text("120 tokens, the first after").wait_for()
        assert len(set(page.locator(".text").all_inner_texts())) == 3
        page.locator(".token").nth(5).hover()
        table = page.evaluate("getComputedStyle(document.querySelectorAll('.token')[5], '::after').content")
        assert table.count("%") in (web.ALTERNATIVES, web.ALTERNATIVES + 1)
        assert "▸" in table
        set_option(page, "temperature", 0)
        set_option(page, "top k", 5)
        click(page, "Write")
        page.get_by_text("temperature = 0 chooses the most likely token: leave out top_k").wait_for()


@pytest.mark.browser
@pytest.mark.extra("gradio", "playwright")
def test_about_shows_the_curve_and_the_card(browser, server):
    with opened(browser, server, 390) as page:
        page.get_by_role("tab", name="About").click()
        curve = page.locator(".curve img")
        curve.wait_for()
        assert curve.evaluate("image => image.complete && image.naturalWidth") > 300
        assert page.get_by_role("heading", name="Training").is_visible()
        assert "img-src 'self' data:" in page.locator("meta[http-equiv]").first.get_attribute("content")
