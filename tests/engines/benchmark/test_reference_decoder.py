"""The reference implementation that the serving runtime is compared with."""

import torch

from engines.benchmark.decoders import ReferenceDecoder, random_inputs
from engines.compile.inputs.random_weights import random_decoder
from engines.pid.sampler import MAX_STEPS
from engines.pid.toy import TOY
from engines.size import Size


def test_the_reference_computes_the_adapter_once_per_step_like_the_published_code():
    size = Size(32, 32)
    network = random_decoder(TOY.config, 0)
    calls: list[object] = []
    network.lq_proj.register_forward_hook(lambda *arguments: calls.append(arguments))
    inputs = random_inputs(TOY.config, size, torch.device("cpu"))
    ReferenceDecoder(network, inputs, size, compiled=False, autocast=False).decode()
    assert len(calls) == MAX_STEPS
