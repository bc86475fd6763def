"""Inference requests of KServe v2: JSON, followed by the tensors that are binary."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.body.json_text import parse_json
from server.body.prompts import read_json_prompts
from server.body.quoting import one_of, quote
from server.body.tensors import ERRORS, RawTensor, numbers_tensor, read_raw
from server.errors import InvalidLatentError, InvalidOptionError, MalformedBodyError, count_of

DTYPES = {"FP16": "float16", "BF16": "bfloat16", "FP32": "float32"}
PRIORITIES = {0: "standard", 1: "interactive", 2: "standard", 3: "batch"}  # Triton: 1 is the highest, 0 the default
Output = Literal["image", "pixels", "seed"]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class InferenceInputParameters(_Message):
    """Parameters of an input."""

    binary_data_size: int | None = Field(None, ge=0)


class InferenceInput(_Message):
    """A tensor, whose data are in the JSON, or binary after it."""

    name: str
    shape: list[int]
    datatype: str
    parameters: InferenceInputParameters = InferenceInputParameters()
    data: Any = None


class InferenceOutputParameters(_Message):
    """Parameters of an output."""

    binary_data: bool | None = None


class InferenceOutput(_Message):
    """A requested output."""

    name: Annotated[str, Field(json_schema_extra={"enum": list(get_args(Output))})]
    parameters: InferenceOutputParameters = InferenceOutputParameters()


DEFAULT_OUTPUTS = [InferenceOutput(name="image"), InferenceOutput(name="seed")]


class InferenceBody(_Message):
    """An inference request. Options of the decode are parameters."""

    id: str | None = Field(None, max_length=1024)
    parameters: dict[str, Any] = {}
    inputs: list[InferenceInput] = Field(max_length=8)
    outputs: list[InferenceOutput] = Field([], max_length=8)


@dataclass(frozen=True)
class InferRequest:
    """An inference request, of which the values of tensors are not read yet."""

    id: str | None
    tensors: Mapping[str, RawTensor]  # by the names of `server.body.tensors.ERRORS`
    options: Sequence[tuple[str, object]]  # not validated yet
    outputs: Mapping[Output, bool]  # whether each requested output is binary


def read_request(text: bytes | bytearray, blobs: memoryview) -> InferRequest:
    """Read the JSON of a request and the binary tensors that follow it.

    Raises:
        MalformedBodyError: one of them is invalid, or they do not agree.
        InvalidLatentError, InvalidCaptionError, InvalidOptionError: the request is not supported.
    """
    try:
        request = InferenceBody.model_validate(parse_json(text))
    except ValidationError as error:
        raise MalformedBodyError(_explain(error)) from None
    options = list(_options(request.parameters))
    tensors: dict[str, RawTensor] = {}
    for tensor, blob in zip(request.inputs, _split(request.inputs, blobs), strict=True):
        if tensor.name in tensors or (tensor.name == "prompt" and any(name == "prompt" for name, _ in options)):
            raise MalformedBodyError(f"The input {tensor.name} is given twice; send it once.")
        if tensor.name == "prompt":
            options.append(("prompt", _prompts(tensor, blob)))
        elif tensor.name in ERRORS:
            tensors[tensor.name] = _read_tensor(tensor, blob)
        else:
            raise InvalidLatentError(f"Unknown input {quote(tensor.name)}; send {one_of((*ERRORS, 'prompt'))}.")
    return InferRequest(request.id, tensors, options, _outputs(request))


def _explain(error: ValidationError) -> str:
    """Return a sentence on the first fault of a request."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "body"
    return f"The inference request is invalid: {place[:80]}: {first['msg']}."


def _options(parameters: Mapping[str, object]) -> Iterable[tuple[str, object]]:
    """Yield the options among the parameters of a request; Triton's priority and timeout become options as well."""
    for name, value in parameters.items():
        if name == "binary_data_output":
            continue
        if name == "priority" and type(value) is int:
            if value not in PRIORITIES:
                raise InvalidOptionError(
                    f"The priority must be 1 (interactive), 2 (standard) or 3 (batch), not {quote(value)}."
                )
            yield "priority", PRIORITIES[value]
        elif name == "timeout":  # microseconds
            if type(value) is not int:
                raise InvalidOptionError(f"The timeout must be an integer (microseconds), not {quote(value)}.")
            yield "deadline_ms", math.ceil(value / 1000)
        else:
            yield name, read_json_prompts(value) if name == "prompt" else value


