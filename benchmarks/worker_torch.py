"""The torch side of a benchmark: `torch_ref` eager or compiled, transformers' model, or the seed notebook's path.

Started by `benchmarks.throughput`. The mode is torch-eager, torch-compile, torch-compile-max, either of the
first two with -lce behind it, hf or seed.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import job, notebook
from benchmarks.job import WorkContract
from benchmarks.worker import Part, serve
from harness.hf_config import to_hf_config
from recipe.config import RunConfig
from recipe.contract import FLOAT32_PROBE, NOT_THERE, accumulation_of, dropout_of, float32_product, openmp_threads
from recipe.params import param_specs
from torch_ref import attention as reference_attention
from torch_ref import loss as reference_loss
from torch_ref import model as reference_model
from torch_ref import muon as reference_muon
from torch_ref import random
from torch_ref.hybrid import adamw_groups, clip_by_global_norm
from torch_ref.muon import KELLER_JORDAN, orthogonalize, orthogonalize_via_newton_schulz
from torch_ref.train import Trainer, make_schedule
from torch_ref.weights import from_hf


def linear_cross_entropy(
    x_MD: torch.Tensor, head_VD: torch.Tensor, targets_M: torch.Tensor, weights_M: None = None
) -> torch.Tensor:
    """`torch_ref.loss.cross_entropy` by torch's own in chunks; the loss comes rounded to x's dtype."""
    return F.linear_cross_entropy(x_MD, head_VD.to(x_MD.dtype), targets_M, options=torch.nn.LinearCrossEntropyOptions())


class TorchSide:
    """`torch_ref.train.Trainer` behind the face of `benchmarks.worker.Side`."""

    def __init__(self, config: RunConfig, mode: str, weights: dict[str, np.ndarray]) -> None:
        self.config, self.mode = config, mode
        self.trainer = Trainer(config, weights)
        self.model, self.device = self.trainer.state.model, self.trainer.device
        self.environment = self.trainer.environment
        self.fused = config.precision.attention == "fused" and not config.model.dropout
        self.hidden_dtype = getattr(torch, config.precision.compute)
        self.cross_entropy = reference_loss.cross_entropy
        if mode.endswith(job.ROUNDS_THE_LOSS):
            # This process runs no other mode, so the model may be given torch's function for its own.
            self.cross_entropy = reference_model.cross_entropy = linear_cross_entropy
        self.model.loss = self.compiled(self.model.loss)
        if mode.startswith("torch-compile"):
            # This process runs no other mode, so Muon may be given the compiled function for its own; the notebook
            # compiles its Newton-Schulz too. One program a shape, as JAX has.
            reference_muon.orthogonalize_via_newton_schulz = torch.compile(
                orthogonalize_via_newton_schulz, dynamic=False
            )

    def compiled(self, function: Callable) -> Callable:
        """The function as this mode runs it."""
        if not self.mode.startswith("torch-compile"):
            return function
        # None is torch.compile's "default" mode.
        return torch.compile(function, mode="max-autotune" if self.mode == "torch-compile-max" else None)

    def describe(self) -> dict:
        config, precision = self.config, self.config.precision
        product = torch.full((256, 256), FLOAT32_PROBE, device=self.device) @ torch.eye(256, device=self.device)
        on_gpu = self.device == "cuda"
        narrow = precision.compute == "bfloat16" and torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        contract = WorkContract(
            side=self.mode,
            framework=f"torch {torch.__version__}",
            backend="gpu" if on_gpu else "cpu",
            device=torch.cuda.get_device_name() if on_gpu else "cpu",
            params="/".join(sorted({str(p.dtype).removeprefix("torch.") for p in self.model.parameters()})),
            compute=precision.compute,
            newton_schulz=precision.newton_schulz,
            matmul=float32_product(float(product[0, 0])),
            x64="True",
            accumulation="bfloat16 allowed" if on_gpu and narrow else accumulation_of(precision.compute),
            attention="SDPA" if self.fused else f"blocks of {reference_attention.QUERY_BLOCK} queries",
            dropout=dropout_of(config.model.dropout),
            threads=NOT_THERE if on_gpu else str(torch.get_num_threads()),
            loss=f"torch's, in chunks, returned in {precision.compute}"
            if self.cross_entropy is linear_cross_entropy
            else f"all logits, stored in {precision.compute}",
        )
        return {"contract": contract, "environment": self.environment}

    def weights(self) -> dict[str, np.ndarray]:
        return {name: p.detach().cpu().numpy().copy() for name, p in self.model.named_parameters()}

    def received(self, tokens: np.ndarray) -> np.ndarray:
        return self.tensor(tokens).cpu().numpy().astype(np.int32)

    def tensor(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(tokens, np.int64), device=self.device)

    def update(self, inputs_ABT: np.ndarray, targets_ABT: np.ndarray) -> dict:
        self.mark_step()
        return self.trainer.step(inputs_ABT, targets_ABT)

    def mark_step(self) -> None:
        """Tell CUDA graphs that the outputs of the last call are done with."""
        if self.mode == "torch-compile-max":
            torch.compiler.cudagraph_mark_step_begin()

    def synchronize(self, metrics: dict) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def square_product(self, size: int):
        x, y = (self.normal(seed, size, size).to(getattr(torch, self.config.precision.compute)) for seed in range(2))
        return self.repeat(lambda: x @ y)

    def normal(self, seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def repeat(self, *calls: Callable) -> Callable[[int], None]:
        """A function that makes these calls so many times and waits."""

        def run(count: int) -> None:
            for _ in range(count):
                for call in calls:
                    self.mark_step()
                    call()
            self.synchronize({})

        return run

    def parts(self) -> dict[str, Part]:
        config, shape = self.config, self.config.model
        A, B, T = config.accumulation, config.batch_size, config.sequence_length

        def heads(seed: int, count: int) -> torch.Tensor:
            dtype = getattr(torch, config.precision.compute)
            return self.normal(seed, B, T, count, shape.head_dim).to(dtype).requires_grad_()

        def forward_and_backward(function: Callable, *inputs: torch.Tensor, out_grad: torch.Tensor | None = None):
            with self.autocast():
                out = function(*inputs)
            torch.autograd.grad(out, inputs, out_grad if out_grad is None else out_grad.to(out.dtype))

        x_MD = self.normal(0, B * T, shape.hidden_size).to(self.hidden_dtype).requires_grad_()
        targets_M = torch.arange(B * T, device=self.device) % shape.vocab_size
        head_VD = self.normal(1, shape.vocab_size, shape.hidden_size).requires_grad_()
        loss = self.compiled(functools.partial(self.cross_entropy, targets_M=targets_M))

        q_BTNH, out_grad = (heads(seed, shape.num_attention_heads) for seed in (2, 3))
        k_BSKH, v_BSKH = (heads(seed, shape.num_key_value_heads) for seed in (4, 5))
        windows = [shape.window_of_layer(layer) for layer in range(shape.num_hidden_layers)]
        attend = {window: self.compiled(functools.partial(self.attend, window=window)) for window in windows}
        out_grad = out_grad.detach()
        layers = [
            functools.partial(forward_and_backward, attend[window], q_BTNH, k_BSKH, v_BSKH, out_grad=out_grad)
            for window in windows
        ]
        parts = {
            "optimizer": (1, self.repeat(self.optimize)),
            "cross_entropy": (A, self.repeat(functools.partial(forward_and_backward, loss, x_MD, head_VD))),
            "attention": (A, self.repeat(*layers)),
        }
        specs = param_specs(shape)
        matrices = [p.grad for name, p in self.model.named_parameters() if specs[name].role == "matrix"]
        orthogonalize = self.orthogonalize()
        if orthogonalize is not None:
            parts["newton_schulz"] = (1, self.repeat(torch.no_grad()(lambda: orthogonalize(matrices))))
        return parts

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def attend(self, q_BTNH, k_BSKH, v_BSKH, *, window: int | None) -> torch.Tensor:
        if self.fused:
            return reference_attention.fused_attention(q_BTNH, k_BSKH, v_BSKH, window=window)
        rate = self.config.model.dropout
        key = random.key(self.config.seed) if rate else None
        return reference_attention.attention(q_BTNH, k_BSKH, v_BSKH, window=window, rate=rate, key=key)

    def orthogonalize(self) -> Callable | None:
        """A function of a list of matrices; None where it cannot be told from the optimizer."""
        muon = self.config.muon
        dtype = getattr(torch, self.config.precision.newton_schulz)
        coefficients = KELLER_JORDAN[:1] * muon.ns_steps
        return functools.partial(orthogonalize, coefficients=coefficients, eps=muon.eps, dtype=dtype)

    def optimize(self) -> None:
        """Clip and both optimizers, on the gradients of the last update."""
        clip_by_global_norm([parameter.grad for parameter in self.model.parameters()], self.config.clip_norm)
        self.trainer.state.optimizer.step(1.0)

    def device_peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def reset_device_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()


class AutocastSide(TorchSide):
    """Plain torch, as in most training scripts: bfloat16 by autocast, all logits held, a loss and two optimizers."""

    def __init__(self, config: RunConfig, mode: str, weights: dict[str, np.ndarray]) -> None:
        self.config, self.mode = config, mode
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cuda.matmul.allow_tf32 = config.precision.matmul == "default"
        device_name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        self.environment = {"backend": self.device, "device": device_name, "torch": torch.__version__}
        # Under autocast the residual stream and the final norm stay in float32.
        self.fused, self.hidden_dtype = config.precision.attention == "fused", torch.float32
        self.model = self.make_model(weights)
        specs, adamw = param_specs(config.model), config.adamw
        parameters = dict(self.model.named_parameters())
        betas = adamw.beta1, adamw.beta2
        self.optimizers = [
            self.make_muon([parameter for name, parameter in parameters.items() if specs[name].role == "matrix"]),
            torch.optim.AdamW(
                adamw_groups(parameters, specs, adamw), lr=adamw.learning_rate, betas=betas, eps=adamw.eps
            ),
        ]
        self.peaks = (config.muon.learning_rate, adamw.learning_rate)
        self.schedule, self.step = make_schedule(config), 0

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.config.precision.compute == "bfloat16")

    def update(self, inputs_ABT: np.ndarray, targets_ABT: np.ndarray) -> dict:
        self.model.zero_grad(set_to_none=True)
        total, A = 0.0, len(inputs_ABT)
        for inputs_BT, targets_BT in zip(inputs_ABT, targets_ABT, strict=True):
            with self.autocast():
                logits_BTV = self.logits(self.tensor(inputs_BT))
            loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), self.tensor(targets_BT).flatten())
            (loss / A).backward()
            total = total + loss.detach() / A
        norm = self.optimize()
        return {"loss": total, "grad_norm": norm, "skipped": 0}

    def optimize(self) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        factor = self.schedule(self.step)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
        self.step += 1
        return norm

    def cross_entropy(self, x_MD: torch.Tensor, head_VD: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x_MD, head_VD).float(), targets_M)


class HuggingFaceSide(AutocastSide):
    """transformers' Qwen3 with torch.optim.Muon and AdamW: what there is without this project."""

    def make_model(self, weights: dict[str, np.ndarray]) -> torch.nn.Module:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = self.config.model
        hf_config = Qwen3Config(**to_hf_config(config), attn_implementation="sdpa" if self.fused else "eager")
        model = Qwen3ForCausalLM(hf_config).to(self.device).train()
        missing, unexpected = model.load_state_dict(
            {name: torch.tensor(weight) for name, weight in weights.items()}, strict=False
        )
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        if set(missing) - tied or unexpected:
            raise RuntimeError(f"transformers' names differ: missing {missing}, unexpected {unexpected}")
        return model

    def make_muon(self, matrices: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        muon = self.config.muon
        return torch.optim.Muon(
            matrices,
            lr=muon.learning_rate,
            momentum=muon.beta,
            nesterov=muon.nesterov,
            ns_steps=muon.ns_steps,
            eps=muon.eps,
            weight_decay=muon.weight_decay,
            adjust_lr_fn="original",
        )

    def describe(self) -> dict:
        description = super().describe()
        # torch.optim.Muon iterates in bfloat16 whatever the parameters are.
        description["contract"] = dataclasses.replace(
            description["contract"],
            newton_schulz="bfloat16",
            attention="SDPA" if self.fused else "all T x T scores",
            loss="all logits, transformers' own",
        )
        return description

    def logits(self, inputs_BT: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=inputs_BT, use_cache=False).logits

    def attend(self, q_BTNH, k_BSKH, v_BSKH, *, window: int | None) -> torch.Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

        heads = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
        module, T = self.model.model.layers[0].self_attn, q_BTNH.shape[1]
        mask = None
        if window is not None or not self.fused:
            distance = torch.arange(T, device=self.device)[:, None] - torch.arange(T, device=self.device)
            seen = (distance >= 0) & (distance < (window or T))
            mask = torch.zeros(T, T, device=self.device).masked_fill(~seen, float("-inf"))[None, None]
        forward = sdpa_attention_forward if self.fused else eager_attention_forward
        return forward(module, *heads, mask, scaling=module.scaling)[0]

    def orthogonalize(self) -> None:
        return None


class SeedSide(AutocastSide):
    """The seed notebook's path through `torch_ref`'s model; see `benchmarks.notebook`."""

    def make_model(self, weights: dict[str, np.ndarray]) -> torch.nn.Module:
        config = self.config
        # This process runs no other mode, so the model may be given the notebook's attention for its own.
        reference_model.fused_attention = lambda *qkv, window, **_: self.attend(*qkv[:3], window=window)
        precision = dataclasses.replace(config.precision, compute="float32", attention="fused")
        return from_hf(weights, config.model, precision, self.device)

    def make_muon(self, matrices: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        muon = self.config.muon
        dtype = getattr(torch, self.config.precision.newton_schulz)
        one = functools.partial(notebook.newton_schulz, steps=muon.ns_steps, eps=muon.eps, dtype=dtype)
        return notebook.Muon(
            matrices,
            lr=muon.learning_rate,
            beta=muon.beta,
            nesterov=muon.nesterov,
            orthogonalize=torch.compile(one),
        )

    def describe(self) -> dict:
        description = super().describe()
        attention = "SDPA, K/V heads repeated" if self.fused else "all T x T scores, K/V heads repeated"
        contract = dataclasses.replace(description["contract"], attention=attention, loss="all logits, float32")
        description["contract"] = contract
        return description

    def logits(self, inputs_BT: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_BT)

    def attend(self, q_BTNH, k_BSKH, v_BSKH, *, window: int | None) -> torch.Tensor:
        return notebook.attention(q_BTNH, k_BSKH, v_BSKH, explicit=not self.fused)

    def orthogonalize(self) -> Callable:
        one = self.optimizers[0].orthogonalize
        return lambda matrices: [one(matrix) for matrix in matrices]


SIDES = {"hf": HuggingFaceSide, "seed": SeedSide}


def make_side(config: RunConfig, mode: str, weights: dict[str, np.ndarray]) -> TorchSide:
    """The side of this mode, on the threads that `openmp_threads` says."""
    torch.set_num_threads(openmp_threads())
    return SIDES.get(mode, TorchSide)(config, mode, weights)


if __name__ == "__main__":
    serve(make_side)
