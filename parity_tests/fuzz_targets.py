"""The readers of what others write, each with small valid inputs and somebody else's reading of the same files.

What is not a file by nature (a prompt, a command line, token ids) is put into one, so that all are mutated alike.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors
import tokenizers
import torch
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from harness.commands.generate import GenerateCommand, generate_text
from harness.commands.train import parse_run_config
from harness.folders import load_config, load_folder, save_folder, write_json
from harness.hf_config import to_hf_config
from harness.plot import plot_runs
from harness.runlog import read_metrics
from harness.state import SLOTS, TrainingState, load_state, save_state
from harness.tensors import DTYPES, StoredTensors, read_header, write_tensors
from harness.text import TextStream
from parity_tests.fuzz import Facts, NoOpinionError, Target
from recipe.chat import ChatTemplate
from recipe.config import DataConfig, ModelConfig, RunConfig, require, to_dict
from recipe.corpus import load_documents
from recipe.data import prepare
from recipe.params import init_params, slot_shapes
from recipe.sampling import Generator
from recipe.tokenizer import Tokenizer, load_tokenizer, train_bpe

MODEL = ModelConfig(
    **{"vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96},
)
TEXT = 3 * (
    "Who goes there? The king's men, 12 of them.\r\n"
    "  Né à Zürich \u2014 \u0e17\u0e35\u0e48 👩\u200d👧 <|endoftext|> end\u2028\n"
)
SAMPLES = ["Who goes there?", " the\n\nend ", TEXT[:150], "<|endoftext|>a", "12345 e\u0301 \ufffd", ""]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Who goes <there>? "},
    {"role": "assistant", "content": "A friend."},
    {"role": "user", "content": "Name him.\r\n"},
]
TEMPLATES = [
    """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    """{{ bos_token }}{%- set ns = namespace(n=0) %}
{% for m in messages %}
  {%- if m['role'] not in ['user', 'system', 'assistant'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}
  {%- set ns.n = ns.n + 1 %}[{{ ns.n }}] {{ m.content | trim }}{{ eos_token }}{% if loop.last %}{% break %}{% endif %}
{% endfor %}{{ {'é': '<'} | tojson }}""",
    """{%- if tools %}{{ tools | tojson }}{%- endif %}{{ strftime_now('%d %b') }}
{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}
{% endfor %}""",
]


def write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="")


def changed(file: Path, **changes: Any) -> None:
    """Fields of a JSON file set."""
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | changes)


