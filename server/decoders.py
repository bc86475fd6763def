"""The decoders of a server: one bundle each, opened on every device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from engines.captions.protocol import TextEncoderInfo
from engines.errors import ConfigError
from engines.runtime.protocol import Runtime, RuntimeInfo
from engines.size import Size
from server.faults import Faults, FaultyRuntime
from server.images.encoding import Encoding
from server.request import MAX_DEADLINE_MS, DecoderLimits, ServerLimits, decoder_limits
from server.scheduling.costs import Loaded, Output, Tiling
from server.settings import Settings

Runtimes = Mapping[str, Mapping[str, Runtime]]  # by the name of the decoder, then by that of the device


@dataclass(frozen=True)
class Decoder:
    """A decoder with its runtimes by device, which are empty while it is unloaded."""

    loaded: Loaded
    info: RuntimeInfo  # of the first device
    sizes: tuple[Size, ...]  # that at least one device decodes
    limits: DecoderLimits
    runtimes: Mapping[str, Runtime]

    @property
    def name(self) -> str:
        """Name with which requests choose the decoder."""
        return self.loaded.decoder

    def output(self, size: Size) -> Output:
        """Return what an image of `size` is to the scheduler."""
        return output_of(self.loaded, size, self.info)

    def without_runtimes(self) -> Decoder:
        """Return the decoder as it is while it is unloaded."""
        return replace(self, runtimes={})


def output_of(loaded: Loaded, size: Size, info: RuntimeInfo) -> Output:
    """Return what an image of `size` is to the scheduler; `info` describes the runtime of the decoder."""
    plan = info.tiles(size)
    return Output(loaded.decoder, size, loaded.version, None if plan is None else Tiling(plan.tile, len(plan)))


class DecoderTable(Mapping[str, Decoder]):
    """The decoders of a server by name. They may be replaced on the event loop; the names never change.

    Attributes:
        devices: Names of the devices, each of which has every decoder.
        slots: Images on a device at once, of all decoders.
        resident: Decoders whose weights are on a device at once; None if those of all are.
        limits: What requests may contain.
        smallest_image: Bytes that the smallest image holds until it is encoded.
    """

    def __init__(
        self, runtimes: Runtimes, settings: Settings, faults: Faults, captions: TextEncoderInfo | None
    ) -> None:
        """Create the table.

        Args:
            runtimes: The runtimes at the start.
            settings: The server's settings.
            faults: Faults to inject into the steps.
            captions: The text encoder, or None if the server has none.
        """
        self._settings, self._faults, self._captions = settings, faults, captions
        self.devices = tuple(next(iter(runtimes.values())))
        self.slots = min(runtime.info.slots for each in runtimes.values() for runtime in each.values())
        self.resident = settings.resident_of(len(runtimes))
        self._decoders = {name: self.make(Loaded(name, 0), by_device) for name, by_device in runtimes.items()}
        largest = max(decoder.limits.largest_body for decoder in self.values())
        self._max_body_bytes = settings.max_body_bytes or largest
        self._update()

    def __getitem__(self, name: str) -> Decoder:
        return self._decoders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoders)

    def __len__(self) -> int:
        return len(self._decoders)

    def make(self, loaded: Loaded, runtimes: Mapping[str, Runtime]) -> Decoder:
        """Return a decoder with these runtimes, by device.

        Raises:
            ConfigError: its captions do not fit the text encoder.
        """
        info = next(iter(runtimes.values())).info
        captions, shape = self._captions, (info.caption_tokens, info.caption_width)
        if captions is not None and info.caption_tokens and shape != (captions.tokens, captions.width):
            raise ConfigError(
                f"The decoder needs captions of {shape[0]} tokens of width {shape[1]}, but those of the text encoder "
                f"have {captions.tokens} of width {captions.width}."
            )
        if self._faults:
            runtimes = {device: FaultyRuntime(runtime, self._faults) for device, runtime in runtimes.items()}
        sizes = tuple(dict.fromkeys(size for runtime in runtimes.values() for size in runtime.info.sizes))
        limits = decoder_limits(loaded.decoder, info, sizes, self._settings.max_images, captions is not None)
        return Decoder(loaded, info, sizes, limits, runtimes)

    def put(self, decoder: Decoder) -> None:
        """Replace the decoder of the same name. The limit of bodies remains that of the start."""
        self._decoders = {**self._decoders, decoder.name: decoder}
        self._update()

    def _update(self) -> None:
        self.limits = ServerLimits(
            decoders={name: decoder.limits for name, decoder in self._decoders.items()},
            max_body_bytes=self._max_body_bytes,
            max_deadline_ms=min(int(1000 * self._settings.max_deadline), MAX_DEADLINE_MS),
        )
        self.smallest_image = min(Encoding().held_bytes(size) for decoder in self.values() for size in decoder.sizes)
