"""The run's log: valid JSON whatever the numbers, the same text for both frameworks, events that TensorBoard reads."""

import dataclasses
import io
import json
import math
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from harness import loop, surroundings
from harness.plot import plot_runs
from harness.runlog import EventFile, RunLog, read_metrics, step_line, validation_line
from recipe.config import UserError, from_dict
from recipe.presets import get_preset

ROOT = Path(__file__).resolve().parents[1]
CONFIG = dataclasses.replace(get_preset("tiny"), steps=30, log_every=5)
WITH_EVENTS = dataclasses.replace(CONFIG, tensorboard=True)


def write_run(folder: Path, *, framework: str = "jax", losses: dict[int, float] | None = None) -> None:
    """A whole run of 30 updates with round numbers: 2 s for the first, 0.5 s for each later one, 100 tokens each."""
    with RunLog(folder, CONFIG, framework=framework, environment={"device": "abacus"}) as log:
        log.header(["first line", "second line"])
        log.log_baselines({"uniform": 9.0, "bigram": 5.0}, bytes_per_token=3.0)
        for step in range(1, 31):
            loss = (losses or {}).get(step, 9.0 - step / 10)
            seconds = 2.0 if step == 1 else 0.5
            log.log_step(step=step, loss=loss, grad_norm=0.25, lr=0.02, skipped=0, seconds=seconds, tokens=100)
            if step % 10 == 0:
                log.log_validation(step=step, loss=7.0, accuracy=0.125, perplexity=1096.63, bits_per_byte=3.2)


def test_the_lines_are_exactly_these():
    values = {"loss": 5.25, "grad_norm": 0.5, "lr": 0.02, "dt_ms": 1234.4}
    assert (
        step_line(7, 400, **values, skipped=0, tok_s=12345.6)
        == "step 007/400 (1.8%) | loss 5.2500 | grad_norm 0.5000 | lr 2.000e-02 | tok/s 12,346 | dt 1,234 ms"
    )
    assert step_line(7, 400, **values, skipped=2, tok_s=None).endswith("| tok/s - | dt 1,234 ms | skipped 2")
    assert (
        validation_line(400, 400, loss=4.5, accuracy=0.1234, perplexity=90.017, bits_per_byte=2.06)
        == "step 400/400 (100.0%) | val loss 4.5000 | accuracy 12.34% | ppl 90.02 | bits/byte 2.0600"
    )


def test_lines_without_a_terminal_and_none_of_a_bar(tmp_path, capsys):
    write_run(tmp_path / "run")
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    # 9 / ln 2 / 3 bytes per token = 4.328 bits per byte
    beat = "to beat    uniform 9.000, bigram 5.000 nats/token (4.328, 2.404 bits/byte)"
    assert lines[:3] == ["first line", "second line", beat]
    steps = [line.split(" ")[1] for line in lines[3:] if "grad_norm" in line]
    assert steps == ["01/30", "05/30", "10/30", "15/30", "20/30", "25/30", "30/30"]
    assert len([line for line in lines if "val loss" in line]) == 3


def test_both_frameworks_print_the_same(tmp_path, capsys):
    write_run(tmp_path / "a", framework="jax")
    first = capsys.readouterr().out
    write_run(tmp_path / "b", framework="torch")
    assert capsys.readouterr().out == first


def test_a_terminal_gets_a_bar_instead_of_lines(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stdout, stderr = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("COLUMNS", "120")
    write_run(tmp_path / "run")
    assert "grad_norm" not in stdout.getvalue()
    assert stdout.getvalue().count("val loss") == 3 and "first line" in stdout.getvalue()
    last = stderr.getvalue().replace("\r", "\n").strip().splitlines()[-1]
    for part in ("30/30", "loss 6.0000", "lr 2.000e-02", "200 tok/s"):
        assert part in last


def test_throughput_leaves_out_the_first_update(tmp_path):
    write_run(tmp_path / "run")
    train = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert [record["tok_s"] for record in train] == [None] + [200.0] * 29
    assert [record["dt_ms"] for record in train] == [2000.0] + [500.0] * 29
    assert (train[-1]["tokens"], train[-1]["seconds"]) == (3000, 16.5)


def test_one_call_may_cover_several_updates(tmp_path, capsys):
    with RunLog(tmp_path / "run", CONFIG, framework="jax", environment={}) as log:
        values = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "skipped": 0}
        log.log_step(step=1, seconds=9.0, tokens=100, **values)
        log.log_step(step=5, seconds=2.0, tokens=400, **values)
        with pytest.raises(ValueError, match="step=5 does not follow step 5"):
            log.log_step(step=5, seconds=2.0, tokens=400, **values)
    assert [record["dt_ms"] for record in read_metrics(tmp_path / "run")] == [9000.0, 500.0]
    assert "| tok/s 200 | dt 500 ms" in capsys.readouterr().out.splitlines()[-1]