def bytes_of(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.name, array.shape, array.tobytes()


# config.json


def config_seeds(folder: Path) -> Iterator[None]:
    window = dataclasses.replace(MODEL, sliding_window=7, max_window_layers=1)
    for model in (MODEL, window, dataclasses.replace(MODEL, qk_norm=False, tie_word_embeddings=False)):
        write_json(folder / "config.json", to_hf_config(model, 0))
        yield
    changed(folder / "config.json", model_type="qwen3", architectures=["Qwen3ForCausalLM"], rope_scaling=None)
    yield
    small = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    transformers.Qwen3Config(**small).save_pretrained(folder)
    yield


DECIDES_NOTHING = (
    *("attention_dropout", "initializer_range", "use_cache", "dtype", "torch_dtype", "architectures"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"),
)
"""Fields of config.json on which no logit depends."""


def config_ours(folder: Path) -> Facts:
    config = load_config(folder)
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name in ("dropout", "initializer_range", "sliding_window", "max_window_layers", "qk_norm"):
        del shared[name]
    layers = range(min(config.num_hidden_layers, 64))
    return shared | {
        "family": "qwen3" if config.qk_norm else "llama",
        "windows": [config.window_of_layer(layer) for layer in layers],
        **{"rope_type": "default", "activation": "silu", "causal": True, "mlp_bias": False},
    }


def their_model(folder: Path, layers: int) -> Any:
    """transformers' configuration of a folder, of which it could build the model."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if 0 < layers <= 4:
        with torch.device("meta"):
            transformers.AutoModelForCausalLM.from_config(config)
    return config


def config_theirs(folder: Path, mine: Facts) -> Facts:
    """transformers' reading; where it stumbles over a field that decides nothing, its reading without those fields."""
    layers = mine.get("num_hidden_layers", 0)
    sizes = [size for name, size in mine.items() if name.endswith(("_size", "_heads", "_dim"))]
    if layers > 1000 or max(sizes, default=0) > 10**8:
        raise NoOpinionError  # their configuration lists its layers; the files' shapes will refuse such sizes
    try:
        config = their_model(folder, layers)
    except Exception:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "less").mkdir()
        less = {name: value for name, value in values.items() if name not in DECIDES_NOTHING}
        (folder / "less/config.json").write_text(json.dumps(less), encoding="utf-8")
        config = their_model(folder / "less", layers)
    bidirectional = getattr(config, "use_bidirectional_attention", False)
    shared = {name: getattr(config, name) for name in mine if hasattr(config, name) and name != "rope_theta"}
    kinds = (getattr(config, "layer_types", None) if config.model_type == "qwen3" else None) or [
        "full_attention"
    ] * layers
    return shared | {
        "family": config.model_type,
        "windows": [config.sliding_window if kind == "sliding_attention" else None for kind in kinds[:64]],
        "rope_theta": config.rope_parameters["rope_theta"],
        "rope_type": config.rope_parameters["rope_type"],
        "activation": "silu" if config.hidden_act == "swish" else config.hidden_act,
        "causal": getattr(config, "is_causal", True) is not False and not bidirectional,
        "mlp_bias": config.model_type == "llama" and bool(config.mlp_bias),
    }


# tokenizer.json, tokenizer_config.json, generation_config.json, a prompt


def tokenizer_seeds(folder: Path) -> Iterator[None]:
    tokenizer = train_bpe([TEXT], 300)
    tokenizer.save(folder)
    yield
    tokenizer.rust.add_special_tokens(["<|im_end|>", "<s>"])
    tokenizer.save(folder)
    changed(folder / "tokenizer_config.json", eos_token={"content": "<|im_end|>", "special": True}, bos_token="<s>")
    yield
    tokenizer.rust.enable_truncation(5)
    tokenizer.rust.enable_padding(length=9)
    tokenizer.save(folder)
    yield
    (folder / "tokenizer_config.json").unlink()
    yield


def tokenizer_ours(folder: Path) -> Facts:
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.encode(text) for text in SAMPLES]
    return {
        "ids": ids,
        "ids of a batch": tokenizer.encode_batch(SAMPLES),
        "text": [tokenizer.decode(each) for each in ids],
        "every id below vocab_size": max(tokenizer.rust.get_vocab().values()) < tokenizer.vocab_size,
        "end": tokenizer.eos_id,
    }


class Library:
    """The tokenizers library alone, which knows nothing of tokenizer_config.json."""

    def __init__(self, file: Path) -> None:
        self.rust, self.eos_token_id = tokenizers.Tokenizer.from_file(str(file)), None
        self.rust.no_truncation()
        self.rust.no_padding()

    def __call__(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.rust.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int]) -> str:
        return self.rust.decode(ids)


