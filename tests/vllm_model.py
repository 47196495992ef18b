"""Run inside vLLM's 0.33 environment: builds vLLM's own model of a checkpoint for a CUDA card that is not here.

What is real: vLLM's config, quantization config, model class, layers, kernel selection and weight loader, for one rank
of a tensor-parallel group. What is not: the card (its compute capability and memory are told), the process group
(torch's "fake" backend, which moves nothing), and vLLM's compiled kernels, whose import is answered by empty modules
and whose questions of the kind "is this kernel compiled for that card" by the table below (csrc/, the same thresholds).

Reads {"capability": "8.6", "tensor_parallel": 2, "expert_parallel": false, "cases": [{"folder": .., "load": true}]},
prints for each case {"error": ..} or {"methods": {module: [class, method, kernel]}, "bits": {experts: width},
"unloaded": [..]}.
"""

from __future__ import annotations

import contextlib
import json
import sys
import types
from pathlib import Path
from typing import Any

COMPILED = (
    "vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C", "vllm._flashmla_C", "vllm._flashmla_extension_C",
)  # fmt: skip
# csrc/libtorch_stable/quantization/**: the smallest compute capability that each answers yes to
PACKED = ("w2_qweight", "w2_weight_packed", "w2_weight")
SENTINEL = 0x5A  # no test file holds an element of such bytes
# What vLLM makes room for and a checkpoint need not have: scales of the KV cache, GPTQ's biases of experts, and what
# Humming does not read of a symmetric format (humming/schema/gptq.py).
OPTIONAL = (
    ".k_scale", ".v_scale", ".q_scale", ".prob_scale", "_zero_point", ".w13_bias", ".w2_bias", "g_idx", "qzeros",
)  # fmt: skip
# Layers take hold of these when they are made; none is called here.
ACTIVATIONS = (
    "silu_and_mul",
    "mul_and_silu",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "gelu_new",
    "gelu_fast",
    "gelu_quick",
)
ANSWERS = {
    "cutlass_scaled_mm_supports_fp8": 89,
    "cutlass_scaled_mm_supports_block_fp8": 90,
    "cutlass_group_gemm_supported": 90,
    "cutlass_scaled_mm_supports_fp4": 100,
    "mxfp4_experts_quant_supported": 100,
}


def pretend(capability: str, tensor_parallel: int) -> None:
    """Makes this process one of a machine with such cards. Before any other import of vLLM."""
    import torch

    for name in COMPILED:
        sys.modules[name] = types.ModuleType(name)
    library = torch.library.Library("_C", "FRAGMENT")
    for name, lowest in ANSWERS.items():
        library.define(f"{name}(int capability) -> bool")
        library.impl(name, lambda asked, lowest=lowest: asked >= lowest, "CompositeExplicitAutograd")
    sys.modules[__name__].library = library  # type: ignore[attr-defined]  # the answers live as long as it does
    for name in ACTIVATIONS:
        library.define(f"{name}(Tensor! out, Tensor input) -> ()")

    import vllm.platforms
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability

    class Card(cuda.NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*map(int, capability.split(".")))

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return f"a card of compute capability {capability}"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

        @classmethod
        def device_count(cls) -> int:
            return tensor_parallel

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return False

        @classmethod
        def get_device_communicator_cls(cls) -> str:
            return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 82

    vllm.platforms._current_platform = Card()
    import vllm.utils.torch_utils

    vllm.utils.torch_utils.aux_stream = lambda: None  # a second CUDA stream, for shared experts
    import humming.utils.device
    from humming.device import DeviceInfo

    major, minor = map(int, capability.split("."))
    card = types.SimpleNamespace(
        index=0, name="card", is_ppu=False, sm_major=major, sm_minor=minor, sm_version=10 * major + minor, sm_count=82,
        max_smem_size=101376 if minor else 166912, default_smem_size=49152, max_threads_per_block=1024,
        max_threads_per_sm=1536, max_registers_per_sm=65536, l2_cache_size=6 << 20,
    )  # fmt: skip
    humming.utils.device._extension = types.SimpleNamespace(_DeviceInfo=lambda index: card)
    DeviceInfo._instances.clear()


