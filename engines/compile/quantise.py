"""Which layers are computed in FP8 and which are not, with the reason; and what each of them costs in accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from engines.compile import verify_fold
from engines.errors import ConfigError
from engines.pid import FoldedDecoder, PidConfig, fp8
from engines.pid.sampler import MODEL_TIMESTEPS


@dataclass(frozen=True)
class Rule:
    """What becomes of the linear layers whose names match a pattern (`*` also spans dots)."""

    pattern: str
    fp8: bool
    reason: str


# Every linear layer of a folded network matches exactly one of these.
RULES = (
    Rule("patch_blocks.*.attn.qkv_*", True, "behind a norm, so of known range; 30 % of the blocks' linear work"),
    Rule("patch_blocks.*.attn.proj_*", True, "averages of values; the residual stream around it stays in 16 bit"),
    Rule("patch_blocks.*.mlp_*.w[13]", True, "behind a norm; with w2 two thirds of the blocks' linear work"),
    Rule("patch_blocks.*.mlp_*.w2", True, "sums 4096 products, over which rounding averages out"),
    Rule("pixel_blocks.*.modulation_in", True, "a large matrix behind a SiLU; a norm and an attention follow"),
    Rule("pixel_blocks.*.modulation_out", False, "shifts and gates of every pixel: its error is the largest by far"),
    Rule("pixel_blocks.*.compress_to_attn", True, "4096 wide, behind a norm"),
    Rule("pixel_blocks.*.expand_from_attn", True, "4096 wide; what it adds is gated"),
    Rule("pixel_blocks.*.attn.*", False, "queries, keys and values are large here; 1 % of the linear work"),
    Rule("pixel_blocks.*.mlp.*", False, "a few channels a pixel: bound by memory, nothing to win"),
    Rule("s_embedder.*", False, "the first layer: its rounding would reach everything"),
    Rule("y_embedder.*", False, "caption embeddings have outliers; once an image"),
    Rule("pixel_embedder.*", False, "three inputs: bound by memory"),
    Rule("final_layer.*", False, "the last layer: its rounding is seen in the picture"),
    Rule("lq_proj.gate_modules.*", False, "gates decide how far the latent is believed"),
    Rule("pit_lq_gate.*", False, "gates decide how far the latent is believed"),
    Rule("lq_proj.*", False, "the adapter runs once an image, not once a step"),
)


def rule_of(layer: str) -> Rule:
    """The rule for a linear layer of a folded network. Raises LookupError where there is none."""
    for rule in RULES:
        if fnmatchcase(layer, rule.pattern):
            return rule
    raise LookupError(f"No rule says in which precision {layer} is computed.")


def linear_layers(network: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in network.named_modules() if isinstance(module, nn.Linear | fp8.Fp8Linear))


def choose(layers: Iterable[str], keep: Sequence[str]) -> dict[str, Rule]:
    """A rule for every layer, given the operator's own patterns of what to keep. Raises ConfigError on an idle one."""
    layers = tuple(layers)
    for pattern in keep:
        if not any(fnmatchcase(layer, pattern) and rule_of(layer).fp8 for layer in layers):
            raise ConfigError(
                f"--keep {pattern} matches no layer that would be quantised; names are such as {layers[0]}."
            )

    def rule(layer: str) -> Rule:
        kept = next((pattern for pattern in keep if fnmatchcase(layer, pattern)), None)
        return rule_of(layer) if kept is None else Rule(kept, False, f"kept as asked: --keep {kept}")

    return {layer: rule(layer) for layer in layers}


def check_patterns(config: PidConfig, keep: Sequence[str]) -> None:
    """Raise ConfigError for a pattern that matches nothing, before any weights are read."""
    if keep:
        with torch.device("meta"):
            choose(linear_layers(FoldedDecoder(config, MODEL_TIMESTEPS)), keep)


def with_fp8(network: FoldedDecoder, largest_inputs: Mapping[str, float]) -> FoldedDecoder:
    """A copy with those layers in FP8; it shares everything else with `network`."""
    copy = share(network)
    fp8.quantise(copy, largest_inputs)
    return copy


def share(network: FoldedDecoder, dtype: torch.dtype | None = None) -> FoldedDecoder:
    """A copy over the same tensors, whose layers can be replaced without touching `network`; or in another dtype.

    Tables and FP8 layers stay as they are whatever the dtype.
    """
    parameters = {name for name, _ in network.named_parameters()}
    state = {
        name: tensor.to(dtype) if dtype is not None and name in parameters else tensor
        for name, tensor in network.state_dict().items()
    }
    with torch.device("meta"):
        copy = FoldedDecoder(network.config, network.timesteps)
    fp8.replace_with_fp8_layers(copy, state)
    copy.load_state_dict(state, strict=True, assign=True)
    copy.pixel_memory_budget, copy.pixel_chunk = network.pixel_memory_budget, network.pixel_chunk
    return copy.eval().requires_grad_(False)


def emulate(network: FoldedDecoder, quantised: FoldedDecoder) -> FoldedDecoder:
    """`network`, changed in place to compute what its copy `quantised` does.

    On a processor that is several times as fast: FP8 weights are expanded once, and not in every step.
    """
    for name, layer in quantised.named_modules():
        if isinstance(layer, fp8.Fp8Linear):
            linear = network.get_submodule(name)
            assert isinstance(linear, nn.Linear)  # noqa: S101  it was quantised from one
            linear.weight.data = fp8.fp8_weight(layer.weight, layer.weight_scale)
            linear.register_forward_pre_hook(partial(_round_input, layer.input_scale))
    return network


def _round_input(scale: Tensor, _linear: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (fp8.fp8_round(inputs[0], scale),)


def sensitivities(
    network: FoldedDecoder, largest_inputs: Mapping[str, float], probe: verify_fold.Probe, expected: Tensor
) -> Iterator[tuple[str, float]]:
    """For each layer, the velocity error that FP8 in it alone causes, the larger of the first and the last step's.

    `expected` holds the velocities of the whole probe, of which each layer is measured on two images: there are a
    hundred and more layers, and on a processor a full-size network takes seconds.
    """
    probed = share(network)
    few, rows = verify_fold.ends_of(probe)
    for layer, largest in largest_inputs.items():
        original = probed.get_submodule(layer)
        fp8.quantise(probed, {layer: largest})
        yield layer, verify_fold.image_errors(verify_fold.velocities(probed, few), expected[rows]).max().item()
        probed.set_submodule(layer, original)
