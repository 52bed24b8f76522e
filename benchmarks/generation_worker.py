"""One way to generate behind one face, in a process of its own. Started by `benchmarks.generation`."""

import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np

from benchmarks.job import fingerprint
from harness.hf_config import to_hf_config
from recipe.config import RunConfig, from_dict
from recipe.contract import openmp_threads, xla_threads
from recipe.params import init_params
from recipe.sampling import SamplingOptions

Prompts = list[list[int]]
Steps = list[tuple[float, list[int]]]
"""For each step the clock when its tokens could be read, and the token of every row."""
Generate = Callable[[Prompts, int], Steps]
"""`generate(prompts, new_tokens)`, greedy."""


def ours(package: str, config: RunConfig, weights: dict[str, np.ndarray]) -> Generate:
    """`jax_impl` or `torch_ref` with its cache."""
    if package == "jax_impl":
        from jax_impl.generate import make_generator
    else:
        from torch_ref.generate import make_generator
    generator = make_generator(config.model, config.precision, weights)

    def generate(prompts: Prompts, new_tokens: int) -> Steps:
        steps: Steps = []
        for row, token in generator.stream(prompts, SamplingOptions(max_new_tokens=new_tokens, temperature=0.0)):
            if row == 0:
                steps.append((time.perf_counter(), []))
            steps[-1][1].append(token)
        return steps

    return generate


def recomputed(config: RunConfig, weights: dict[str, np.ndarray]) -> Generate:
    """The seed notebook's loop on `torch_ref`'s model: the whole sequence again for every token."""
    import torch

    from torch_ref.generate import held_model

    model = held_model(weights, config.model, config.precision, "cuda" if torch.cuda.is_available() else "cpu")

    @torch.no_grad()
    def generate(prompts: Prompts, new_tokens: int) -> Steps:
        steps, tokens_BT = [], torch.tensor(prompts, device=model.head_VD.device)
        for _ in range(new_tokens):
            last_BD = model.model(tokens_BT)[:, -1]
            token_B = torch.nn.functional.linear(last_BD, model.head_VD).argmax(-1)
            tokens_BT = torch.cat([tokens_BT, token_B[:, None]], dim=1)
            read = token_B.tolist()
            steps.append((time.perf_counter(), read))
        return steps

    return generate


def transformers_own(config: RunConfig, weights: dict[str, np.ndarray], *, static: bool) -> Generate:
    """transformers' `generate` with its growing cache, or with its static cache and a compiled forward pass."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**to_hf_config(config.model), attn_implementation="sdpa")).eval()
    state = {name: torch.tensor(weight) for name, weight in weights.items()}
    model.load_state_dict(state, strict=not config.model.tie_word_embeddings)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, config.precision.compute))
    if static:
        model.forward = torch.compile(model.forward)

    class Streamer:
        """transformers hands it the prompts, then every step's tokens."""

        def __init__(self) -> None:
            self.arrived: Steps = []

        def put(self, tokens) -> None:
            read = tokens.flatten().tolist()
            self.arrived.append((time.perf_counter(), read))

        def end(self) -> None:
            pass

    def generate(prompts: Prompts, new_tokens: int) -> Steps:
        tokens_BT, streamer = torch.tensor(prompts, device=model.device), Streamer()
        model.generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            do_sample=False,
            max_new_tokens=new_tokens,
            streamer=streamer,
            cache_implementation="static" if static else None,
        )
        return streamer.arrived[1:]

    return generate


MODES: dict[str, Callable[[RunConfig, dict[str, np.ndarray]], Generate]] = {
    "jax": lambda config, weights: ours("jax_impl", config, weights),
    "torch": lambda config, weights: ours("torch_ref", config, weights),
    "torch-recompute": recomputed,
    "hf": lambda config, weights: transformers_own(config, weights, static=False),
    "hf-static": lambda config, weights: transformers_own(config, weights, static=True),
}
"""Mode -> its `generate`, built on a run's model and precision and on weights."""


def environment(mode: str) -> dict:
    """Backend, device and threads of this process, after its framework was loaded."""
    if mode == "jax":
        import jax

        backend, device = jax.default_backend(), jax.devices()[0].device_kind
        threads = xla_threads()
    else:
        import torch

        backend = "gpu" if torch.cuda.is_available() else "cpu"
        device = torch.cuda.get_device_name() if backend == "gpu" else "cpu"
        threads = torch.get_num_threads()
    return {"backend": backend, "device": device, "threads": threads if backend == "cpu" else None}


def run(generate: Generate, prompts: Prompts, new_tokens: int) -> dict:
    """Seconds of one call, until its first tokens and until its last, and the tokens of every row."""
    cpu, start = time.process_time(), time.perf_counter()
    steps = generate(prompts, new_tokens)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    rows = [list(row) for row in zip(*(tokens for _, tokens in steps), strict=True)]
    return {"seconds": seconds, "cpu_seconds": cpu, "first_seconds": steps[0][0] - start, "rows": rows}


def main() -> None:
    """Read the job, then commands, one JSON line each; answer each with one line. Other prints go to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(answer: dict) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    job = json.loads(sys.stdin.readline())
    config, mode = from_dict(job["config"]), job["mode"]
    if mode != "jax":
        import torch

        torch.set_num_threads(openmp_threads())
    weights = init_params(config.model, config.seed)
    generate = MODES[mode](config, weights)
    reply({"environment": environment(mode), "weights": fingerprint(weights)})
    del weights
    prompts: Prompts = []
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "prompts":
            prompts = command["prompts"]
            reply({"rows": len(prompts)})
        else:
            reply(run(generate, prompts, job["new_tokens"]))


if __name__ == "__main__":
    main()
