"""Replacement of one decoder by another on the devices, with both in memory if they fit."""

from __future__ import annotations

from collections.abc import Mapping

from engines.errors import DeviceLostError
from engines.runtime.protocol import Runtime, RuntimeInfo
from server.decoders import Decoder, DecoderTable
from server.dispatch import Dispatcher
from server.lifecycle import Lifecycle
from server.scheduling.costs import Loaded
from server.warm_up import WarmUp, outputs_of
from server.worker import Worker


class DecoderSwitch:
    """Loads decoders onto the devices of a service and switches its requests to them.

    `prepare` and `is_unloading` are called from any thread, the other methods on the event loop, where they do not
    overlap with submissions.
    """

    def __init__(
        self,
        decoders: DecoderTable,
        dispatcher: Dispatcher,
        lifecycle: Lifecycle,
        warm_up: WarmUp,
        workers: Mapping[str, Worker],
    ) -> None:
        """Create the switch of a service; `workers` are its device threads by device. They get the first decoders."""
        self._decoders, self._dispatcher, self._lifecycle = decoders, dispatcher, lifecycle
        self._warm_up, self._workers = warm_up, workers
        for decoder in decoders.values():
            self._load(decoder)

    def prepare(self, name: str, runtimes: Mapping[str, Runtime]) -> Decoder:
        """Warm up, on this thread, the runtimes that are to replace those of a decoder; return the new decoder.

        Raises:
            PidError: it cannot be used. Nothing has changed then.
        """
        old = self._decoders[name]
        loaded = Loaded(name, old.loaded.version + 1)
        try:
            decoder = self._decoders.make(loaded, runtimes)
            for runtime in runtimes.values():
                self._warm_up.run(loaded, runtime)
        except DeviceLostError:
            raise
        except BaseException:
            self._dispatcher.query(lambda scheduler: scheduler.costs.forget(loaded))
            for runtime in runtimes.values():
                runtime.close()
            raise
        if _costs_as_much(decoder.info, old.info):
            self._dispatcher.query(lambda scheduler: scheduler.costs.inherit(old.loaded, loaded))
        return decoder

    def replace(self, decoder: Decoder) -> None:
        """Admit requests for `decoder` instead of the one of the same name, which is unloaded after its last image."""
        old = self._decoders[decoder.name]
        self._load(decoder)
        self._decoders.put(decoder)
        self._dispatcher.retire(old.loaded)
        self._lifecycle.loading(None)

    def suspend(self, name: str) -> None:
        """Reject requests for a decoder, and let it be unloaded after its last image."""
        self._lifecycle.loading(f"The decoder {name} is being replaced.")
        decoder = self._decoders[name]
        self._decoders.put(decoder.without_runtimes())
        self._dispatcher.retire(decoder.loaded)

    def is_unloading(self) -> bool:
        """Return whether a device still has a decoder in memory that was replaced or suspended."""
        current = {decoder.loaded for decoder in self._decoders.values() if decoder.runtimes}
        return any(loaded not in current for worker in self._workers.values() for loaded in list(worker.runtimes))

    def _load(self, decoder: Decoder) -> None:
        for device, runtime in decoder.runtimes.items():
            self._workers[device].runtimes[decoder.loaded] = runtime
        self._dispatcher.load({device: outputs_of(decoder.loaded, x) for device, x in decoder.runtimes.items()})


def _costs_as_much(new: RuntimeInfo, old: RuntimeInfo) -> bool:
    return (new.decoder, new.precision, new.kind) == (old.decoder, old.precision, old.kind)
