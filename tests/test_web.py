"""The web page in a real browser: the text and the talk of the command line, and refusals in one line."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest

from harness import web
from harness.folders import save_folder
from harness.text import TextStream
from recipe.config import ModelConfig
from recipe.params import init_params
from recipe.tokenizer import train_bpe
from tests.browser import READABLE, contrast, needs_browser, picture, size_of_page, started, window

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
STOP = "button.stop-button"  # what Gradio calls it
GREEDY = ["--max_new_tokens", "12", "--temperature", "0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web") / "model"
    tokenizer = train_bpe(["the quick brown fox jumps over the lazy dog"] * 3, 300)
    config = ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.5,
    )  # fmt: skip
    weights = init_params(config, 3)
    # Tokens that are no letters get the logit 0, so the largest one is a letter's: plain text on terminal and page.
    others = [token for token in range(300) if not tokenizer.decode([token]).strip().isascii()
              or not tokenizer.decode([token]).strip().isalpha()]  # fmt: skip
    weights["model.embed_tokens.weight"][others] = 0.0
    save_folder(folder, config, weights, tokenizer)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def generate(module, checkpoint, *arguments, **streams):
    command = [sys.executable, "-m", module, "--checkpoint", str(checkpoint), *GREEDY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300, **streams)


@contextmanager
def served(module, checkpoint, *arguments):
    """The page's address, while the command runs."""
    command = [sys.executable, "-m", module, "--checkpoint", str(checkpoint), *GREEDY, "--web", "True"]
    command += ["--port", str(free_port()), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            line = server.stdout.readline()
            assert line.startswith("open http://127.0.0.1:"), line
            yield line.split()[1]
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def browser():
    with started() as driver:
        window(driver, 1200, 1000)
        yield driver


def wait(browser, condition):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    # The page may replace an element between finding and reading it.
    # Long, as it is reached only by a fault: a busy machine is slow and right.
    patient = WebDriverWait(browser, 240, ignored_exceptions=[StaleElementReferenceException])
    return patient.until(lambda _: condition())


def labelled(browser, label):
    """The text box with this label, once it is there."""
    from selenium.webdriver.common.by import By

    path = f"//label[.//span[normalize-space()={label!r}]]//*[self::textarea or self::input]"
    return wait(browser, lambda: browser.find_elements(By.XPATH, path))[0]


def empty(box):
    from selenium.webdriver.common.keys import Keys

    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.BACKSPACE)


def enter(box, text):
    from selenium.webdriver.common.keys import Keys

    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(text)


def press(browser, text):
    from selenium.webdriver.common.by import By

    wait(browser, lambda: browser.find_elements(By.XPATH, f"//button[normalize-space()={text!r}]"))[0].click()


def open_sampling(browser):
    """Show the controls, which begin closed."""
    from selenium.webdriver.common.by import By

    wait(browser, lambda: browser.find_elements(By.XPATH, "//button[contains(., 'Sampling')]"))[0].click()


def foot(browser, text):
    """Where the button with this text ends, in pixels from the top of the page."""
    from selenium.webdriver.common.by import By

    (button,) = browser.find_elements(By.XPATH, f"//button[normalize-space()={text!r}]")
    return button.rect["y"] + button.rect["height"]


@needs_browser
@pytest.mark.parametrize("module", ["jax_impl.generate", pytest.param("torch_ref.generate", marks=pytest.mark.slow)])
def test_the_page_writes_the_text_of_the_command_line(module, checkpoint, browser):
    expected = generate(module, checkpoint, "--prompt", "the quick").stdout.rstrip("\n")
    assert len(expected) > len("the quick")
    with served(module, checkpoint) as url:
        for width, height in ((390, 844), (1200, 1000)):
            window(browser, width, height)
            browser.get(url)
            labelled(browser, "Prompt")
            picture(browser, f"{module}-{width}.png")
            assert foot(browser, "Submit") < height / 1.5, "below the fold"
            assert size_of_page(browser) == (width, width), "the page scrolls to the side"
        (title,) = browser.find_elements("css selector", "h1")
        assert title.text == browser.title == "model", "the folder's path stands for its name"
        for field in ("Prompt", "Text"):
            assert contrast(browser, labelled(browser, field)) >= READABLE
        enter(labelled(browser, "Prompt"), "the quick")
        press(browser, "Submit")
        wait(browser, lambda: labelled(browser, "Text").get_property("value") == expected)
        picture(browser, f"{module}.png")

        empty(labelled(browser, "Prompt"))
        press(browser, "Submit")
        wait(browser, lambda: "the prompt has no tokens; give at least one character" in browser.page_source)
        picture(browser, f"{module}-empty.png")
        enter(labelled(browser, "Prompt"), "the quick")

        open_sampling(browser)
        # More tokens than the model has positions: the rule is on the page, the server lives on.
        enter(labelled(browser, "New tokens at most"), "9999999")
        press(browser, "Submit")
        wait(browser, lambda: "exceed max_position_embeddings" in browser.page_source)
        picture(browser, f"{module}-refusal.png")
        enter(labelled(browser, "New tokens at most"), "3")
        press(browser, "Submit")
        wait(browser, lambda: 0 < len(labelled(browser, "Text").get_property("value")) < len(expected))
        assert expected.startswith(labelled(browser, "Text").get_property("value"))


