"""Decode requests, as arguments of httpx."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack

from pid_client.tensors import Tensor, save_safetensors, to_tensor

SAFETENSORS = "application/x-safetensors"


class Options(TypedDict, total=False):
    """Options of a decode. Those that are missing have the server's defaults, except for seed and deadline."""

    decoder: str
    """Name of the decoder; by default, the only one of the server that supports the latents."""
    sigma: float
    """Noise level of the latent: 0 if the diffusion run is complete, up to 1 if it was stopped early."""
    seed: int
    """Seed of the decoder's noise; image i of a batch uses seed + i. By default, the client chooses one at random."""
    prompt: str | Sequence[str]
    """The prompt that the image was generated from: one for all latents, or one per latent."""
    caption: Any
    """Embedding of a caption instead of a prompt, [tokens, width] or [batch, tokens, width]."""
    steps: int
    """Number of denoising steps."""
    format: Literal["png", "webp", "jpeg", "jpg", "avif", "jxl", "npy", "raw"]
    """Image format."""
    tile: Literal["auto", "never"]
    compression: Literal["fast", "best", "none"]
    """Compression effort for PNG."""
    quality: int
    """Quality of WebP, JPEG and AVIF, 1 to 100."""
    metadata: bool
    """Whether a PNG contains seed, sigma, steps and decoder as text."""
    priority: Literal["interactive", "standard", "batch"]
    """Scheduling class."""
    deadline: float
    """Seconds that the call may last, retries included; by default, that of the client."""
    request_id: str
    """Id of the request in the server's log, 1 to 64 characters of A-Z a-z 0-9 . _ -; by default, a random one."""


_IN_QUERY = ("steps", "format", "tile", "compression", "quality", "metadata", "priority")


@dataclass(frozen=True)
class DecodeRequest:
    """Latents, with the options that the server decodes them with."""

    latents: Tensor  # as the caller passed them, with or without a batch dimension
    caption: Tensor | None
    prompts: tuple[str, ...]  # none, one for all latents, or one per latent
    seed: int  # of the first image
    query: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, latents: Any, **options: Unpack[Options]) -> DecodeRequest:
        """Read the latents and the options of a call.

        Args:
            latents: Tensor [c, h, w], [B, c, h, w] or [B, c, 1, h, w].
            options: Options of the call. Their values are checked by the server.

        Raises:
            TypeError: an option is unknown, or a tensor is not of a supported type.
            ValueError: a tensor has an unsupported dtype or shape.
        """
        for name in options.keys() - Options.__annotations__.keys():
            packed = " Convert packed latents with pid_client.frames.unpack." if name in ("height", "width") else ""
            raise TypeError(f"Unknown option {name}; options are {', '.join(Options.__annotations__)}.{packed}")
        tensor = to_tensor(latents).copy()  # the caller may change an array before the last attempt
        if len(tensor.shape) not in (3, 4, 5):
            shape = list(tensor.shape)
            raise ValueError(f"A latent of shape {shape} is not supported; pass [c, h, w] or a batch [B, c, h, w].")
        if 0 in tensor.shape:
            raise ValueError(f"The latents have no elements: their shape is {list(tensor.shape)}.")
        caption, prompt, seed = options.get("caption"), options.get("prompt"), options.get("seed")
        query = [(name, str(value).lower()) for name in _IN_QUERY if (value := options.get(name)) is not None]
        if (sigma := options.get("sigma")) is not None:
            query.append(("sigma", str(float(sigma))))  # also of a scalar tensor
        if (decoder := options.get("decoder")) is not None:
            query.append(("decoder", decoder))  # as it is: names are case-sensitive
        return cls(
            tensor,
            None if caption is None else to_tensor(caption).copy(),
            _read_prompts(prompt),
            secrets.randbits(53) if seed is None or seed == -1 else operator.index(seed),
            tuple(query),
        )

    @property
    def batch(self) -> int | None:
        """Number of latents, or None if the latents have no batch dimension."""
        return None if len(self.latents.shape) == 3 else self.latents.shape[0]

    def only(self, start: int, stop: int) -> DecodeRequest:
        """Return the request for the latents from `start` to before `stop`, which decodes them to the same images."""
        if self.batch is None or (start, stop) == (0, self.batch):
            return self  # as it is, since the server checks it
        caption, prompts = self.caption, self.prompts
        return replace(
            self,
            latents=self.latents[start:stop],
            caption=caption[start:stop] if caption is not None and len(caption.shape) == 3 else caption,
            prompts=prompts[start:stop] if len(prompts) > 1 else prompts,
            seed=(self.seed + start) % 2**64,
        )

    def arguments(self) -> dict[str, Any]:
        """Return the query and the body as arguments of `httpx.Client.build_request`.

        Prompts are in the body, because they can be too long for a URL, and proxies log URLs.
        """
        tensors = {"latent": self.latents}
        if self.caption is not None:
            tensors["caption"] = self.caption
        body, query = save_safetensors(tensors), [("seed", str(self.seed)), *self.query]
        if not self.prompts:
            return {"params": query, "content": body, "headers": {"Content-Type": SAFETENSORS}}
        file = ("latent.safetensors", body, SAFETENSORS)
        return {"params": query, "data": {"prompt": list(self.prompts)}, "files": {"latent": file}}


def _read_prompts(prompt: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the prompts: none, one, or one per latent."""
    prompts = () if prompt is None else (prompt,) if isinstance(prompt, str) else tuple(prompt)
    if not all(isinstance(text, str) for text in prompts):
        raise TypeError("The option prompt must be a text, or a list of texts.")
    return prompts
