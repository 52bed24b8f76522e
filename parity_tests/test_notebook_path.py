"""The benchmarks' mode `seed`, which runs the notebook's code path: slower on purpose, but the same mathematics."""

import numpy as np
import pytest
import torch

import torch_ref.attention
import torch_ref.muon
from benchmarks import notebook
from parity_tests.compare.montecarlo import allowances, amplification
from parity_tests.compare.tolerance import check, check_all
from parity_tests.newton_schulz_error import allowance


@pytest.mark.parametrize("explicit", [False, True], ids=["SDPA", "explicit"])
def test_attention_over_repeated_heads(explicit):
    B, T, N, K, H = 2, 7, 6, 2, 4
    generator = np.random.default_rng(3)
    shapes = {"q": (B, T, N, H), "k": (B, T, K, H), "v": (B, T, K, H), "out_grad": (B, T, N, H)}
    arrays = {name: torch.tensor(generator.standard_normal(shape)) for name, shape in shapes.items()}

    def measure(attention, **options) -> dict[str, np.ndarray]:
        heads = [arrays[name].clone().requires_grad_() for name in "qkv"]
        out = attention(*heads, **options)
        tensors = out, *torch.autograd.grad(out, heads, arrays["out_grad"])
        return {name: x.detach().numpy() for name, x in zip(("out", *"qkv"), tensors, strict=True)}

    truths, kappas = amplification(lambda: measure(torch_ref.attention.attention, window=None))
    values = measure(notebook.attention, explicit=explicit)
    check_all(values, truths, allowances(kappas, "float64").get)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(48, 48), (96, 24), (24, 96)], ids=str)
def test_muon_matrix_by_matrix(shape, nesterov):
    generator = np.random.default_rng(6)
    grads = [generator.standard_normal(shape) for _ in range(3)]
    iteration = dict(steps=5, eps=1e-7, dtype=torch.float64)

    def weights_after(make_optimizer) -> np.ndarray:
        weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = make_optimizer(weight)
        for grad in grads:
            weight.grad = torch.tensor(grad)
            optimizer.step()
        return weight.detach().numpy()

    def theirs(weight):
        def orthogonalize(x):
            return notebook.newton_schulz(x, **iteration)

        return notebook.Muon([weight], lr=0.1, beta=0.95, nesterov=nesterov, orthogonalize=orthogonalize)

    def ours(weight):
        return torch_ref.muon.Muon([weight], lr=0.1, beta=0.95, nesterov=nesterov, ns_dtype=torch.float64)

    # Either side may err by the allowance of one iteration at each of the three updates, which add up in the weight.
    limit = 2 * len(grads) * max(allowance(grad, "float64") for grad in grads)
    check("weight", weights_after(theirs), weights_after(ours), limit)
