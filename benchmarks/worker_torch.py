"""The torch side of a benchmark: `torch_ref` eager or compiled, or transformers' model with torch's own optimizers.

Started by `benchmarks.throughput`. The mode is torch-eager, torch-compile, torch-compile-max or hf.
"""

import os

import numpy as np
import torch

from benchmarks.worker import PROBE, serve
from recipe.checkpoint import to_hf_config
from recipe.config import RunConfig
from recipe.params import param_specs
from torch_ref import model as reference_model
from torch_ref.train import Trainer, make_schedule


class TorchSide:
    """`torch_ref.train.Trainer` behind the face of `benchmarks.worker.Side`."""

    def __init__(self, config: RunConfig, mode: str, weights: dict[str, np.ndarray]) -> None:
        self.config, self.mode = config, mode
        self.trainer = Trainer(config, weights)
        self.device, self.environment = self.trainer.device, self.trainer.environment
        if mode.startswith("torch-compile"):
            model = self.trainer.state.model
            # None is torch.compile's "default" mode.
            model.loss = torch.compile(model.loss, mode="max-autotune" if mode == "torch-compile-max" else None)

    def describe(self) -> dict:
        config, precision = self.config, self.config.precision
        fused = precision.attention == "fused" and not config.model.dropout
        product = torch.full((256, 256), PROBE, device=self.device) @ torch.eye(256, device=self.device)
        contract = {
            "backend": "gpu" if self.device == "cuda" else "cpu",
            "threads": None if self.device == "cuda" else torch.get_num_threads(),
            "params_dtype": "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in self.parameters()})),
            "compute_dtype": precision.compute,
            "newton_schulz_dtype": precision.newton_schulz,
            "float32_products": "float32" if float(product[0, 0]) == PROBE else "tf32",
            "dropout": config.model.dropout,
            "matmul": precision.matmul,
            "attention": "SDPA" if fused else f"blocks of {reference_model.QUERY_BLOCK} queries",
            "loss": f"all logits, stored in {precision.compute}",
        }
        return {"contract": contract, "environment": self.environment}

    def parameters(self) -> list[torch.Tensor]:
        return list(self.trainer.state.model.parameters())

    def weights(self) -> dict[str, np.ndarray]:
        return self.trainer.weights()

    def received(self, tokens: np.ndarray) -> np.ndarray:
        return torch.as_tensor(np.asarray(tokens, np.int64), device=self.device).cpu().numpy().astype(np.int32)

    def update(self, inputs_ABT: np.ndarray, targets_ABT: np.ndarray) -> dict:
        if self.mode == "torch-compile-max":
            torch.compiler.cudagraph_mark_step_begin()
        return self.trainer.step(inputs_ABT, targets_ABT)

    def synchronize(self, metrics: dict) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def square_product(self, size: int):
        generator = torch.Generator().manual_seed(self.config.seed)
        dtype = getattr(torch, self.config.precision.compute)
        x, y = (torch.randn(size, size, generator=generator).to(self.device, dtype) for _ in range(2))

        def run(count: int) -> None:
            for _ in range(count):
                x @ y
            self.synchronize({})

        return run

    def device_peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None


class HuggingFaceSide(TorchSide):
    """transformers' Qwen3 with torch.optim.Muon and AdamW, bfloat16 by autocast: what there is without this project."""

    def __init__(self, config: RunConfig, mode: str, weights: dict[str, np.ndarray]) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        self.config, self.mode = config, mode
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cuda.matmul.allow_tf32 = config.precision.matmul == "default"
        device_name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        self.environment = {"backend": self.device, "device": device_name, "torch": torch.__version__}
        attention = "sdpa" if config.precision.attention == "fused" else "eager"
        hf_config = Qwen3Config(**to_hf_config(config.model), attn_implementation=attention)
        self.model = Qwen3ForCausalLM(hf_config).to(self.device).train()
        missing, unexpected = self.model.load_state_dict(
            {name: torch.tensor(weight) for name, weight in weights.items()}, strict=False
        )
        tied = {"lm_head.weight"} if config.model.tie_word_embeddings else set()
        if set(missing) - tied or unexpected:
            raise RuntimeError(f"transformers' names differ: missing {missing}, unexpected {unexpected}")
        specs, muon, adamw = param_specs(config.model), config.muon, config.adamw
        named = dict(self.model.named_parameters())
        roles = {name: specs[name].role for name in named}
        matrices = [p for name, p in named.items() if roles[name] == "matrix"]
        decayed = [p for name, p in named.items() if roles[name] in ("embedding", "head")]
        plain = [p for name, p in named.items() if roles[name] in ("norm", "bias")]
        self.optimizers = [
            torch.optim.Muon(
                matrices,
                lr=muon.learning_rate,
                momentum=muon.beta,
                nesterov=muon.nesterov,
                ns_steps=muon.ns_steps,
                eps=muon.eps,
                weight_decay=muon.weight_decay,
                adjust_lr_fn="original",
            ),
            torch.optim.AdamW(
                [
                    {"params": decayed, "weight_decay": adamw.weight_decay},
                    {"params": plain, "weight_decay": adamw.weight_decay if adamw.decay_norms else 0.0},
                ],
                lr=adamw.learning_rate,
                betas=(adamw.beta1, adamw.beta2),
                eps=adamw.eps,
            ),
        ]
        self.peaks = (muon.learning_rate, adamw.learning_rate)
        self.schedule, self.step = make_schedule(config), 0

    def describe(self) -> dict:
        description = super().describe()
        # torch.optim.Muon iterates in bfloat16 whatever the parameters are.
        description["contract"] |= {"newton_schulz_dtype": "bfloat16", "loss": "all logits, transformers' own"}
        return description

    def parameters(self) -> list[torch.Tensor]:
        return list(self.model.parameters())

    def weights(self) -> dict[str, np.ndarray]:
        return {name: p.detach().cpu().numpy().copy() for name, p in self.model.named_parameters()}

    def update(self, inputs_ABT: np.ndarray, targets_ABT: np.ndarray) -> dict:
        self.model.zero_grad(set_to_none=True)
        total, A = 0.0, len(inputs_ABT)
        half = self.config.precision.compute == "bfloat16"
        for inputs_BT, targets_BT in zip(inputs_ABT, targets_ABT, strict=True):
            inputs, targets = (
                torch.as_tensor(np.asarray(tokens, np.int64), device=self.device) for tokens in (inputs_BT, targets_BT)
            )
            with torch.autocast(self.device, torch.bfloat16, enabled=half):
                logits_BTV = self.model(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets.flatten())
            (loss / A).backward()
            total = total + loss.detach() / A
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        factor = self.schedule(self.step)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
        self.step += 1
        return {"loss": total, "grad_norm": norm, "skipped": 0}


def make_side(config: RunConfig, mode: str, weights: dict[str, np.ndarray]) -> TorchSide:
    """The side of this mode; OpenMP's own variable decides the threads, else the CPUs this process is pinned to."""
    # Set either way: left alone, torch takes MKL's count, which is capped by the cores MKL sees.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    return (HuggingFaceSide if mode == "hf" else TorchSide)(config, mode, weights)


if __name__ == "__main__":
    serve(make_side)
