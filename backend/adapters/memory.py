"""Ways to fit a model on a small device, as an entry's ``memory`` and ``compile`` ask for them.

Each raises ``ModelUnavailable`` with the reason where the device or the model cannot do it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backend.errors import ModelUnavailable

if TYPE_CHECKING:
    import torch


def quantize(modules: list[torch.nn.Module], memory: Mapping[str, Any], device: str) -> None:
    """Keep the weights of linear layers in 8 bits; they are computed with in the model's dtype."""
    import torch

    if "quantize" not in memory:
        return
    wanted = memory["quantize"]
    if device == "mps":
        raise ModelUnavailable(f"memory.quantize is {wanted}, which mps cannot do.")
    if wanted == "float8" and device.startswith("cuda"):
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            raise ModelUnavailable(
                "memory.quantize is float8, which needs compute capability 8.9; "
                f"{device} has {capability[0]}.{capability[1]}. Use int8."
            )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[wanted]
    for module in modules:
        quantize_(module, config())


def dtype_name(dtype: torch.dtype, memory: Mapping[str, Any]) -> str:
    """What a receipt says: ``bfloat16``, or ``bfloat16 with int8 weights``."""
    name = str(dtype).removeprefix("torch.")
    return f"{name} with {memory['quantize']} weights" if "quantize" in memory else name


def offload(pipeline: Any, way: str, device: str) -> None:
    """Keep what does not compute just now in main memory."""
    if not device.startswith("cuda"):
        raise ModelUnavailable(f"memory.offload needs CUDA, and this model is on {device}.")
    enable = {
        "model": pipeline.enable_model_cpu_offload,
        "sequential": pipeline.enable_sequential_cpu_offload,
    }[way]
    enable(device=device)


def fit(pipeline: Any, memory: Mapping[str, Any]) -> None:
    """Let a pipeline decode pictures in tiles, and attend in slices."""
    vae = pipeline.components.get("vae")
    for name in ("vae_tiling", "vae_slicing"):
        if not memory.get(name):
            continue
        enable = getattr(vae, name.replace("vae", "enable"), None)
        if enable is None:
            raise ModelUnavailable(f"memory.{name} is not something this model can do.")
        enable()
    if memory.get("attention_slicing"):
        parts = pipeline.components.values()
        if not any(hasattr(part, "set_attention_slice") for part in parts):
            raise ModelUnavailable("memory.attention_slicing is not something this model can do.")
        pipeline.enable_attention_slicing()


def compile_module(module: torch.nn.Module, device: str) -> None:
    """Have a module compiled by its first run, once it is sure that this machine can compile."""
    import torch

    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except Exception as error:
        raise ModelUnavailable(
            f"compile is true, and nothing can be compiled for {device} here: "
            f"{type(error).__name__}. The log has the rest."
        ) from error
    module.compile()


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
