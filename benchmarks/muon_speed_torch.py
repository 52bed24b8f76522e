"""The torch rows of `benchmarks.muon_speed`: `torch_ref`'s Muon, torch's own, dion's batched form, the notebook's loop.

dion (https://github.com/microsoft/dion) is written anew from its description, with the coefficients, the scale and the
momentum's factor of all other rows: its form is compared, not its recipe.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import notebook
from benchmarks.muon_speed_worker import BETA, LEARNING_RATE, STEPS, serve
from recipe.contract import NOT_THERE, openmp_threads
from torch_ref.muon import KELLER_JORDAN, Muon
from torch_ref.muon.transforms import fan_ratio

EPS = 1e-7


class Batched(torch.optim.Optimizer):
    """dion's way: the momentum by lists, then the matrices of one shape stacked, three products a step for each stack.

    Its momentum is a sum and its direction g + beta mu: 20 times the average's, which the norm divides out.
    """

    def __init__(self, params, *, lr: float, beta: float, orthogonalize: Callable) -> None:
        super().__init__(params, dict(lr=lr, beta=beta))
        self.orthogonalize = orthogonalize

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix."""
        for group in self.param_groups:
            weights = group["params"]
            gradients = [weight.grad for weight in weights]
            for weight in weights:
                if "mu" not in self.state[weight]:
                    self.state[weight]["mu"] = torch.zeros_like(weight)
            momenta = [self.state[weight]["mu"] for weight in weights]
            torch._foreach_mul_(momenta, group["beta"])
            torch._foreach_add_(momenta, gradients)
            directions = torch._foreach_mul(momenta, group["beta"])
            torch._foreach_add_(directions, gradients)
            alike = collections.defaultdict(list)
            for index, weight in enumerate(weights):
                alike[tuple(weight.shape)].append(index)
            for (fan_out, fan_in), indices in alike.items():
                # Parts in float32, as all other rows add them.
                whole = self.orthogonalize(torch.stack([directions[i] for i in indices])).to(weights[indices[0]].dtype)
                rate = group["lr"] * fan_ratio(fan_in, fan_out)
                torch._foreach_add_([weights[i] for i in indices], list(whole.unbind()), alpha=-rate)


def newton_schulz_of_stack(x_NOI: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """The plain iteration on a stack of matrices: bmm, baddbmm, baddbmm a step."""
    x = x_NOI.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPS)
    for a, b, c in KELLER_JORDAN:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def _notebook(params: list, dtype: torch.dtype) -> torch.optim.Optimizer:
    one = functools.partial(notebook.newton_schulz, steps=STEPS, eps=EPS, dtype=dtype)
    return notebook.Muon(params, lr=LEARNING_RATE, beta=BETA, nesterov=True, orthogonalize=torch.compile(one))


def _torchs_own(params: list, dtype: torch.dtype) -> torch.optim.Optimizer:
    return torch.optim.Muon(params, lr=LEARNING_RATE, momentum=BETA, weight_decay=0.0)


def _batched(params: list, dtype: torch.dtype, compiled: bool) -> torch.optim.Optimizer:
    one = functools.partial(newton_schulz_of_stack, dtype=dtype)
    one = torch.compile(one, dynamic=False) if compiled else one
    return Batched(params, lr=LEARNING_RATE, beta=BETA, orthogonalize=one)


Build = Callable[[list, torch.dtype], torch.optim.Optimizer]
ROWS: dict[str, Build] = {
    "torch-ref": lambda params, dtype: Muon(params, LEARNING_RATE, BETA, ns_dtype=dtype),
    "torch-ref-gram": lambda params, dtype: Muon(params, LEARNING_RATE, BETA, ns_dtype=dtype, gram=True),
    "torch": _torchs_own,
    "torch-compile": _torchs_own,
    "dion": functools.partial(_batched, compiled=False),
    "dion-compile": functools.partial(_batched, compiled=True),
    "notebook": _notebook,
}
"""Row -> its optimizer, by parameters and the Newton-Schulz dtype."""


class TorchRows:
    """See `benchmarks.muon_speed_worker.Rows`; matrices lie as torch's do, (fan_out, fan_in)."""

    def __init__(self, gradients: dict[str, np.ndarray], dtype: str) -> None:
        torch.set_num_threads(openmp_threads())
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, dtype)
        self.gradients = {name: torch.tensor(x, device=self.device) for name, x in gradients.items()}
        self.params: dict[str, list[torch.nn.Parameter]] = {}
        self.steps: dict[str, Callable[[], Any]] = {}

    def describe(self) -> dict[str, Any]:
        on_gpu = self.device == "cuda"
        return {
            "framework": f"torch {torch.__version__}",
            "backend": "gpu" if on_gpu else "cpu",
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "threads": NOT_THERE if on_gpu else str(torch.get_num_threads()),
        }

    def received(self) -> dict[str, np.ndarray]:
        return {name: x.cpu().numpy() for name, x in self.gradients.items()}

    def prepare(self, row: str) -> None:
        if row not in self.params:
            self.params[row] = [torch.nn.Parameter(torch.zeros_like(x)) for x in self.gradients.values()]
            step = ROWS[row](self.params[row], self.dtype).step
            self.steps[row] = torch.compile(step) if row == "torch-compile" else step
        for param, gradient in zip(self.params[row], self.gradients.values(), strict=True):
            # The notebook's loop overwrites them.
            param.grad = gradient.clone() if row == "notebook" else gradient
        self._wait()

    def update(self, row: str) -> None:
        self.steps[row]()
        self._wait()

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def weights(self, row: str) -> dict[str, np.ndarray]:
        return {name: x.detach().cpu().numpy() for name, x in zip(self.gradients, self.params[row], strict=True)}

    def square_product(self, size: int, dtype: str) -> Callable[[int], None]:
        x, y = (torch.randn(size, size, device=self.device).to(getattr(torch, dtype)) for _ in range(2))

        def run(count: int) -> None:
            for _ in range(count):
                x @ y
            self._wait()

        return run


if __name__ == "__main__":
    serve(TorchRows)