def _split(inputs: Sequence[InferenceInput], blobs: memoryview) -> list[memoryview | None]:
    """Return the binary data of each input, or None if its data is in the JSON."""
    sizes = [tensor.parameters.binary_data_size for tensor in inputs]
    total = sum(size or 0 for size in sizes)
    if total != len(blobs):
        raise MalformedBodyError(
            f"The JSON is followed by {count_of(len(blobs), 'byte')}, but binary_data_size adds up to {total}."
        )
    pieces: list[memoryview | None] = []
    start = 0
    for tensor, size in zip(inputs, sizes, strict=True):
        if (size is None) == (tensor.data is None):
            raise MalformedBodyError(f"The input {quote(tensor.name)} needs either data or binary_data_size.")
        pieces.append(None if size is None else blobs[start : start + size])
        start += size or 0
    return pieces


def _read_tensor(tensor: InferenceInput, blob: memoryview | None) -> RawTensor:
    """Read the input latent or caption."""
    name, shape = tensor.name, tuple(tensor.shape)
    if tensor.datatype not in DTYPES:
        raise ERRORS[name](f"The {name} has datatype {quote(tensor.datatype)}; send it as {one_of(DTYPES)}.")
    if blob is not None:
        return read_raw(name, blob, shape, DTYPES[tensor.datatype])
    if tensor.datatype != "FP32":
        raise ERRORS[name](f"The {name} has datatype {tensor.datatype}, which JSON cannot express; send it as binary.")
    return numbers_tensor(name, shape, tensor.data)


def _prompts(tensor: InferenceInput, blob: memoryview | None) -> object:
    """Read the input prompt: BYTES, each element of which is UTF-8."""
    if tensor.datatype != "BYTES" or len(tensor.shape) not in (1, 2) or min(tensor.shape) < 1:
        raise InvalidOptionError("The input prompt must have datatype BYTES and shape [1] or [batch].")
    count = math.prod(tensor.shape)
    prompts = read_json_prompts(_flat(tensor.data)) if blob is None else _read_bytes(blob, count)
    if not isinstance(prompts, list) or len(prompts) != count:
        raise MalformedBodyError("The input prompt does not have as many elements as its shape says.")
    return prompts


def _flat(data: object) -> object:
    """Return a list of texts from one that may be nested once."""
    if isinstance(data, list) and data and all(isinstance(item, list) for item in data):
        return [text for item in data for text in item]
    return data


def _read_bytes(blob: memoryview, count: int) -> list[str]:
    """Read elements of BYTES, each of which follows its length as a 4-byte little-endian integer.

    Stop after one more than `count`.
    """
    elements: list[str] = []
    start = 0
    while start < len(blob) and len(elements) <= count:
        (length,) = struct.unpack_from("<I", blob, start) if len(blob) - start >= 4 else (len(blob),)
        start += 4
        if length > len(blob) - start:
            raise MalformedBodyError("The input prompt ends within an element.")
        try:
            elements.append(str(blob[start : start + length], "utf-8"))
        except UnicodeDecodeError:
            raise InvalidOptionError("The input prompt is not UTF-8.") from None
        start += length
    return elements


def _outputs(request: InferenceBody) -> dict[Output, bool]:
    """Return the requested outputs, and whether each is binary."""
    binary = request.parameters.get("binary_data_output", False)
    if not isinstance(binary, bool):
        raise MalformedBodyError("The parameter binary_data_output must be true or false.")
    requested = request.outputs or DEFAULT_OUTPUTS
    outputs: dict[Output, bool] = {}
    for output in requested:
        if output.name not in get_args(Output):
            raise InvalidOptionError(f"Unknown output {quote(output.name)}; request {one_of(get_args(Output))}.")
        name = cast(Output, output.name)
        if name in outputs:
            raise MalformedBodyError(f"The output {name} is requested twice; request it once.")
        choice = output.parameters.binary_data
        outputs[name] = binary if choice is None else choice
    if "image" in outputs and "pixels" in outputs:
        raise InvalidOptionError("Request either image (encoded) or pixels, not both.")
    if outputs.get("pixels") is False:
        raise InvalidOptionError("The output pixels is too large for JSON; request it with binary_data=true.")
    return outputs
