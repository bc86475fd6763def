"""The parts of the check, in the order in which they run."""

from __future__ import annotations

from engines.benchmark.gpu_check import checks, kernels, machine, parity, speed
from engines.benchmark.gpu_check.config import Part

PARTS = (
    Part("machine", "Device", 20, machine.device_properties),
    Part("contract", "Runtime contract, on a toy network", 20, checks.check_contract),
    Part("parity", "Relative errors against the reference vectors", 20, parity.compare_vectors),
    Part("attention", "Attention kernels, bf16", 20, kernels.attention_kernels, only_on_cuda=True),
    Part("bf16", "Decoding in bf16, CUDA graphs, without torch.compile", 75, speed.decode_bf16),
    Part("fp8", "Decoding in FP8, CUDA graphs, without torch.compile", 75, speed.decode_fp8),
    Part("profile", "Slowest kernels of a step", 30, kernels.slowest_kernels),
    Part("published", "Serving runtime and reference, without torch.compile", 40, speed.compare_with_reference),
    Part("tensorrt", "TensorRT", 30, speed.decode_with_engines),
    Part("compiled", "Decoding with torch.compile", 80, speed.decode_compiled, only_on_cuda=True),
    Part("published-compiled", "Reference with torch.compile", 45, speed.decode_reference_compiled, only_on_cuda=True),
)
