"""Products of FP8 matrices on the hardware: torch's, and Transformer Engine's where it is installed."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor

from mcore_spec.config.quantization import Float8Backend
from mcore_spec.errors import UnsupportedError
from mcore_spec.parallel.layout import has_transformer_engine, require_transformer_engine

# What both multiply: sizes of the summed dimension and of the second matrix's rows are multiples of it.
MULTIPLE = 16
# The first GPUs with FP8 (Ada); Hopper is (9, 0).
_FIRST_CAPABILITY = (8, 9)


class Float8Product(Protocol):
    """Multiplies float8_e4m3fn numbers with such or with float8_e5m2 ones, without scales."""

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """[m, k] and [n, k] -> ``left @ right.t()``, float32 [m, n]; k and n are multiples of 16."""
        ...


def float8_product(backend: Float8Backend, device: torch.device) -> Float8Product:
    """The product of a backend on a device; "auto": Transformer Engine's where it is installed and CUDA is used.

    Raises:
        ConfigError: Transformer Engine is asked for and not installed.
        UnsupportedError: a device without FP8.
    """
    is_cuda = device.type == "cuda"
    if is_cuda and torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise UnsupportedError(
            f"fp8_compute = true: {name} has compute capability {capability[0]}.{capability[1]}, FP8 products need 8.9 "
            "or newer; leave it out (the same numbers are emulated)"
        )
    if backend == "transformer_engine":
        require_transformer_engine("fp8_backend = transformer_engine", instead="fp8_backend = torch")
        if not is_cuda:
            raise UnsupportedError(
                f"fp8_backend = transformer_engine needs CUDA, and this run is on {device.type}; choose fp8_backend = "
                "torch"
            )
    if backend == "torch" or not is_cuda or not has_transformer_engine():
        return TorchProduct(device)
    return TransformerEngineProduct(device)


class TorchProduct:
    """``torch._scaled_mm`` with scales of one. Runs on processors too."""

    def __init__(self, device: torch.device) -> None:
        """Allocate the scale."""
        self.one = torch.ones((), dtype=torch.float32, device=device)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Float8Product`."""
        return torch._scaled_mm(
            left.contiguous(), right.contiguous().t(), scale_a=self.one, scale_b=self.one, out_dtype=torch.float32
        )


class TransformerEngineProduct:
    """cuBLAS through Transformer Engine's ``general_gemm``. Not tested: no machine with CUDA was at hand."""

    def __init__(self, device: torch.device) -> None:
        """Look the names up; called where it is installed."""
        import transformer_engine_torch  # type: ignore[import-not-found]
        from transformer_engine.pytorch.cpp_extensions import general_gemm
        from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

        self.gemm: Any = general_gemm
        self.options: dict[str, Any] = {"out_dtype": torch.float32, "layout": "TN", "use_split_accumulator": True}
        # Versions up to 2.9 take cuBLAS's workspace from their caller.
        if "workspace" in inspect.signature(general_gemm).parameters:
            from transformer_engine.pytorch.module.base import get_workspace

            self.options["workspace"] = get_workspace()
        one, largest = (torch.full((1,), value, dtype=torch.float32, device=device) for value in (1.0, 0.0))
        kinds = transformer_engine_torch.DType
        self.wrappers: dict[torch.dtype, Any] = {
            torch.float8_e4m3fn: Float8Quantizer(one, largest, kinds.kFloat8E4M3),
            torch.float8_e5m2: Float8Quantizer(one, largest, kinds.kFloat8E5M2),
        }

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Float8Product`."""
        product: Tensor = self.gemm(self._wrapped(right), self._wrapped(left), **self.options)[0]
        return product

    def _wrapped(self, numbers: Tensor) -> Any:
        data = numbers.contiguous().view(torch.uint8)
        return self.wrappers[numbers.dtype].create_tensor_from_data(data, fake_dtype=torch.float32)
