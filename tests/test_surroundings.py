"""What differs between a run's record and the process that goes on: said in lines, whatever the record holds."""

import dataclasses
import json

import pytest

from harness.surroundings import config_differences, differences, surroundings
from recipe.presets import get_preset

COMMITS = ("0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98")
NOW = {
    **{"framework": "jax", "git_commit": COMMITS[1] + "-dirty", "python": "3.12.1", "platform": "Linux-6"},
    "versions": {"jax": "0.11.0", "optax": "0.2.6", "numpy": "2.0"},
    "environment": {"device": "NVIDIA H200", "backend": "gpu", "x64": False, "machine": {"cores": 2, "names": ("a",)}},
}


def test_nothing_differs_from_oneself():
    about = {"framework": "jax", **surroundings(), "environment": NOW["environment"]}
    for now in (about, NOW):
        assert differences(json.loads(json.dumps(now)), now) == []


def test_a_tuple_is_the_list_that_a_file_has_of_it():
    now = {"environment": {"machine": {"compiler_options": (("a", "b"),)}}}
    assert differences(json.loads(json.dumps(now)), now) == []
    assert differences({"environment": {"machine": {"compiler_options": []}}}, now) != []


def test_each_kind_has_its_line():
    before = {
        **{"framework": "torch", "git_commit": COMMITS[0], "python": "3.11.2", "platform": "Linux-5"},
        "versions": {"jax": "0.10.2", "numpy": "2.0", "torch": "2.9"},
        "environment": {"device": "cpu", "backend": "cpu", "x64": False, "tf32": True, "machine": {"cores": 4}},
    }
    assert differences(before, NOW) == [
        "framework  torch -> jax",
        "code       commit 0123456789ab -> fedcba987654-dirty",
        "python     3.11.2 -> 3.12.1",
        "platform   Linux-5 -> Linux-6",
        "versions   jax 0.10.2 -> 0.11.0, optax absent -> 0.2.6, torch 2.9 -> absent",
        "device     cpu -> NVIDIA H200, backend cpu -> gpu, machine.cores 4 -> 2",
    ]


def test_a_checkout_that_is_none_differs():
    assert differences(NOW | {"git_commit": None}, NOW) == ["code       commit none -> fedcba987654-dirty"]
    assert differences(NOW | {"git_commit": COMMITS[1]}, NOW) == [
        "code       commit fedcba987654 -> fedcba987654-dirty"
    ]


deep: list = []
for _ in range(5000):
    deep = [deep]
ODD = [None, 3, 1e999, "", "\x1b[2J\n" * 100, [], [1, [2]], deep, {}, {"jax": []}, {"device": deep, "x64": "\u202e"}]


@pytest.mark.parametrize("name", list(NOW))
@pytest.mark.parametrize("odd", range(len(ODD)))
def test_a_record_may_hold_anything(name, odd):
    lines = differences(NOW | {name: ODD[odd]}, NOW)
    assert len(lines) == 1 and lines[0].isprintable() and len(lines[0]) < 1000
    without = {key: value for key, value in NOW.items() if key != name}
    assert len(differences(without, NOW)) == 1


def test_the_fields_that_differ_are_named():
    before = get_preset("tiny")
    now = dataclasses.replace(
        *(before,),
        **{"save_every": 50, "prompts": ("a\n",), "out": "elsewhere", "resume": "elsewhere", "init": "x"},
        muon=dataclasses.replace(before.muon, learning_rate=0.5),
        data=dataclasses.replace(before.data, tokenizer=""),
    )
    (line,) = config_differences(before, now)
    prompts = str(list(before.prompts))
    assert line.isprintable() and line.startswith(f"changed    save_every {before.save_every} -> 50, prompts ")
    assert prompts in line and line.endswith(
        f", muon.learning_rate {before.muon.learning_rate} -> 0.5, data.tokenizer {before.data.tokenizer} -> ''"
    )
    assert config_differences(before, dataclasses.replace(before, out="a", resume="a", init="a")) == []