class Transformers(Library):
    """transformers' tokenizer of a folder."""

    def __init__(self, folder: Path) -> None:
        self.auto = transformers.AutoTokenizer.from_pretrained(folder)
        self.eos_token_id = self.auto.eos_token_id
        if getattr(self.auto.backend_tokenizer.model, "dropout", None) is not None:
            self.auto.backend_tokenizer.model.dropout = None  # a text has one encoding here, docs/generation.md

    def __call__(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.auto(text, add_special_tokens=add_special_tokens).input_ids

    def decode(self, ids: list[int]) -> str:
        return self.auto.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def their_tokenizer(folder: Path) -> Library | None:
    """transformers', or the library's where it stands alone; None if transformers stumbles where the library does not:
    over a field that decides no token, or a token that is an object without its type."""
    library = Library(folder / "tokenizer.json")
    try:
        return Transformers(folder) if (folder / "tokenizer_config.json").is_file() else library
    except Exception:
        return None


def tokenizer_theirs(folder: Path, mine: Facts) -> Facts:
    tokenizer = their_tokenizer(folder)
    if tokenizer is None:
        return mine
    ids = [tokenizer(text, add_special_tokens=False) for text in SAMPLES]
    return {
        **{"ids": ids, "ids of a batch": ids, "text": [tokenizer.decode(each) for each in ids]},
        "every id below vocab_size": True,
        "end": mine.get("end") if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
    }


def generate_seeds(folder: Path) -> Iterator[None]:
    save_folder(folder / "model", MODEL, init_params(MODEL, 0), train_bpe([TEXT], 300))
    write_json(folder / "prompt.json", {"prompt": TEXT[:40]})
    yield
    write_json(folder / "model/generation_config.json", {"eos_token_id": [0, 5], "bos_token_id": 3, "temperature": 0.6})
    yield
    file = folder / "model/tokenizer.json"
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    post = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    changed(file, post_processor=post)
    yield


def read_prompt(folder: Path) -> str:
    return str(json.loads((folder / "prompt.json").read_text(encoding="utf-8"))["prompt"])


def generate_ours(folder: Path) -> Facts:
    """What a prompt becomes before the model sees it, and what would end its text."""
    try:
        prompt = read_prompt(folder)
    except (ValueError, TypeError, KeyError, RecursionError):
        prompt = "Who"  # the file was ours alone
    caught: Facts = {}

    def start(batch, options):
        tokens = batch.tokens_PT[0, : batch.position_B[0] + 1].tolist()
        caught.update({"prompt": tokens, "stops": sorted(options.stop_ids)})
        return lambda count, done_B: np.full((len(done_B), count), options.stop_ids[0])

    command = GenerateCommand(checkpoint=str(folder / "model"), prompt=(prompt,), max_new_tokens=2)
    generate_text(command, lambda config, precision, weights: Generator(config, start))
    return caught


def generate_theirs(folder: Path, mine: Facts) -> Facts:
    try:
        prompt = read_prompt(folder)
    except (ValueError, TypeError, KeyError, RecursionError):
        prompt = "Who"
    ends = transformers.GenerationConfig.from_pretrained(folder / "model").eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(end) is int for end in ends):
        raise TypeError("eos_token_id is no token")
    ends = [end for end in ends if end >= 0]  # a negative one never comes
    stops = mine.get("stops", [])
    tokenizer = their_tokenizer(folder / "model")
    return {
        "prompt": mine.get("prompt") if tokenizer is None else tokenizer(prompt),
        "stops": stops if set(ends) <= set(stops) else sorted(ends),
    }


# chat templates


def chat_seeds(folder: Path) -> Iterator[None]:
    train_bpe([TEXT], 300).save(folder)
    changed(folder / "tokenizer_config.json", bos_token={"content": "<|endoftext|>", "__type": "AddedToken"})
    for template in TEMPLATES:
        write(folder / "chat_template.jinja", template)
        yield
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATES[1]}]
    for template in (TEMPLATES[0], named):
        changed(folder / "tokenizer_config.json", chat_template=template)
        yield


SPECIAL = tuple(f"{name}_token" for name in "bos eos unk sep pad cls mask".split())