def test_numbers_that_are_not_finite_are_null(tmp_path, capsys):
    write_run(tmp_path / "run", losses={3: math.nan, 4: math.inf, 5: -math.inf})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    records = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [r["loss"] for r in records if r["kind"] == "train"][2:6] == [None, None, None, 8.4]
    assert "loss -inf" in capsys.readouterr().out


def test_each_record_is_on_disk_at_once(tmp_path):
    with RunLog(tmp_path / "run", WITH_EVENTS, framework="jax", environment={}) as log:
        for step in (1, 2):
            log.log_step(step=step, loss=1.0, grad_norm=1.0, lr=1.0, skipped=0, seconds=1.0, tokens=1)
            assert len(read_metrics(tmp_path / "run")) == step
            assert len(scalars(tmp_path / "run")) == step


def test_an_unfinished_last_line_is_dropped(tmp_path):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    whole = read_metrics(tmp_path / "run")
    path.write_text(path.read_text()[:-10])
    assert read_metrics(tmp_path / "run") == whole[:-1]


def damaged(path: Path, case: str) -> bytes:
    """What the log of `write_run` may have become: 3 records of evaluations and 30 of updates, and a first line."""
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    return {
        "emptied": b"",
        "zeroed": bytes(len(whole)),
        "its beginning lost": b"".join(lines[8:]),
        "its end lost": b"".join(lines[:8]),
        "holes": b"".join(lines[::2]),
    }[case]


LINES = {
    "no JSON": b"{{{",
    "zeros": bytes(9),
    "a list": b"[1]",
    "no step": b'{"kind": "train"}',
    "a text for a step": b'{"kind": "train", "step": "3"}',
    "no kind": b'{"step": 3}',
    "another encoding": b'{"kind": "\xff", "step": 3}',
    "thousands of brackets": b"[" * 99_999,
    "control characters": b'{"kind": 1, "\\n\\u001b": "\\u001b[2J"}',
}


@pytest.mark.parametrize("case", LINES)
def test_a_damaged_line_of_the_log_is_told(case, tmp_path):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:6], LINES[case] + b"\n", *lines[6:]]))
    for use in (read_metrics, lambda run: plot_runs([run], tmp_path / "o.png")):
        with pytest.raises(
            UserError, match=r"line 7 of .*metrics\.jsonl.* The log is damaged; mend the line"
        ) as caught:
            use(tmp_path / "run")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def resume(run: Path) -> list[dict]:
    """Go on after step 20; the records then."""
    with RunLog(run, CONFIG, framework="jax", environment={}, resume_at=20) as log:
        values = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "skipped": 0, "seconds": 0.5}
        log.log_step(step=21, tokens=CONFIG.tokens_per_step, **values)
    return read_metrics(run)


@pytest.mark.parametrize(
    ("case", "lacking"),
    [("emptied", 20), ("zeroed", 20), ("its beginning lost", 7), ("its end lost", 13), ("holes", 10), ("", 0)],
)
def test_a_log_without_the_records_before_the_state_is_told_and_gone_on_with(case, lacking, tmp_path, capsys):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(damaged(path, case) if case else path.read_bytes())
    kept = [record for record in read_metrics(tmp_path / "run") if record["step"] <= 20]
    capsys.readouterr()
    records = resume(tmp_path / "run")
    out = capsys.readouterr().out
    assert (f"lacks {lacking} of the 20 training records" in out) == bool(lacking)
    assert records[: len(kept)] == kept and records[-1]["step"] == 21
    assert records[-1]["tokens"] == 21 * CONFIG.tokens_per_step and records[-1]["dt_ms"] == 500.0


