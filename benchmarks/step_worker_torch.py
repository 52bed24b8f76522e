"""The torch side of a pair of steps. Started by `benchmarks.pair`."""

import gc
from typing import Any

import torch

from benchmarks.step_worker import serve
from recipe.contract import FLOAT32_PROBE, NOT_THERE, float32_product, openmp_threads


class Torch:
    """`benchmarks.step_worker.Framework` of this process."""

    def __init__(self) -> None:
        torch.set_num_threads(openmp_threads())

    def describe(self) -> dict[str, str]:
        # By type alone: some objects answer to isinstance with a warning, and the compiler's tensors hold nothing.
        tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        device = "cuda" if on_gpu else "cpu"
        settings = {"dtype": torch.float32, "device": device}
        probe = torch.full((256, 256), FLOAT32_PROBE, **settings) @ torch.eye(256, **settings)
        floats = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()}
        return {
            "framework": f"torch {torch.__version__}",
            "backend": "gpu" if on_gpu else "cpu",
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "params": "/".join(sorted(floats)) or NOT_THERE,
            "matmul": float32_product(float(probe[0, 0])),
            "x64": "True",
            "threads": NOT_THERE if on_gpu else str(torch.get_num_threads()),
        }

    def wait(self, result: Any) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def device_peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None

    def reset_device_peak(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    serve(Torch())
