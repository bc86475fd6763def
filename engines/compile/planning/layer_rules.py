"""Rules for which linear layers and attentions are quantised and which are not, with the reason for each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from engines.errors import ConfigError
from engines.manifest import AttentionKind
from engines.pid import FoldedDecoder, PidConfig
from engines.pid.blocks import attentions
from engines.pid.quantised_linear import QuantisedLinear
from engines.pid.sampler import MODEL_TIMESTEPS


@dataclass(frozen=True)
class Rule:
    """Whether to quantise the linear layers and attentions whose names match a pattern; `*` also matches dots."""

    pattern: str
    quantised: bool
    reason: str


# For a linear layer or an attention of a folded network, the first match applies.
RULES = (
    Rule("patch_blocks.*.attn", True, "more than half of a step for large images; queries and keys follow a norm"),
    Rule("pixel_blocks.*.attn", True, "a tenth of the work of the attentions; queries and keys follow a norm"),
    Rule("patch_blocks.*.attn.qkv_*", True, "follows a norm, so its range is known; 30 % of the blocks' linear work"),
    Rule("patch_blocks.*.attn.proj_*", True, "averages of values; the residual stream stays in 16 bits"),
    Rule("patch_blocks.*.mlp_*.w[13]", True, "follows a norm; with w2 two thirds of the blocks' linear work"),
    Rule("patch_blocks.*.mlp_*.w2", True, "sums 4096 products, which averages out the rounding"),
    Rule("pixel_blocks.*.modulation_in", True, "a large matrix after a SiLU; a norm and an attention follow"),
    Rule("pixel_blocks.*.modulation_out", False, "shifts and gates of every pixel: by far the largest error in FP8"),
    Rule("pixel_blocks.*.compress_to_attn", True, "4096 wide, follows a norm"),
    Rule("pixel_blocks.*.expand_from_attn", True, "4096 wide; its output is gated"),
    Rule("pixel_blocks.*.attn.*", False, "queries, keys and values are large; 1 % of the linear work"),
    Rule("pixel_blocks.*.mlp.*", False, "a few channels per pixel: bound by memory, FP8 gains nothing"),
    Rule("s_embedder.*", False, "the first layer: its rounding would affect everything"),
    Rule("y_embedder.*", False, "caption embeddings have outliers; runs once per image"),
    Rule("pixel_embedder.*", False, "three inputs: bound by memory"),
    Rule("final_layer.*", False, "the last layer: its rounding would be visible in the image"),
    Rule("lq_proj.gate_modules.*", False, "gates decide how much the latent counts"),
    Rule("pit_lq_gate.*", False, "gates decide how much the latent counts"),
    Rule("lq_proj.*", False, "the adapter runs once per image, not once per step"),
)


def rule_for(layer: str) -> Rule:
    """Return the rule for a linear layer or an attention of a folded network.

    Raises:
        LookupError: No rule matches.
    """
    for rule in RULES:
        if fnmatchcase(layer, rule.pattern):
            return rule
    raise LookupError(f"No rule matches the layer {layer}.")


def linear_layers(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the linear layers of a network, whether quantised or not."""
    return tuple(name for name, module in network.named_modules() if isinstance(module, nn.Linear | QuantisedLinear))


def attention_names(network: nn.Module, kinds: Collection[AttentionKind]) -> tuple[str, ...]:
    """Return the names of the attentions of some kinds, in the order of execution."""
    return tuple(name for name in attentions(network) if attention_kind(name) in kinds)


def attention_kind(name: str) -> AttentionKind:
    """Return the kind of an attention."""
    return "patch" if name.startswith("patch_blocks.") else "pixel"


def assign_rules(layers: Iterable[str], keep: Sequence[str]) -> dict[str, Rule]:
    """Assign a rule to every layer.

    Args:
        layers: Names of linear layers and attentions of a folded network.
        keep: Patterns of those that are not quantised, even if `RULES` would quantise them.

    Raises:
        ConfigError: A pattern in `keep` matches no layer that would be quantised.
    """
    layers = tuple(layers)
    for pattern in keep:
        if not any(fnmatchcase(layer, pattern) and rule_for(layer).quantised for layer in layers):
            raise ConfigError(
                f"--keep {pattern} matches no layer that would be quantised. Layers have names such as {layers[0]}."
            )

    def rule(layer: str) -> Rule:
        kept = next((pattern for pattern in keep if fnmatchcase(layer, pattern)), None)
        return rule_for(layer) if kept is None else Rule(kept, False, f"kept by --keep {kept}")

    return {layer: rule(layer) for layer in layers}


def network_rules(network: nn.Module, kinds: Collection[AttentionKind], keep: Sequence[str]) -> dict[str, Rule]:
    """Assign a rule to every linear layer of a folded network, and to its attentions of some kinds.

    Raises:
        ConfigError: A pattern in `keep` matches none that would be quantised.
    """
    return assign_rules(linear_layers(network) + attention_names(network, kinds), keep)


def check_keep_patterns(config: PidConfig, keep: Sequence[str], kinds: Collection[AttentionKind]) -> None:
    """Check the patterns of `assign_rules` without weights; `kinds` are those of the attentions that may be in FP8.

    Raises:
        ConfigError: A pattern matches no layer that would be quantised, or no layer is left to quantise.
    """
    if keep:
        with torch.device("meta"):
            network = FoldedDecoder(config, MODEL_TIMESTEPS)
        rules = network_rules(network, kinds, keep)
        if not any(rules[layer].quantised for layer in linear_layers(network)):
            raise ConfigError("--keep leaves no linear layer to quantise; use --precision bf16.")
