"""Responses of KServe v2 to inference requests: JSON, followed by the tensors that are binary."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeAlias

from pydantic import BaseModel, Field

from server.body.media import JSON, RAW
from server.http.containers import BASE64_EXPANSION, base64_pieces
from server.http.layouts import Begun, Layout, Streams, complete, iterate, seeds
from server.http.protocols.kserve_request import InferRequest, Output

VERSION = "1"  # of every model
HEADER_LENGTH = "Inference-Header-Content-Length"


class InferenceResult(BaseModel):
    """One output of a response, whose data are in the JSON, or binary after it."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: list[Any] = []


class InferenceAnswer(BaseModel):
    """The response to an inference request."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferenceResult]


class InferenceError(BaseModel):
    """An error."""

    error: str
    code: Annotated[str, Field(description="Stable, for programs to match.")]
    request_id: str


@dataclass(frozen=True)
class _Base64:
    """Bytes that are sent as base64, which is computed while it is sent."""

    chunks: list[bytes]

    def __len__(self) -> int:
        return 4 * -(-sum(map(len, self.chunks)) // 3)


Part: TypeAlias = bytes | _Base64


class _Result(NamedTuple):
    """One output of a response, in parts."""

    text: list[Part]  # its JSON
    content: list[Part]  # its binary data; empty if the JSON has the data


class InferResponse(Layout):
    """The outputs as JSON, followed by those in binary. If an image fails, the response is its error."""

    def __init__(self, request: InferRequest, model: str) -> None:
        """Prepare the response of `model` to `request`."""
        self._request, self._model = request, model
        self.expansion = 1.0 if request.outputs.get("image", True) else BASE64_EXPANSION

    async def begin(self, streams: Streams, request_id: str) -> Begun:
        """Wait for all images, because the JSON has their sizes."""
        images = [await complete(stream) for stream in streams]
        outputs = self._request.outputs
        results = [_RESULTS[name](streams, images, binary) for name, binary in outputs.items()]
        text = self._text(results)
        parts = [*text, *(part for result in results for part in result.content)]
        headers = {
            "Content-Type": RAW if any(outputs.values()) else JSON,
            "Content-Length": str(sum(map(len, parts))),
            "X-Seed": seeds(streams),
        }
        if any(outputs.values()):
            headers[HEADER_LENGTH] = str(sum(map(len, text)))
        return Begun(headers, iterate(_pieces(parts)))

    def _text(self, results: Sequence[_Result]) -> list[Part]:
        """Return the JSON of the response."""
        document = {"model_name": self._model, "model_version": VERSION}
        if self._request.id is not None:
            document["id"] = self._request.id
        text: list[Part] = [_open(document) + b', "outputs": [']
        for index, result in enumerate(results):
            text += [b", "] * bool(index) + result.text
        return [*text, b"]}"]


Images = Sequence[list[bytes]]  # the chunks of each image


def _image_result(streams: Streams, images: Images, binary: bool) -> _Result:
    """Return the encoded images as BYTES; in JSON, which has no bytes, as base64."""
    description: dict[str, Any] = {"name": "image", "datatype": "BYTES", "shape": [len(images)]}
    if binary:
        return _binary(
            description, [p for chunks in images for p in (struct.pack("<I", sum(map(len, chunks))), *chunks)]
        )
    text: list[Part] = [_open(description | {"parameters": {"content_encoding": "base64"}}) + b', "data": [']
    for index, chunks in enumerate(images):
        text += [b', "' if index else b'"', _Base64(chunks), b'"']
    return _Result([*text, b"]}"], [])


def _pixels_result(streams: Streams, images: Images, binary: bool) -> _Result:
    """Return the pixels, which are always binary."""
    shape = streams[0].shape
    assert shape is not None  # noqa: S101  the format of this output is raw
    description = {"name": "pixels", "datatype": "UINT8", "shape": [len(images), *shape]}
    return _binary(description, [chunk for chunks in images for chunk in chunks])


def _seed_result(streams: Streams, images: Images, binary: bool) -> _Result:
    seeds = [stream.seed for stream in streams]
    description = {"name": "seed", "datatype": "UINT64", "shape": [len(seeds)]}
    if binary:
        return _binary(description, [struct.pack(f"<{len(seeds)}Q", *seeds)])
    return _Result([json.dumps(description | {"data": seeds}).encode()], [])


_RESULTS: Mapping[Output, Callable[[Streams, Images, bool], _Result]] = {
    "image": _image_result,
    "pixels": _pixels_result,
    "seed": _seed_result,
}


def _open(document: dict[str, Any]) -> bytes:
    """Return a JSON object without its end, to which members can be added."""
    return json.dumps(document).encode()[:-1]


def _binary(description: dict[str, Any], content: list[bytes]) -> _Result:
    parameters = {"binary_data_size": sum(map(len, content))}
    return _Result([json.dumps(description | {"parameters": parameters}).encode()], list(content))


def _pieces(parts: list[Part]) -> Iterator[bytes]:
    for part in parts:
        if isinstance(part, _Base64):
            yield from base64_pieces(part.chunks)
        else:
            yield part