def test_a_run_goes_on_without_a_log_that_was_moved_away(tmp_path, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").rename(tmp_path / "damaged.jsonl")
    assert [record["kind"] for record in resume(tmp_path / "run")] == ["resume", "train"]
    assert "lacks 20 of the 20 training records" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "holds a list"), ("{", "is not JSON"), ("{}", "does not say framework"), ('{"framework": 3}', "must be")],
)
def test_the_plot_tells_a_damaged_run_json(content, message, tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(content)
    with pytest.raises(UserError, match=message):
        plot_runs([tmp_path / "run"], tmp_path / "o.png")


@pytest.mark.parametrize("change", [{"loss": "x"}, {"loss": [1]}, {"losses": 1.0}], ids=str)
def test_the_plot_tells_a_value_that_is_no_number(change, tmp_path):
    write_run(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "train", "step": 31} | change) + "\n")
    with pytest.raises(UserError, match="the train record of step 31"):
        plot_runs([tmp_path / "run"], tmp_path / "o.png")


@pytest.mark.parametrize("out", ["p.txt", "p", "p.json", "nowhere/p.png", "p.\x1b[2J"])
def test_the_plot_refuses_a_file_that_is_no_picture_before_it_reads_a_run(out, tmp_path):
    with pytest.raises(UserError, match="--out ") as caught:
        plot_runs([tmp_path / "no run"], tmp_path / out)
    assert str(caught.value).isprintable()


