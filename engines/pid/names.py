"""Looks up decoders by the names of diffusion models, however they are spelt, and explains the names it does not know.

Two models whose latents have the same shape may still have different latent spaces, and a decoder for another space
gives bad images without any error. A name is therefore only suggested if the given one is a misspelling of it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from engines.errors import ConfigError

# Models whose latents no decoder accepts as they are: pattern of the spelling -> explanation.
_OTHER_LATENTS = {
    r"qwenimage21.*": "Qwen-Image-2.1 has its own autoencoder with 64 channels, not the one of Qwen-Image; there "
    "is no decoder for it.",
    r"ideogram4.*": "Ideogram 4 uses the autoencoder of FLUX.2, but orders and normalises the channels differently. "
    "Convert its latents as described in docs/engines.md, then use flux2.",
    r"chroma1?radiance.*": "Chroma1-Radiance generates pixels instead of latents, so there is nothing to decode.",
}
_MISSPELLING = 0.85  # similarity from which a name is a misspelling; other models of a family are below it

Decoder = TypeVar("Decoder")


def spelling(name: str) -> str:
    """Reduce a name to what its spellings have in common: FLUX.2-klein, flux2_klein and org/flux.2-klein are equal."""
    return re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower())


def find_by_name(name: str, decoders: Mapping[str, Decoder], listed: Sequence[str]) -> Decoder:
    """Return the decoder with a name.

    Args:
        name: Name of a decoder or a diffusion model, in any spelling.
        decoders: Decoders by all their names.
        listed: Names for the message.

    Raises:
        ConfigError: The name is unknown, or that of a model whose latents no decoder accepts.
    """
    given = spelling(name)
    by_spelling = {spelling(known): known for known in decoders}
    if given in by_spelling:
        return decoders[by_spelling[given]]
    for pattern, explanation in _OTHER_LATENTS.items():
        if re.fullmatch(pattern, given):
            raise ConfigError(explanation)
    intended = _intended(given, by_spelling)
    hint = (
        f"Did you mean {by_spelling[intended]}?"
        if intended
        else "If it is a diffusion model, this project does not know its latent space: choose a decoder with the same "
        "autoencoder, channel order and normalisation, see docs/engines.md."
    )
    raise ConfigError(f"Unknown decoder {name!r}. {hint} Available decoders: {', '.join(listed)}.")


def _intended(given: str, known: Mapping[str, str]) -> str | None:
    """Return the spelling that was misspelt, if there is one."""
    # Another number means another version (2k is a resolution), and several more letters another variant.
    candidates = [other for other in known if _numbers(other) == _numbers(given) and abs(len(other) - len(given)) <= 1]
    return next(iter(difflib.get_close_matches(given, candidates, n=1, cutoff=_MISSPELLING)), None)


def _numbers(name: str) -> list[str]:
    return re.findall(r"\d+k?", name)
