"""PNG encoding with a pool of threads, for servers and benchmarks without the decode server's own encoder."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from server.images import png


def submit_strips(pool: ThreadPoolExecutor, pixels: png.Bytes) -> list[Future[png.Strip]]:
    """Start encoding the strips of `pixels` [H, W, 3] uint8 and return their futures, in order."""
    height, width, _ = pixels.shape
    return [
        pool.submit(png.encode_strip, pixels[start:stop], pixels[start - 1] if start else None)
        for start, stop in png.strip_bounds(width, height)
    ]


def encode(pool: ThreadPoolExecutor, pixels: png.Bytes) -> bytes:
    """Encode `pixels` [H, W, 3] uint8 as `png.encode` does, with the threads of `pool`."""
    height, width, _ = pixels.shape
    strips = [future.result() for future in submit_strips(pool, pixels)]
    tail = png.png_tail(strip.checksum for strip in strips)
    return b"".join((png.png_head(width, height), *(strip.data for strip in strips), tail))