@needs_browser
@pytest.mark.slow
def test_a_talk_on_the_page_is_the_talk_on_the_terminal(checkpoint, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def answers():
        return [said.text.strip() for said in browser.find_elements(By.CSS_SELECTOR, ".bot.message")]

    turns = ["who jumps", "and over whom"]
    expected = generate("jax_impl.generate", checkpoint, "--chat", "True", input="\n".join(turns) + "\n").stdout
    expected = [answer.strip() for answer in expected.splitlines()]
    assert len(expected) == 2 and all(expected) and len(set(expected)) == 2

    with served("jax_impl.generate", checkpoint, "--chat", "True") as url:
        browser.get(url)
        for number, turn in enumerate(turns, start=1):
            box = wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "textarea"))[0]
            box.send_keys(turn, Keys.ENTER)
            wait(browser, lambda number=number: answers() == expected[:number])
            # The whole answer may be there before the page takes another turn: it shows its stop button until then.
            wait(browser, lambda: not any(b.is_displayed() for b in browser.find_elements(By.CSS_SELECTOR, STOP)))
        picture(browser, "chat.png")


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("runs/mine", "mine"),
        ("runs/mine/best/", "mine"),
        ("runs/mine/last", "mine"),
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("/", "/"),
    ],
)
def test_the_page_is_called_as_the_model_is(place, name):
    assert web.model_name(place) == name


def test_a_folder_of_here_has_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "mine" / "best").mkdir(parents=True)
    for folder in (tmp_path / "mine", tmp_path / "mine" / "best"):
        monkeypatch.chdir(folder)
        assert web.model_name(".") == "mine"


def test_half_a_character_is_not_shown_while_it_comes_nor_at_the_end():
    tokenizer = train_bpe(["plain"], 257)
    tokens = tokenizer.encode("né€") + tokenizer.encode("€")[:2]
    stream = TextStream(tokenizer, [])
    pieces = [*(stream.push(token) for token in tokens), stream.flush()]
    assert pieces[-1].strip("\ufffd") == "" != pieces[-1], "the last character never came whole"
    shown = list(web.growing(pieces))
    assert shown[-1] == "né€" and not any("\ufffd" in text for text in shown)
    assert list(web.growing(["a\ufffd", "b"])) == ["a", "a\ufffdb"], "what no token makes whole stays between others"


def test_the_page_refuses_in_one_line(checkpoint):
    for arguments, words in {
        ("--web", "True", "--prompt", "x"): "leave out --prompt",
        ("--web", "True", "--port", "70000"): "port=70000 must lie in",
    }.items():
        done = generate("jax_impl.generate", checkpoint, *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = generate("jax_impl.generate", checkpoint, "--web", "True", "--port", str(port))
    assert done.returncode == 2 and f"--port {port} is taken" in done.stderr, done.stderr


def ask(url, path, method="GET", body=b"", headers=()):
    """Status and body of a request, its headers as they are given."""
    connection = HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=120)
    with closing(connection):
        connection.putrequest(method, path, skip_host="Host" in dict(headers))
        sent = {} if method == "GET" else {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in (sent | dict(headers)).items():
            connection.putheader(name, value)
        connection.endheaders(body or None)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_the_page_answers_its_own_names_and_takes_its_own_requests(checkpoint):
    with served("torch_ref.generate", checkpoint) as url:
        port = url.rstrip("/").rpartition(":")[2]
        page = ask(url, "/")
        assert page[0] == 200 and b"At most " in page[1]
        assert ask(url, "/", headers={"Host": f"LOCALHOST:{port}"})[0] == 200
        others = (
            "evil.example",
            f"evil.example:{port}",
            f"127.0.0.1.evil.example:{port}",
            "127.0.0.1",
            f"[::1]:{port}",
        )
        for host in (*others, ""):
            assert ask(url, "/config", headers={"Host": host})[0] == 421, host

        uploads = ("upload", "upload/", "upload?upload_id=1", "process_recording", "stream/x", "component_server")
        for path in (*uploads, "x"):
            assert ask(url, f"/gradio_api/{path}", "POST", b"x" * 1000)[0] == 403, path
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
            assert ask(url, "/gradio_api/queue/join", method, b"{}")[0] == 403, method
        assert ask(url, "/gradio_api/queue/join", "POST", b"{}", headers={"Content-Length": str(10**12)})[0] == 413

        config = json.loads(ask(url, "/config")[1])
        index = next(called["id"] for called in config["dependencies"] if called["api_name"] == "continue_prompt")
        values = ["x" * 2_000_000, 3, 0, 0, 1, 0, 1, 0]
        asked = json.dumps({"data": values, "fn_index": index, "session_hash": "long"}).encode()
        begun = time.monotonic()
        assert ask(url, "/gradio_api/queue/join", "POST", asked)[0] == 200
        said = ask(url, "/gradio_api/queue/data?session_hash=long")[1].decode()
        assert "2,000,000 characters are more than" in said and time.monotonic() - begun < 60

        for body in (b"[]", b"{", b"null", b'{"data": 5}', b'{"data": ["x"], "fn_index": 99, "session_hash": "y"}'):
            assert 400 <= ask(url, "/gradio_api/queue/join", "POST", body)[0] < 500, body
        asked = json.dumps({"data": ["the", *values[1:]], "fn_index": index, "session_hash": "short"}).encode()
        assert ask(url, "/gradio_api/queue/join", "POST", asked)[0] == 200
        assert "process_generating" in ask(url, "/gradio_api/queue/data?session_hash=short")[1].decode(), "it lives on"


def test_without_gradio_the_page_names_its_extra(checkpoint, tmp_path):
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError(name='gradio')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = generate("jax_impl.generate", checkpoint, "--web", "True", env=environment)
    assert done.returncode == 2 and "pip install -e '.[web]'" in done.stderr, done.stderr
