"""Which attentions a build computes in FP8: the candidates that the options, the target and the sizes allow."""

from __future__ import annotations

from collections.abc import Sequence

from engines.compile.planning.options import AttentionOption, Compiler
from engines.compile.planning.targets import Target, engine_package
from engines.errors import ConfigError
from engines.manifest import AttentionKind
from engines.pid.config import PATCH_PIXELS
from engines.size import Size

AttentionKinds = tuple[AttentionKind, ...]

BOTH: AttentionKinds = ("patch", "pixel")
PREFERENCE: tuple[AttentionKinds, ...] = (BOTH, ("patch",), ("pixel",), ())
MIN_TOKENS = 32  # TensorRT for RTX 1.7 has no FP8 attention kernel for fewer keys


def attention_candidates(
    option: AttentionOption, target: Target, compiler: Compiler | None, sizes: Sequence[Size], random_weights: bool
) -> tuple[AttentionKinds, ...]:
    """Return the kinds of attention to compute in FP8, in order of preference.

    If there are several candidates, the images that they decode decide between them.

    Args:
        option: The value of --attention.
        target: Where the bundle will run.
        compiler: The compiler that the operator requested.
        sizes: Output sizes.
        random_weights: Whether images are noise, which cannot decide.

    Raises:
        ConfigError: FP8 was requested, and the target has no kernel for one of the sizes.
    """
    smallest = min(sizes, key=lambda size: size.area)
    too_small = target.compiled and smallest.area < MIN_TOKENS * PATCH_PIXELS
    if option == "fp8":
        if too_small:
            raise ConfigError(
                f"TensorRT has no FP8 attention kernel for images as small as {smallest}: they need at least "
                f"{MIN_TOKENS * PATCH_PIXELS:,} pixels. Use --attention 16bit, or larger --sizes."
            )
        return (BOTH,)
    if option == "16bit" or too_small or not _preferred(target, compiler):
        return ((),)
    return (BOTH,) if random_weights else PREFERENCE


def attention_warnings(candidates: Sequence[AttentionKinds], target: Target, compiler: Compiler | None) -> list[str]:
    """Return the warnings about FP8 attention for a manifest."""
    if not any(candidates) or not target.compiled or _preferred(target, compiler):
        return []
    return ["FP8 attention has never been compiled with the full TensorRT; the engines may not use it."]


def _preferred(target: Target, compiler: Compiler | None) -> bool:
    """Return whether FP8 attention is faster on the target, or the purpose of the target is emulation."""
    if not target.compiled:
        return target.name == "cpu"
    return engine_package(target, compiler) == "tensorrt-rtx"