def chat_theirs(folder: Path, mine: Facts) -> Facts:
    """transformers' rendering; where it stumbles over a field that no template sees, that of its function for it."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception:
        values = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        file, template = folder / "chat_template.jinja", values.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}["default"]
        special = {name: values[name] for name in SPECIAL if values.get(name) is not None}
        special = {name: token["content"] if isinstance(token, dict) else token for name, token in special.items()}
        if not all(isinstance(token, str) for token in special.values()):
            raise TypeError("a special token is no text") from None
        template = file.read_text(encoding="utf-8") if file.is_file() else template
        texts, _ = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=True, **special)
        text = texts[0]
    else:
        text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    text.encode()
    return {"text": text}


# safetensors files, weights folders, training states, logs


def tensors_seeds(folder: Path) -> Iterator[None]:
    arrays = {
        "b": np.arange(15.0).reshape(3, 5),
        "a": np.ones((2, 3)),
        "scalar": np.array(2.5),
        "none": np.zeros((0, 4)),
    }
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        (folder / "x.safetensors").unlink(missing_ok=True)
        write_tensors(folder / "x.safetensors", arrays, arrays, dtype)
        yield


def tensors_ours(folder: Path) -> Facts:
    entries = read_header(folder / "x.safetensors")
    require(
        all(entry.dtype in DTYPES for entry in entries.values()), "a dtype is not one of ours"
    )  # as load_folder does
    stored = StoredTensors(entries, "x")
    return {name: (entries[name].dtype, *bytes_of(stored[name])[1:]) for name in entries}


def tensors_theirs(folder: Path, mine: Facts) -> Facts:
    found = safetensors.deserialize((folder / "x.safetensors").read_bytes())
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found}


def folder_seeds(folder: Path) -> Iterator[None]:
    for model in (MODEL, dataclasses.replace(MODEL, tie_word_embeddings=False, qk_norm=False)):
        weights = init_params(model, 0)
        save_folder(folder / "model", model, weights)
        yield
        (folder / "model/model.safetensors").unlink()
        names, weight_map = sorted(weights), {}
        for number, part in enumerate((names[:9], names[9:]), 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            write_tensors(folder / "model" / file, weights, part, "float32")
            weight_map |= dict.fromkeys(part, file)
        write_json(folder / "model/model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        yield


def folder_ours(folder: Path) -> Facts:
    _, weights = load_folder(folder / "model")
    return {f"model.{name.removeprefix('model.')}": bytes_of(weights[name])[1:] for name in weights}


def folder_theirs(folder: Path, mine: Facts) -> Facts:
    index = folder / "model/model.safetensors.index.json"
    files = {"model.safetensors"}
    if not (folder / "model/model.safetensors").is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    found: Facts = {}
    for file in files:
        for name, tensor in safetensors.deserialize((folder / "model" / file).read_bytes()):
            name = f"model.{name.removeprefix('model.')}"
            if name in found:
                raise ValueError(f"{name} stands in two files")
            found[name] = (tuple(tensor["shape"]), bytes(tensor["data"]))
    head, embedding = found.get("model.lm_head.weight"), found.get("model.embed_tokens.weight")
    if "model.lm_head.weight" not in mine and head == embedding:
        found.pop("model.lm_head.weight", None)
    return {name: value for name, value in found.items() if not name.endswith("rotary_emb.inv_freq")}


def write_state(folder: Path, best: float) -> None:
    config = RunConfig(model=MODEL, sequence_length=16, prompts=("a", "b"), out="runs/x")
    slots: dict[str, dict[str, np.ndarray]] = {slot: {} for slot in SLOTS}
    for name, shape in slot_shapes(MODEL).items():
        slot, _, parameter = name.partition(".")
        slots[slot][parameter] = np.full(shape, 0.5, np.float32)
    about = {"framework": "jax", "versions": {"numpy": "2"}}
    state = TrainingState(config, init_params(MODEL, 0), slots, updates=40, skipped=2, best=best, text="abc")
    save_state(folder / "last", state, train_bpe([TEXT], 300), about)


def state_seeds(folder: Path) -> Iterator[None]:
    """With hashes, which refuse nearly every mutation, and as older versions wrote it, so that its values are read."""
    for best, hashed in ((3.25, False), (math.inf, False), (3.25, True)):
        write_state(folder, best)
        if not hashed:
            file = folder / "last/run.json"
            values = json.loads(file.read_text(encoding="utf-8")) | {"format": 1}
            write_json(file, {name: value for name, value in values.items() if name not in ("files", "checksum")})
        yield


def state_ours(folder: Path) -> Facts:
    state = load_state(folder / "last")
    slots = {f"{slot}.{name}": bytes_of(array)[1:] for slot in SLOTS for name, array in state.slots[slot].items()}
    counts = {
        "updates": state.updates,
        "skipped": state.skipped,
        "position": state.position,
        "training_text": state.text,
    }
    best = None if state.best == math.inf else state.best
    return counts | {"best_validation_loss": best, "config": plain(to_dict(state.config)), "slots": slots}


def plain(values: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(values))


def state_theirs(folder: Path, mine: Facts) -> Facts:
    """run.json taken at its word, if counts are whole numbers, the loss is one and no field is unknown."""
    values = json.loads((folder / "last/run.json").read_text(encoding="utf-8"))
    for name in ("updates", "skipped", "position"):
        if type(values[name]) is not int or values[name] < 0:
            raise TypeError(f"{name} is no count")
    best = values["best_validation_loss"]
    if best is not None and not (type(best) in (int, float) and math.isfinite(best)):
        raise TypeError("the loss is no number")
    default = plain(to_dict(RunConfig()))
    config = default | values["config"]
    for part in [name for name, value in default.items() if isinstance(value, dict)]:
        config[part] = default[part] | config[part]
    stored = safetensors.deserialize((folder / "last/optimizer.safetensors").read_bytes())
    names = ("updates", "skipped", "position", "training_text", "best_validation_loss")
    slots = {name: (tuple(tensor["shape"]), bytes(tensor["data"])) for name, tensor in stored}
    return {name: values[name] for name in names} | {"config": config, "slots": slots}


def log_seeds(folder: Path) -> Iterator[None]:
    step = {"loss": 3.5, "lr_factor": 1.0, "grad_norm": 0.5, "tok_s": 9.0, "dt_ms": 2.5}
    records = [{"kind": "baselines", "step": 0, "uniform": 9.0}]
    records += [{"kind": "train", "step": n} | step for n in (10, 20)]
    records += [{"kind": "validation", "step": 20, "loss": None, "accuracy": 0.1, "perplexity": 33.1}]
    write(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    write_json(folder / "run.json", {"framework": "jax", "preset": "tiny"})
    yield
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')  # as a killed run leaves it
    yield


def log_ours(folder: Path) -> Facts:
    return {"records": read_metrics(folder)}


def log_theirs(folder: Path, mine: Facts) -> Facts:
    lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    records = [json.loads(line.decode()) for line in lines]
    if not all(isinstance(record, dict) for record in records):
        raise TypeError("a record is no object")
    return {"records": records}


def plot_seeds(folder: Path) -> Iterator[None]:
    for _ in log_seeds(folder):
        plot_ours(folder)  # matplotlib's first picture asks the system for its fonts
        yield


def plot_ours(folder: Path) -> Facts:
    plot_runs([folder], folder / "loss.png")
    return {}


# corpora, the cache


def jsonl_seeds(folder: Path) -> Iterator[None]:
    (folder / "notes").mkdir()
    rows = [
        {"text": text, "id": n} for n, text in enumerate(["one\u2028two", "", "drei\r\nvier \u0e17", "\ufeff five"])
    ]
    for plain_ascii in (True, False):
        lines = [json.dumps(row, ensure_ascii=plain_ascii) for row in rows]
        write(folder / "notes/a.jsonl", "\n".join([*lines, "", lines[0]]) + ("\n" if plain_ascii else ""))
        yield


def documents(folder: Path) -> Facts:
    return {"texts": load_documents(DataConfig(corpus=str(folder / "notes"))).texts}


def kept(texts: list[Any]) -> Facts:
    """The texts that hold something; raises for what is no Unicode text, or if nothing is left."""
    texts = [text for text in texts if text is not None and text.strip()]
    "".join(texts).encode()
    if not texts:
        raise ValueError("no text")
    return {"texts": texts}


def jsonl_theirs(folder: Path, mine: Facts) -> Facts:
    lines = (folder / "notes/a.jsonl").read_bytes().decode().split("\n")
    lines = [line.removeprefix("\ufeff") for line in lines]  # files put together keep their marks
    texts = [json.loads(line)["text"] for line in lines if line.strip()]
    # Half a surrogate pair, which JSON can say and no text hold, is replaced.
    return kept([None if text is None else re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts])


def text_seeds(folder: Path) -> Iterator[None]:
    (folder / "notes").mkdir()
    write(folder / "notes/a.txt", TEXT)
    yield
    write(folder / "notes/b.md", "\ufeff# Notes\n\n" + TEXT[:60])
    yield


def text_theirs(folder: Path, mine: Facts) -> Facts:
    return kept([file.read_bytes().decode("utf-8-sig") for file in sorted((folder / "notes").iterdir())])


def parquet_seeds(folder: Path) -> Iterator[None]:
    (folder / "notes").mkdir()
    texts = ["one\u2028two", None, "drei\r\nvier \u0e17", "", "x" * 300]
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
    for kind, compression in zip(kinds, ("none", "snappy", "zstd"), strict=True):
        columns = {"text": pyarrow.array(texts, pyarrow.string()).cast(kind), "id": pyarrow.array(range(5))}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "notes/a.parquet", compression=compression)
        yield


def parquet_theirs(folder: Path, mine: Facts) -> Facts:
    return kept(pyarrow.parquet.read_table(folder / "notes/a.parquet", columns=["text"])["text"].to_pylist())


def dataset(folder: Path) -> Facts:
    config = DataConfig(corpus=str(folder / "notes"), bpe_vocab_size=280, cache_dir=str(folder / "cache"))
    found = prepare(config, seed=0, show_progress=False)
    ratio = found.bytes_per_token
    return {
        "training": hashlib.sha256(found.train_tokens.tobytes()).hexdigest(),
        "held out": hashlib.sha256(found.validation_tokens.tobytes()).hexdigest(),
        "tokenizer": hashlib.sha256(found.tokenizer.identity.encode()).hexdigest(),
        "bytes per token": isinstance(ratio, float) and math.isfinite(ratio) and ratio > 0,
    }


def cache_seeds(folder: Path) -> Iterator[None]:
    (folder / "notes").mkdir()
    for name in "abc":
        write(folder / f"notes/{name}.txt", f"{name}\n{TEXT}")
    write_json(folder / "truth", dataset(folder))
    yield


def cache_theirs(folder: Path, mine: Facts) -> Facts:
    """Whatever lies in the cache, the data are those of an empty one."""
    return json.loads((folder / "truth").read_text(encoding="utf-8"))


# command lines, texts that come token by token


def flags_seeds(folder: Path) -> Iterator[None]:
    save_folder(folder / "model", MODEL, init_params(MODEL, 0), train_bpe([TEXT], 300))
    write_state(folder / "run", 3.25)
    for argv in (
        ["--preset", "seed", "--steps", "7", "--model.hidden_size=64", "--muon.beta", "0.9"],
        ["--precision.remat", "--data.max_tokens", "99", "--out", "runs/é", "--prompts", "a", "b\n"],
        ["--init", "model", "--data.corpus", "notes", "--model.sliding-window", "None", "--no-tensorboard"],
        ["--resume", "run", "--log_every", "5"],
    ):
        write_json(folder / "argv.json", argv)
        yield


def read_argv(folder: Path) -> list[str]:
    try:
        words = json.loads((folder / "argv.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        words = ["--steps"]
    return [word if isinstance(word, str) else str(word) for word in (words if isinstance(words, list) else [words])]


def flags_ours(folder: Path) -> Facts:
    argv = read_argv(folder)
    try:
        config = to_dict(parse_run_config(argv, framework="jax", prog="train"))
    except SystemExit as stop:
        require(not stop.code, "exit")
        return {}
    facts = {}
    for flag, _ in pairwise(argv):
        section, _, name = flag.removeprefix("--").replace("-", "_").rpartition(".")
        value = config.get(section) if section else config
        value = value.get(name) if isinstance(value, dict) else None
        if flag.startswith("--") and type(value) in (int, float, str):
            facts[flag] = value
    return facts


def flags_theirs(folder: Path, mine: Facts) -> Facts:
    if not mine:
        raise NoOpinionError  # help, or refused
    argv = read_argv(folder)
    said = {flag: word for flag, word in pairwise(argv) if flag in mine}
    return {flag: type(mine[flag])(said[flag]) for flag in mine}


def stream_seeds(folder: Path) -> Iterator[None]:
    # Some tokens of these texts end inside the next character.
    tokenizer = train_bpe(
        [TEXT, "\u0e44\u0e17\u0e22\u0e01\u0e02" * 20, "?\ufffd " * 30, "\u65e5\u6708\u706b\u6c34" * 20], 320
    )
    tokenizer.save(folder)
    texts = {
        TEXT[:60]: [],
        "\u0e44\u0e17\u0e22\u0e01\u0e02" * 4: [],
        "caf\ufffd 👩\u200d👧": ["y y"],
        TEXT[30:90]: ["ab", "the"],
    }
    for text, stop in texts.items():
        write_json(folder / "ids.json", {"prompt": text[:5], "new": tokenizer.encode(text), "stop": stop})
        yield
    random = np.random.default_rng(0).integers(256, tokenizer.vocab_size, 99).tolist()
    write_json(folder / "ids.json", {"prompt": "a", "new": random, "stop": []})
    yield


def read_ids(folder: Path, tokenizer: Tokenizer) -> tuple[list[int], list[int], list[str]]:
    try:
        values = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
        prompt, new, stop = (list(values[name]) for name in ("prompt", "new", "stop"))
        prompt = tokenizer.encode("".join(map(str, prompt)))
    except (ValueError, TypeError, KeyError, RecursionError, UnicodeError):
        prompt, new, stop = [40], [200, 210], []
    new = [token for token in new if type(token) is int and 0 <= token < tokenizer.vocab_size]
    return prompt, new[:24], [text for text in stop if isinstance(text, str) and text]


def stream_ours(folder: Path) -> Facts:
    """The text if the tokens ended after the first, after the second ..."""
    tokenizer = load_tokenizer(folder)
    prompt, new, stop = read_ids(folder, tokenizer)
    texts = []
    for end in range(1, len(new) + 1):
        stream, text = TextStream(tokenizer, prompt, stop), ""
        for token in new[:end]:
            text += "" if stream.stopped else stream.push(token)
        texts.append((text + stream.flush()).rstrip("\ufffd"))
    return {"texts": texts}


def stream_theirs(folder: Path, mine: Facts) -> Facts:
    """All tokens decoded at once, cut before the first stop string; half a character may be missing at the end."""
    tokenizer = load_tokenizer(folder)
    prompt, new, stop = read_ids(folder, tokenizer)
    before, texts, stopped = len(tokenizer.decode(prompt)), [], False
    for end in range(1, len(new) + 1):
        text = texts[-1] if stopped else tokenizer.decode(prompt + new[:end])[before:]
        cuts = [text.index(string) for string in stop if string in text]
        if cuts and not stopped:
            text, stopped = text[: min(cuts)], True
        texts.append(text.rstrip("\ufffd"))
    return {"texts": texts}


TARGETS = {
    target.name: target
    for target in [
        Target("config", config_seeds, ("config.json",), config_ours, config_theirs),
        Target("tokenizer", tokenizer_seeds, ("tokenizer*.json",), tokenizer_ours, tokenizer_theirs),
        Target(
            "generate",
            generate_seeds,
            ("prompt.json", "model/generation_config.json", "model/tok*"),
            generate_ours,
            generate_theirs,
            0.5,
        ),
        Target(
            *("chat", chat_seeds, ("chat_template.jinja", "tokenizer_config.json")),
            lambda folder: {"text": ChatTemplate(folder).render(MESSAGES)},
            chat_theirs,
            0.3,
        ),
        Target("tensors", tensors_seeds, ("x.safetensors",), tensors_ours, tensors_theirs),
        Target(
            "folder",
            folder_seeds,
            ("model/config.json", "model/*.index.json", "model/*.safetensors"),
            folder_ours,
            folder_theirs,
        ),
        Target("state", state_seeds, ("last/run.json", "last/optimizer.safetensors"), state_ours, state_theirs),
        Target("log", log_seeds, ("metrics.jsonl",), log_ours, log_theirs),
        Target("plot", plot_seeds, ("metrics.jsonl", "run.json"), plot_ours, lambda folder, mine: {}, 0.03),
        Target("jsonl", jsonl_seeds, ("notes/*",), documents, jsonl_theirs),
        Target("text", text_seeds, ("notes/*",), documents, text_theirs),
        Target("parquet", parquet_seeds, ("notes/*",), documents, parquet_theirs),
        Target("cache", cache_seeds, ("cache/*/*",), dataset, cache_theirs, 0.5),
        Target("flags", flags_seeds, ("argv.json",), flags_ours, flags_theirs, 0.1),
        Target("stream", stream_seeds, ("ids.json",), stream_ours, stream_theirs),
    ]
}
