"""Choice of the decoder of a request: the one that it names, or the only one that supports its latent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from engines.errors import PidError
from server.body.quoting import one_of, quote
from server.body.shapes import channels_of, check_latent
from server.body.tensors import check_rank, invalid
from server.errors import AmbiguousDecoderError, InvalidOptionError
from server.request import DecodeOptions, DecoderLimits, ServerLimits


def candidates(options: DecodeOptions, limits: ServerLimits) -> Sequence[DecoderLimits]:
    """Return the decoder that the request names, or all decoders of the server if it names none.

    Raises:
        InvalidOptionError: the server has no decoder with this name.
    """
    if options.decoder is None:
        return tuple(limits.decoders.values())
    if options.decoder not in limits.decoders:
        raise InvalidOptionError(unknown_decoder(options.decoder, limits))
    return (limits.decoders[options.decoder],)


def unknown_decoder(name: str, limits: ServerLimits) -> str:
    """Return the message for the name of a decoder that the server does not have."""
    return f"Unknown decoder {quote(name)}; this server has {one_of(map(quote, limits.decoders))}."


def select_decoder(
    shape: Sequence[int],
    options: DecodeOptions,
    limits: ServerLimits,
    check: Callable[[DecoderLimits], object] = lambda decoder: None,
) -> DecoderLimits:
    """Return the decoder for a latent of `shape`. A decoder is never guessed: several may support the same shape.

    Args:
        shape: Shape of the tensor in the body.
        options: All options of the request.
        limits: The decoders.
        check: Raises a PidError for a decoder that does not support something else in the request.

    Raises:
        InvalidLatentError, InvalidOptionError: no decoder supports the latent; also as `candidates`.
        AmbiguousDecoderError: several do.
    """
    found = candidates(options, limits)
    check_rank("latent", shape)
    if len(found) == 1:
        return found[0]
    errors = _errors(found, lambda decoder: check_latent(shape, options, decoder))
    fitting = [decoder for decoder in found if decoder.name not in errors]
    refused = _errors(fitting, check)
    able = [decoder for decoder in fitting if decoder.name not in refused]
    if len(able) == 1:
        return able[0]
    if able:
        names = [decoder.name for decoder in able]
        raise AmbiguousDecoderError(
            f"The decoders {', '.join(names[:-1])} and {names[-1]} support this latent; "
            "name one with the option decoder."
        )
    if refused:
        raise next(iter(refused.values()))
    closest = [decoder.name for decoder in found if decoder.channels == channels_of(shape)] or list(errors)
    if len({str(errors[name]) for name in closest}) == 1:
        raise errors[closest[0]]
    raise invalid(
        "latent",
        f"has the shape {quote(tuple(shape))}, which no decoder of this server supports; /info lists what they need",
    )


def _errors(decoders: Iterable[DecoderLimits], check: Callable[[DecoderLimits], object]) -> dict[str, PidError]:
    """Return the errors that `check` raises, by the name of the decoder."""
    errors: dict[str, PidError] = {}
    for decoder in decoders:
        try:
            check(decoder)
        except PidError as error:
            errors[decoder.name] = error
    return errors
