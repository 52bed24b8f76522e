"""The log of a run with a scripted trainer and clock, every record of it derived by hand, resumed and not."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest

from harness import loop, resuming
from harness.runlog import read_metrics
from harness.state import load_state
from recipe.config import ModelConfig, RunConfig
from recipe.data import Dataset
from recipe.params import slot_shapes
from recipe.tokenizer import train_bpe

# A = 2, B = 1, T = 8: 16 tokens an update. An update takes a quarter of a second, the third three quarters, the fourth
# two seconds; an evaluation takes half a second that belongs to no update. Losses are 8/step, norms 2 step, the rate is
# step/8; the fifth is skipped.
UPDATE, LONGER, EVALUATION = 0.25, {3: 0.75, 4: 2.0}, 0.5
# Nats per token by step; e^2, e^1, e^3 and log2(e) = 1.4426950408889634 bits a nat, two bytes a token.
NATS = {0: 3.0, 3: 1.0, 6: 2.0, 7: 3.0}
PERPLEXITY = {1.0: 2.718281828459045, 2.0: 7.38905609893065, 3.0: 20.085536923187668}
BITS = {1.0: 0.7213475204444817, 2.0: 1.4426950408889634, 3.0: 2.1640425613334453}


class Scripted:
    """Does as the lines above say."""

    now = 0.0

    def __init__(self, config: RunConfig, weights) -> None:
        self.environment, self.config = {"device": "abacus"}, config
        self._weights = {name: np.array(weight) for name, weight in weights.items()}
        self.updates = self.skipped = 0
        self.die_at = -1

    def step(self, inputs_ABT, targets_ABT):
        step = self.updates + self.skipped + 1
        if step == self.die_at:
            raise KeyboardInterrupt
        type(self).now += LONGER.get(step, UPDATE)
        self.skipped += step == 5
        self.updates += step != 5
        return {"loss": np.float32(8 / step), "grad_norm": 2.0 * step, "lr": step / 8, "skipped": self.skipped}

    def evaluate(self, batches):
        type(self).now += EVALUATION
        return NATS[self.updates + self.skipped], 0.25

    def weights(self):
        return dict(self._weights)

    def slots(self):
        slots = {slot: {} for slot in ("mu", "exp_avg", "exp_avg_sq")}
        for name, shape in slot_shapes(self.config.model).items():
            slot, _, parameter = name.partition(".")
            slots[slot][parameter] = np.zeros(shape, np.float32)
        return slots

    def counts(self):
        return self.updates, self.skipped

    def restore(self, slots, updates, skipped):
        self.updates, self.skipped = updates, skipped

    def generate(self, tokens, options):
        return []


def train(step, seconds, dt_ms, tok_s, skipped=0):
    """A record of kind train: all tokens and all seconds of updates so far, throughput of the interval."""
    values = {"loss": float(np.float32(8 / step)), "grad_norm": 2.0 * step, "lr": step / 8, "skipped": skipped}
    return {"kind": "train", "step": step} | values | {
        "tok_s": tok_s, "dt_ms": dt_ms, "tokens": 16 * step, "seconds": seconds}  # fmt: skip


def validation(step):
    nats = NATS[step]
    return {"kind": "validation", "step": step, "loss": nats, "accuracy": 0.25, "perplexity": PERPLEXITY[nats],
            "bits_per_byte": BITS[nats]}  # fmt: skip


# Logged every 3 updates, evaluated every 3; the first is read at once, for it holds the compilation, whose throughput
# nobody knows; the second waits for the third, and both get their mean; the fourth is overdue; the seventh is the last.
WHOLE = [
    {"kind": "baselines", "step": 0},
    validation(0),
    train(1, 0.25, 250.0, None),
    train(2, 0.75, 500.0, 32.0),
    train(3, 1.25, 500.0, 32.0),
    validation(3),
    train(4, 3.25, 2000.0, 8.0),
    train(5, 3.5, 250.0, 64.0, skipped=1),
    train(6, 3.75, 250.0, 64.0, skipped=1),
    validation(6),
    train(7, 4.0, 250.0, 64.0, skipped=1),
    validation(7),
]


@pytest.fixture
def config(tmp_path, monkeypatch) -> RunConfig:
    tokens = np.arange(400, dtype=np.uint16) % 250
    tokenizer = train_bpe(["some text"], 260)
    dataset = Dataset(tokenizer, tokens, tokens[:100], bytes_per_token=2.0, leaking_fraction=None, seed=0)
    for module in (loop, resuming):
        monkeypatch.setattr(module, "prepare", lambda *args, **options: dataset)
    monkeypatch.setattr(loop, "plot_runs", lambda folders, picture, baselines: picture.touch())
    monkeypatch.setattr(time, "perf_counter", lambda: Scripted.now)
    Scripted.now = 0.0
    model = ModelConfig(vocab_size=384, hidden_size=6, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
                        num_key_value_heads=1, head_dim=2)  # fmt: skip
    return RunConfig(out=str(tmp_path / "run"), steps=7, accumulation=2, batch_size=1, sequence_length=8, log_every=3,
                     eval_every=3, save_every=4, sample_tokens=0, model=model)  # fmt: skip


def run(config: RunConfig, die_at: int = -1) -> None:
    def make_trainer(*args):
        trainer = Scripted(*args)
        trainer.die_at = die_at
        return trainer

    loop.run(config, framework="script", make_trainer=make_trainer)


def logged(config: RunConfig, file: str = "metrics.jsonl") -> list[dict]:
    """Every line of the log; of the baselines and of the mark of a resumed run only what they are."""
    lines = (Path(config.out) / file).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [{"kind": r["kind"], "step": r["step"]} if r["kind"] in ("baselines", "resume") else r for r in records]


def test_every_record_of_a_run(config, capsys):
    run(config)
    assert logged(config) == WHOLE
    said = capsys.readouterr().out
    # 7 x 16 of 400 tokens.
    assert "400 training tokens (0.28 epochs), 100 held out" in said
    assert "validation 1.0000 nats per token at best" in said and load_state(Path(config.out) / "last").best == 1.0
    lines = [line for line in said.splitlines() if line.startswith("step")]
    assert lines == [
        "step 0/7 (0.0%) | val loss 3.0000 | accuracy 25.00% | ppl 20.09 | bits/byte 2.1640",
        "step 1/7 (14.3%) | loss 8.0000 | grad_norm 2.0000 | lr 1.250e-01 | tok/s - | dt 250 ms",
        "step 3/7 (42.9%) | loss 2.6667 | grad_norm 6.0000 | lr 3.750e-01 | tok/s 32 | dt 500 ms",
        "step 3/7 (42.9%) | val loss 1.0000 | accuracy 25.00% | ppl 2.72 | bits/byte 0.7213",
        # Three updates in two and a half seconds.
        "step 6/7 (85.7%) | loss 1.3333 | grad_norm 12.0000 | lr 7.500e-01 | tok/s 19 | dt 833 ms | skipped 1",
        "step 6/7 (85.7%) | val loss 2.0000 | accuracy 25.00% | ppl 7.39 | bits/byte 1.4427",
        "step 7/7 (100.0%) | loss 1.1429 | grad_norm 14.0000 | lr 8.750e-01 | tok/s 64 | dt 250 ms | skipped 1",
        "step 7/7 (100.0%) | val loss 3.0000 | accuracy 25.00% | ppl 20.09 | bits/byte 2.1640",
    ]


def test_every_record_of_a_run_that_was_killed_and_resumed(config):
    """Saved after the fourth update, killed before the seventh; the fifth is the first of the rest."""
    with pytest.raises(KeyboardInterrupt):
        run(config, die_at=7)
    assert logged(config) == WHOLE[:10]
    run(dataclasses.replace(config, resume=config.out))
    assert logged(config) == [
        *WHOLE[:7],
        {"kind": "resume", "step": 4},
        train(5, 3.5, 250.0, None, skipped=1),
        *WHOLE[8:],
    ]
    assert logged(config, "undone.jsonl") == WHOLE[7:10]
    assert [r["step"] for r in read_metrics(config.out) if r["kind"] == "train"] == list(range(1, 8))


def test_the_numbers_above_are_the_constants_they_are_said_to_be():
    for nats, bits in BITS.items():
        assert abs(bits * 2 * 0.6931471805599453 - nats) <= 4 * nats * 2.0**-53
        assert abs(np.log(PERPLEXITY[nats]) - nats) <= 4 * nats * 2.0**-53
