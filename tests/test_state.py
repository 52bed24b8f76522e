"""The training state's folder: what is written comes back, and what does not fit is refused in one line."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from harness import cli
from harness.commands import checkpoint
from harness.manifest import seal
from harness.state import SLOTS, TrainingState, load_state, save_state
from harness.tensors import Damaged
from recipe.config import MuonConfig, PrecisionConfig, RunConfig, UserError
from recipe.params import init_params, slot_shapes
from tests.test_checkpoint import MODEL

CONFIG = RunConfig(
    model=dataclasses.replace(MODEL, dropout=0.1, attention_bias=True, tie_word_embeddings=False),
    precision=PrecisionConfig(params="float64", compute="float64", newton_schulz="float64"),
    muon=MuonConfig(learning_rate=0.03),
    prompts=("a", "b"),
    sequence_length=16,
    seed=5,
)
ABOUT = {"framework": "abacus", "versions": {"numpy": "2"}}


def state(**changes) -> TrainingState:
    generator = np.random.default_rng(0)
    weights = {name: weight.astype(np.float64) + 2**-40 for name, weight in init_params(CONFIG.model, seed=0).items()}
    slots = {slot: {} for slot in SLOTS}
    for name, shape in slot_shapes(CONFIG.model).items():
        slot, _, parameter = name.partition(".")
        slots[slot][parameter] = generator.standard_normal(shape)
    values = dict(updates=40, skipped=2, best=3.25, text="abc") | changes
    return TrainingState(CONFIG, weights, slots, **values)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state") / "last"
    save_state(folder, state(), None, ABOUT)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "last")


def test_a_saved_state_comes_back_bit_for_bit(written):
    expected, loaded = state(), load_state(written)
    assert loaded.config == CONFIG
    assert (loaded.updates, loaded.skipped, loaded.position, loaded.best, loaded.text) == (40, 2, 42, 3.25, "abc")
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(loaded.weights[name], weight, err_msg=name)
    for slot in SLOTS:
        assert loaded.slots[slot].keys() == expected.slots[slot].keys() != set()
        for name, array in expected.slots[slot].items():
            np.testing.assert_array_equal(loaded.slots[slot][name], array, err_msg=f"{slot} {name}")
    run = json.loads((written / "run.json").read_text())
    assert {"framework": "abacus", "seed": 5, "position": 42, "format": 2}.items() <= run.items()


def test_the_slots_have_the_names_of_the_contract(written):
    stored = load_file(written / "optimizer.safetensors")
    assert {name: array.shape for name, array in stored.items()} == slot_shapes(CONFIG.model)
    assert "mu.model.layers.0.self_attn.q_proj.weight" in stored and "exp_avg_sq.lm_head.weight" in stored
    assert not any(name.startswith("mu.") and name.endswith((".bias", "norm.weight")) for name in stored)


def test_no_evaluation_yet_is_an_infinite_best(tmp_path):
    save_state(tmp_path / "last", state(best=math.inf), None, ABOUT)
    assert load_state(tmp_path / "last").best == math.inf


def test_a_state_is_weights_too(written):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(written, dtype="float64")
    for name, weight in state().weights.items():
        np.testing.assert_array_equal(theirs.get_parameter(name).detach().numpy(), weight, err_msg=name)


def test_every_wrong_slot_is_named_at_once(folder):
    stored = load_file(folder / "optimizer.safetensors")
    del stored["mu.model.layers.0.mlp.up_proj.weight"]
    stored["mu.model.norm.weight"] = np.zeros(30)
    stored["exp_avg.model.norm.weight"] = np.zeros(29)
    save_file(stored, folder / "optimizer.safetensors")
    seal_again(folder)
    with pytest.raises(UserError) as caught:
        load_state(folder)
    for part in (
        "missing mu.model.layers.0.mlp.up_proj.weight (14, 30)",
        "unexpected mu.model.norm.weight (30,)",
        "misshapen exp_avg.model.norm.weight (29,) for (30,)",
    ):
        assert part in str(caught.value)


def seal_again(folder) -> None:
    """As if what lies there now had been written so."""
    values = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    del values["checksum"]
    seal(folder, "run.json", values, {})


def changed(**fields):
    return lambda values: values | fields


def config(section="", **fields):
    """A change of the configuration in run.json, or of a part of it; None takes a field out."""

    def change(values):
        part = values["config"][section] if section else values["config"]
        part |= fields
        for name in [name for name, value in fields.items() if value is None]:
            del part[name]
        return values

    return change


def lacking(name):
    return lambda values: {other: value for other, value in values.items() if other != name}


REFUSED = {
    "format": (changed(format=3), "has format 3, this version reads 1 and 2"),
    "a format that is no number": (changed(format=["\x1b"] * 999), "this version reads 1"),
    "position": (changed(position=40), "40 updates and 2 skipped ones do not make position 40"),
    "negative counts": (changed(updates=-2, skipped=44), "do not make position 42"),
    "a list": (lambda _: [], "holds a list"),
    **{f"without {name}": (lacking(name), f"does not say {name}") for name in ("updates", "skipped", "position",
       "best_validation_loss", "training_text", "config")},
    "a text for a count": (changed(updates="40"), "updates='40' must be a whole number"),
    "a truth value for a count": (changed(skipped=True), "skipped=True must be a whole number"),
    "a loss that is none": (changed(best_validation_loss=math.nan), "best_validation_loss=nan"),
    "no configuration": (changed(config=[]), "config=[] must be"),
    "a later version's field": (config(warp=1), "has warp, unknown to this version"),
    "a later version's field inside": (config("muon", warp=1), "has muon.warp, unknown to this version"),
    "a field less": (config(seed=None), "does not say seed"),
    "a field less inside": (config("model", rope_theta=None), "does not say model.rope_theta"),
    "a section that is a list": (config(muon=[1]), "muon=[1] must be"),
    "a text for prompts": (config(prompts="abc"), "prompts='abc' must be a list"),
    "a wrong type": (config(seed="5"), "seed='5' must be"),
    "a wrong type inside": (config("model", hidden_size=30.0), "hidden_size=30.0 must be"),
    "a billion layers": (config("model", num_hidden_layers=10**9), "=1000000000 must be at most 16384"),
    "more layers than the file": (config("model", num_hidden_layers=9999), "too few for num_hidden_layers=9,999"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_run_json_must_not_say_is_refused(case, folder):
    change, message = REFUSED[case]
    values = change(json.loads((folder / "run.json").read_text()))
    (folder / "run.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        load_state(folder)
    said = str(caught.value)
    assert said.isprintable() and len(said) < 500
    assert message in said or case == "more layers than the file", "a checksum is looked at before the tensors"
    assert isinstance(caught.value, Damaged) or case == "a list", "this file was not written so"
    if isinstance(values, dict) and case != "a loss that is none":
        values.pop("checksum")
        seal(folder, "run.json", values, {})
        with pytest.raises(UserError) as caught:
            load_state(folder)
        assert message in str(caught.value) and not isinstance(caught.value, Damaged), "this one was"


def test_slots_of_another_dtype_are_refused(folder):
    stored = load_file(folder / "optimizer.safetensors")
    save_file({name: array.astype(np.int8) for name, array in stored.items()}, folder / "optimizer.safetensors")
    seal_again(folder)
    with pytest.raises(UserError, match="dtype I8, not one of F64, F32, F16, BF16: "):
        load_state(folder)


def test_damaged_files_are_told(folder):
    (folder / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"optimizer\.safetensors is not a safetensors file"):
        load_state(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is not JSON"):
        load_state(folder)
    (folder / "run.json").unlink()
    with pytest.raises(UserError, match=r"holds no run\.json"):
        load_state(folder)


def test_inspect_tells_steps_slots_and_norms(written, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["checkpoint", "inspect", str(written)])
    assert cli.run(checkpoint.main) == 0
    said = capsys.readouterr().out
    assert "step 42 of 100: 40 updates, 2 skipped, best validation loss 3.2500, by abacus at " in said
    for slot, arrays in state().slots.items():
        norm = math.sqrt(sum(float(np.sum(array**2)) for array in arrays.values()))
        assert f"{slot:<10} {len(arrays)} tensors of norm {norm:.6g}" in said