def test_run_json_restores_the_config_and_names_its_surroundings(tmp_path):
    write_run(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert from_dict(record["config"]) == CONFIG
    assert record["framework"] == "jax" and record["environment"] == {"device": "abacus"}
    assert record["versions"]["numpy"] == __import__("numpy").__version__
    assert record["started"].endswith("+00:00") and record["python"] and record["platform"]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_commit_is_recorded_with_dirty_files(tmp_path, monkeypatch):
    module = tmp_path / "harness" / "surroundings.py"
    module.parent.mkdir()
    module.write_text("")
    monkeypatch.setattr(surroundings, "__file__", str(module))
    assert surroundings.git_commit() is None
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert surroundings.git_commit() == commit
    module.write_text("changed")
    assert surroundings.git_commit() == commit + "-dirty"


def test_a_run_is_never_overwritten(tmp_path):
    write_run(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match=r"run\.json"):
        RunLog(tmp_path / "run", CONFIG, framework="jax", environment={})
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def events(folder: Path) -> list:
    """The events of the one file in the folder, read by tensorboardX: other messages than those that wrote them."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    (path,) = folder.glob("events.out.tfevents.*")
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack_from("<Q", data)
        assert struct.unpack_from("<I", data, 8)[0] == masked_crc32c(data[:8])
        payload = data[12 : 12 + length]
        assert struct.unpack_from("<I", data, 12 + length)[0] == masked_crc32c(payload)
        found.append(Event.FromString(payload))
        data = data[16 + length :]
    assert found[0].file_version == "brain.Event:2"
    return found[1:]


def scalars(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, values) of each event."""
    return [(event.step, {v.tag: v.simple_value for v in event.summary.value}) for event in events(folder)]


def test_events_are_tensorboards(tmp_path):
    events = EventFile(tmp_path)
    events.add_scalars(0, {"train/loss": 9.5})
    events.add_scalars(300, {"train/loss": -0.25, "train/lr": 1e-3})
    events.close()
    single = struct.unpack("<f", struct.pack("<f", 1e-3))[0]
    assert scalars(tmp_path) == [(0, {"train/loss": 9.5}), (300, {"train/loss": -0.25, "train/lr": single})]


def test_events_are_written_only_if_asked_for(tmp_path):
    write_run(tmp_path / "run")
    assert not list((tmp_path / "run").glob("events.*"))
    with RunLog(tmp_path / "with", WITH_EVENTS, framework="jax", environment={}) as log:
        log.log_step(step=1, loss=2.5, grad_norm=0.25, lr=0.5, skipped=0, seconds=2.0, tokens=100)
    ((step, values),) = scalars(tmp_path / "with")
    assert step == 1 and values["train/loss"] == 2.5 and values["train/lr"] == 0.5 and "train/tok_s" not in values


def test_events_of_a_resumed_run_replace_those_it_makes_again(tmp_path):
    """TensorBoard drops what an earlier file has from the step on that a session's start names."""
    EventFile(tmp_path, first_step=7).close()
    (start,) = events(tmp_path)
    assert start.step == 7 and start.session_log.status == start.session_log.START


def test_events_without_the_package_are_refused_before_a_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    config = dataclasses.replace(WITH_EVENTS, out=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"--tensorboard True needs tensorboard.* pip install -e '\.\[tensorboard\]'"):
        loop.run(config, framework="jax", make_trainer=None)
    assert not list(tmp_path.iterdir())


def test_logging_loads_no_framework(tmp_path):
    """TensorBoard writers import torch where it is installed; a JAX run must not, nor wait for matplotlib."""
    program = f"""
        import dataclasses, sys
        import harness.runlog
        from recipe.presets import get_preset
        config = dataclasses.replace(get_preset("tiny"), tensorboard=True)
        log = harness.runlog.RunLog({str(tmp_path / "run")!r}, config, framework="jax", environment={{}})
        log.log_step(step=1, loss=1.0, grad_norm=1.0, lr=1.0, skipped=0, seconds=1.0, tokens=1)
        log.close()
        frameworks = {{"jax", "torch", "tensorflow", "transformers", "tensorboardX", "matplotlib"}}
        print("loaded", sorted(frameworks & set(sys.modules)))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


def drawn(folders: list[Path], out: Path, monkeypatch, **options):
    """The figure that plot_runs draws."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    plot_runs(folders, out, **options)
    return figures[0]


def test_the_plot_shows_both_runs_and_what_to_beat(tmp_path, monkeypatch):
    write_run(tmp_path / "mine", framework="jax", losses={4: math.nan})
    write_run(tmp_path / "yours", framework="torch")
    figure = drawn([tmp_path / "mine", tmp_path / "yours"], tmp_path / "o.png", monkeypatch)
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    loss_axes, accuracy_axes, perplexity_axes = figure.axes
    lines = {line.get_label(): line for line in loss_axes.get_lines()}
    assert list(lines) == [
        *("mine (jax): train", "mine (jax): validation", "yours (torch): train", "yours (torch): validation"),
        *("uniform: 9.00", "bigram: 5.00"),
    ]
    assert list(lines["yours (torch): train"].get_xdata()) == list(range(1, 31))
    assert list(lines["yours (torch): train"].get_ydata()) == [9.0 - step / 10 for step in range(1, 31)]
    assert math.isnan(lines["mine (jax): train"].get_ydata()[3])
    assert list(accuracy_axes.get_lines()[1].get_ydata()) == [0.125] * 3
    assert list(perplexity_axes.get_lines()[0].get_xdata()) == [10, 20, 30]
    assert lines["mine (jax): train"].get_linestyle() != lines["yours (torch): train"].get_linestyle()


def test_given_baselines_replace_the_recorded_ones(tmp_path, monkeypatch):
    write_run(tmp_path / "mine")
    figure = drawn([tmp_path / "mine"], tmp_path / "o.png", monkeypatch, baselines={"trigram": 4.0})
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert "trigram: 4.00" in labels and "bigram: 5.00" not in labels


def test_runs_of_one_name_are_told_apart_by_path(tmp_path, monkeypatch):
    write_run(tmp_path / "a" / "run")
    write_run(tmp_path / "b" / "run")
    figure = drawn([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "o.png", monkeypatch)
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert f"{tmp_path / 'a' / 'run'} (jax): train" in labels and f"{tmp_path / 'b' / 'run'} (jax): train" in labels


def test_the_plot_has_a_command_line(tmp_path):
    write_run(tmp_path / "mine")

    def command(*arguments):
        line = [sys.executable, "-m", "harness.commands.plot", *map(str, arguments)]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)
        return done.returncode, done.stderr

    assert command(tmp_path / "mine", tmp_path / "mine", "--out", tmp_path / "o.png") == (0, "")
    assert (tmp_path / "o.png").is_file()
    for arguments, part in (((), "no run folder"), ((tmp_path / "no",), "does not exist"), (("--ot", "x"), "--out")):
        code, stderr = command(*arguments)
        assert code == 2 and part in stderr and stderr.count("\n") == 1


def test_a_run_without_updates_is_not_plotted(tmp_path):
    RunLog(tmp_path / "run", CONFIG, framework="jax", environment={}).close()
    with pytest.raises(ValueError, match="no training record"):
        plot_runs([tmp_path / "run"], tmp_path / "o.png")
    assert not (tmp_path / "o.png").exists()
