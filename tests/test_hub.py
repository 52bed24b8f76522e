"""Names on the Hub: weights, tokenizers and texts of a Hub that this test serves, with its cache, its failures, and
without it."""

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harness.commands import checkpoint
from harness.commands.train import parse_run_config
from harness.folders import find_weights, load_folder, save_folder
from recipe import hub as of_hub
from recipe.config import DataConfig, ModelConfig, UserError
from recipe.corpus import load_documents
from recipe.hub import NotHad, is_hub_name, pinned, quiet, reach, tokenizer_folder, weights_folder
from recipe.params import init_params
from recipe.reading import read_json
from recipe.tokenizer import load_tokenizer, train_bpe
from tests.hub_server import COMMIT, HubServer, connect, serving
from tests.test_loop import Toy, loop, no_picture  # noqa: F401 (a fixture for all)

ROOT = Path(__file__).resolve().parents[1]
MODEL = ModelConfig(
    vocab_size=384, hidden_size=6, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=2, max_position_embeddings=64,
)  # fmt: skip
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with the weights me/small, and an empty cache; what it is asked is in `asked`."""
    monkeypatch.chdir(tmp_path)
    server = HubServer()
    folder = server.folders["me/small"] = tmp_path / "hub-small"
    save_folder(folder, MODEL, init_params(MODEL, 0), train_bpe(["a quick brown fox"] * 9, 300))
    (folder / "README.md").write_text("no part of it")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "consolidated.safetensors").write_bytes(b"nor this")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"nor this")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "x.jinja").write_text(CHAT)
    (folder / "chat_template.jinja").write_text(CHAT)
    with serving(server) as address:
        connect(monkeypatch, address, tmp_path / "cache")
        yield server


def api(server: HubServer) -> list[str]:
    """The questions about models and datasets that came."""
    return [path for path in server.asked if path.startswith(("/api/models", "/api/datasets"))]


def forget() -> None:
    """As in another process."""
    of_hub._found.clear()
    of_hub._said.clear()


def test_weights_are_fetched_once_and_only_what_belongs_to_them(hub, capfd):
    folder = weights_folder("me/small")
    assert folder.name == COMMIT and pinned("me/small", folder) == f"me/small@{COMMIT}"
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == [
        "additional_chat_templates/x.jinja", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "asking the Hub for me/small"
    assert said[1].startswith("fetching 7 files of me/small, ") and said[2].startswith("fetched in ") and len(said) == 3
    count = len(hub.asked)
    assert weights_folder("me/small") == folder and len(hub.asked) == count
    forget()
    assert weights_folder(f"me/small@{COMMIT}") == folder and len(hub.asked) == count, "a commit is looked up here"
    assert capfd.readouterr().err == ""
    assert weights_folder("me/small@main") == folder and capfd.readouterr().err == "asking the Hub for me/small@main\n"
    assert not any("resolve" in path for path in hub.asked[count:])


def test_a_large_file_is_said(hub, capfd, monkeypatch):
    monkeypatch.setattr(of_hub, "LARGE", 1_000)
    weights_folder("me/small")
    assert "\nfetching model.safetensors, " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 bytes"), (1_500, "1.5 kB"), (2_000_000, "2.0 MB"), (3 * 10**9, "3.0 GB")]
)
def test_sizes_in_words(count, said):
    assert of_hub._size(count) == said


def test_a_folder_here_comes_first(hub, tmp_path):
    assert is_hub_name("me/small") and is_hub_name("me/small@v1.0") and is_hub_name("Qwen/Qwen3-0.6B")
    for name in (
        "",
        "small",
        "/me/small",
        "./me",
        "../me",
        "me/small/best",
        "me/",
        "m e/x",
        "me/small@",
        "a/" + "b" * 9 + "\n",
    ):
        assert not is_hub_name(name)
    (tmp_path / "me").mkdir()
    assert not is_hub_name("me/small") and weights_folder("me/small") == Path("me/small")
    with pytest.raises(UserError, match=r"me/small is not a folder; name a run folder"):
        find_weights("me/small")
    with pytest.raises(
        UserError, match=r"tokenizer me/small is neither .* \(me/ is a folder here, so the Hub is not asked\)"
    ):
        load_tokenizer("me/small")
    with pytest.raises(UserError, match=r"tokenizer me2/tokenizer\.json is neither .* \(it is no name of the Hub's\)"):
        load_tokenizer("me2/tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer a/b/c is neither .* \(it is no name of the Hub's\)"):
        load_tokenizer("a/b/c")
    (tmp_path / "me" / "small").mkdir()
    assert pinned("me/small", Path("me/small")) == "me/small" and not hub.asked


REFUSALS = {
    "me/gone": (None, "the Hub has no model me/gone, or it is private (then run: hf auth login)"),
    "me/small@v9": ((404, "RevisionNotFound"), "me/small on the Hub has no revision v9"),
    "me/small@v8": ((403, "GatedRepo"), "me/small is gated (accept its terms on its page, then run: hf auth login)"),
    "me/small@v7": ((503, ""), "the Hub cannot be reached (Server error '503 Service Unavailable'"),
    "me/a--b": (None, "no name of the Hub's: "),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_hub_does_not_give_is_a_line_after_one_question(hub, name, capfd):
    refusal, line = REFUSALS[name]
    if refusal:
        hub.refusals[f"/api/models/me/small/revision/{name.partition('@')[2]}"] = refusal
    with pytest.raises(UserError) as caught:
        weights_folder(name)
    said = str(caught.value)
    assert said.startswith(f"{name} is not a folder, and ") and line in said and "\n" not in said
    assert "; name a run folder, a Hugging Face weights folder or OWNER/NAME." in said
    assert capfd.readouterr().err == f"asking the Hub for {name}\n" and len(api(hub)) == (name != "me/a--b")


@pytest.mark.parametrize(
    ("lost", "pattern"), [("config.json", "config.json"), ("model.safetensors", "model*.safetensors")]
)
def test_a_repository_without_weights_of_ours(hub, lost, pattern):
    (hub.folders["me/small"] / lost).unlink()
    with pytest.raises(UserError) as caught:
        weights_folder("me/small")
    assert f"me/small on the Hub has no {pattern};" in str(caught.value)


def test_a_file_that_cannot_be_fetched(hub):
    hub.refusals[f"/me/small/resolve/{COMMIT}/config.json"] = (403, "GatedRepo")
    with pytest.raises(UserError, match=r"me/small cannot be fetched from the Hub \(403 Client Error"):
        weights_folder("me/small")


def test_without_the_hub_the_cache_serves_if_it_has_all(hub, monkeypatch, capfd):
    tokenizer_folder("me/small")
    hub.refusals["/api/models/me/small"] = (502, "")
    forget()
    with pytest.raises(UserError, match=r"'502 Bad Gateway'.*, and its cache has no such weights; name"):
        weights_folder("me/small")
    hub.refusals.clear()
    folder = weights_folder("me/small")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    forget()
    hub.asked.clear()
    capfd.readouterr()
    assert weights_folder("me/small") == folder and not hub.asked
    assert capfd.readouterr().err.splitlines() == [
        f"note: the Hub is not asked, as HF_HUB_OFFLINE is set; the weights in the cache are taken, {COMMIT[:12]}",
    ]
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    forget()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and its cache has no such weights"):
        weights_folder("me/small")
    with pytest.raises(
        UserError, match=r"tokenizer gpt2 is neither .* HF_HUB_OFFLINE is set, and its cache has no such"
    ):
        load_tokenizer("gpt2")
    assert not hub.asked


def test_a_tokenizer_is_that_of_the_folder_with_what_stands_beside_it(hub):
    theirs, ours = load_tokenizer("me/small"), load_tokenizer(hub.folders["me/small"])
    assert theirs.identity == ours.identity and theirs.companions == ours.companions
    assert theirs.companions["additional_chat_templates/x.jinja"] == CHAT
    assert not any(path.endswith(".safetensors") for path in hub.asked)


def test_a_run_begins_with_weights_of_the_hub_and_records_their_commit(hub, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a quick brown fox jumps over the lazy dog " * 300)
    flags = f"--init me/small --data.corpus {corpus} --data.cache_dir {tmp_path}/texts --data.validation_tokens 64"
    flags += " --steps 4 --batch_size 2 --save_every 2 --sample_tokens 0 --out run"
    config = parse_run_config(flags.split(), framework="jax")
    name = f"me/small@{COMMIT}"
    assert (config.init, config.data.tokenizer, config.model, config.sequence_length) == (name, name, MODEL, 64)
    began = []

    def make_trainer(config, weights):
        began.append({name: np.array(weights[name]) for name in weights})
        return Toy(config, weights)

    hub.folders.clear()
    forget()
    loop.run(config, framework="toy", make_trainer=make_trainer)
    assert began[0].keys() == (wanted := init_params(MODEL, 0)).keys()
    assert all((began[0][name] == wanted[name]).all() for name in wanted)
    assert read_json(tmp_path / "run" / "run.json")["config"]["init"] == name
    again = parse_run_config(["--resume", "run", "--init", "me/small", "--log_every", "3"], framework="jax")
    assert again == dataclasses.replace(config, resume="run", log_every=3)
    with pytest.raises(UserError, match="cannot change init=me/other"):
        parse_run_config(["--resume", "run", "--init", "me/other"], framework="jax")
    assert parse_run_config(["--config", "run", "--out", "next"], framework="jax") == dataclasses.replace(
        config, out="next"
    )


def test_the_other_commands_take_such_names_too(hub, monkeypatch, capsys):
    assert load_folder(find_weights("me/small"))[0] == MODEL
    monkeypatch.setattr(sys, "argv", ["checkpoint", "inspect", "me/small"])
    checkpoint.main()
    assert "parameters 2," in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["checkpoint", "export", "me/small", "copy"])
    checkpoint.main()
    assert load_folder(Path("copy"))[1].entries.keys() == init_params(MODEL, 0).keys()
    assert (Path("copy") / "chat_template.jinja").read_text() == CHAT and not Path(
        "copy", "tokenizer.json"
    ).is_symlink()


def test_a_corpus_asks_once_and_says_so(hub, monkeypatch, capfd):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: [{"text": "a"}, {"text": "b"}])
    config = DataConfig(corpus="hub:me/small")
    assert load_documents(config).texts == ["a", "b"] == load_documents(config).texts
    assert capfd.readouterr().err == "asking the Hub for me/small\n"
    hub.refusals["/api/datasets/me/small"] = (503, "")
    hub.asked.clear()
    with pytest.raises(UserError) as caught:
        load_documents(config)
    assert len(api(hub)) == 1 and "hub:me/small cannot be read (the Hub cannot be reached (" in str(caught.value)
    with pytest.raises(UserError, match=r"cannot be read \(the Hub has no dataset me/gone, or it is private"):
        load_documents(DataConfig(corpus="hub:me/gone"))
    with pytest.raises(NotHad, match="no dataset me/gone"):
        reach("me/gone", "dataset")


def test_a_quiet_stretch_gives_the_levels_back_when_the_last_one_ends():
    before = [logging.getLogger(library).level for library in of_hub.LIBRARIES]
    first, second = quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert {logging.getLogger(library).level for library in of_hub.LIBRARIES} == {logging.CRITICAL}
    second.__exit__(None, None, None)
    assert [logging.getLogger(library).level for library in of_hub.LIBRARIES] == before


@pytest.mark.slow
def test_a_dataset_streams_through_its_own_library(hub, tmp_path):
    """The libraries read their settings from the environment when they are imported, so in a process of its own."""
    hub.folders["me/texts"] = tmp_path / "texts"
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    program = "from recipe.config import DataConfig; from recipe.corpus import load_documents;"
    program += "print(load_documents(DataConfig(corpus='hub:me/texts')).texts)"
    with serving(hub) as address:
        settings = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "0",
        }
        line = [sys.executable, "-c", program]
        done = subprocess.run(line, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (
        0, "['first', 'second']\n", "asking the Hub for me/texts\n"
    )  # fmt: skip