def join(tensor_parallel: int) -> None:
    """Rank 0 of a group of which the other ranks are not there."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized():
        return
    dist.init_process_group(backend="fake", store=FakeStore(), rank=0, world_size=tensor_parallel)
    real = dist.new_group
    dist.new_group = lambda *args, **kwargs: real(*args, **{**kwargs, "backend": "fake"})  # gloo would wait for others
    make = parallel_state.init_model_parallel_group  # the broadcaster would wait for the other ranks as well
    parallel_state.init_model_parallel_group = lambda *args, **kwargs: make(
        *args, **{**kwargs, "use_message_queue_broadcaster": False}
    )
    parallel_state.in_the_same_node_as = lambda *args, **kwargs: [True] * tensor_parallel
    parallel_state.init_distributed_environment(tensor_parallel, 0, "tcp://127.0.0.1:0", 0, backend="fake")
    parallel_state.ensure_model_parallel_initialized(tensor_parallel, 1)
    parallel_state.get_tp_group().device = torch.device("cpu")  # where moe_wna16 unpacks


def build(case: dict[str, Any], tensor_parallel: int, expert_parallel: bool) -> dict[str, Any]:
    import torch
    from safetensors import safe_open
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    folder = Path(case["folder"])
    config = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, enforce_eager=True, max_model_len=64,
        max_num_batched_tokens=64, tensor_parallel_size=tensor_parallel, enable_expert_parallel=expert_parallel,
        distributed_executor_backend="mp" if tensor_parallel > 1 else None, disable_custom_all_reduce=True,
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        join(tensor_parallel)
        torch.set_default_dtype(config.model_config.dtype)
        try:
            with torch.device("cpu" if case.get("load") else "meta"):
                model = initialize_model(config)
        finally:
            torch.set_default_dtype(torch.float32)
        methods = {}
        for name, module in model.named_modules():
            if (method := getattr(module, "quant_method", None)) is not None:
                methods[name] = [type(module).__name__, type(method).__name__, kernel_of(method, module)]
        found: dict[str, Any] = {"methods": methods, "bits": dict(_widths(model))}
        if case.get("load"):
            for parameter in model.parameters():
                _bytes(parameter).fill_(SENTINEL)
            with contextlib.ExitStack() as stack:
                files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
                model.load_weights((name, file.get_tensor(name)) for file in files for name in file.keys())  # noqa: SIM118
            found["unloaded"] = sorted(
                name
                for name, parameter in model.named_parameters()
                if parameter.dim() and bool((_bytes(parameter) == SENTINEL).all(-1).any())
                if not name.endswith(OPTIONAL)
            )
    return found


def _widths(model: Any) -> Any:
    """Of every fused MoE, the bits for each weight of the down projections that room was made for."""
    for name, module in model.named_modules():
        if type(module).__name__ == "RoutedExperts":
            packed = next(p for key, p in module.named_parameters() if key in PACKED)
            sizes = module.moe_config
            weights = packed.shape[0] * sizes.hidden_dim * sizes.intermediate_size_per_partition_unpadded
            yield name, 8 * packed.numel() * packed.element_size() / weights


def _bytes(parameter: Any) -> Any:
    """A view, the bytes of each element last."""
    import torch

    flat = parameter.data.contiguous().reshape(-1)
    assert flat.data_ptr() == parameter.data.data_ptr() or not flat.numel()
    return flat.view(torch.uint8).reshape(flat.numel(), flat.element_size())


def kernel_of(method: Any, module: Any) -> str:
    """The name of the kernel that was chosen: an experts class, a linear kernel, or ""."""
    for holder in (method, getattr(method, "scheme", None), getattr(module, "scheme", None)):
        for key in ("experts_cls", "fp8_linear", "kernel"):
            if (value := getattr(holder, key, None)) is not None:
                return value.__name__ if isinstance(value, type) else type(value).__name__
    return ""


def main() -> None:
    asked = json.load(sys.stdin)
    found = []
    with contextlib.redirect_stdout(sys.stderr):
        pretend(asked["capability"], asked["tensor_parallel"])
        for case in asked["cases"]:
            try:
                found.append(build(case, asked["tensor_parallel"], asked.get("expert_parallel", False)))
            except Exception as error:
                if asked.get("raise"):
                    raise
                found.append({"error": f"{type(error).__name__}: {error}"})
    json.dump(found, sys.stdout, default=str)


if __name__ == "__main__":
    main()
