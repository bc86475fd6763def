"""JSON documents of the HTTP interface as typed models. The schemas of the OpenAPI document are generated from them.

`Problem`, `Info` and `Health` are built from these models. Request bodies are read by `server.body`, which copies
nothing; `DecodeBody` and `DecodeForm` only describe them.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import core_schema

from engines.runtime.memory_plan import Part
from server.lifecycle import State
from server.request import DecodeOptions
from server.scheduling.costs import CostStage

SCHEMA_REF = "#/components/schemas/{model}"

Pair = Annotated[list[int], Field(min_length=2, max_length=2, description="[height, width]")]


class Problem(BaseModel):
    """An error (RFC 9457)."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "about:blank",
                    "title": "Invalid option",
                    "status": 422,
                    "code": "invalid-option",
                    "detail": "The option steps must be an integer from 1 to 4, not '5'.",
                    "request_id": "5f0c7f8d4f0b4d0fae7b7a4c0d8f5d5e",
                }
            ]
        }
    )

    type: Annotated[str, Field(description="Always about:blank; match code instead.")]
    title: Annotated[str, Field(description="The code as text.")]
    status: Annotated[int, Field(description="The status of the response.")]
    code: Annotated[str, Field(description="Stable, for programs to match.")]
    detail: Annotated[str, Field(description="Message for people; it may change.")]
    request_id: Annotated[str | None, Field(description="Identifies the request in the server's log.")] = None


class Health(BaseModel):
    """The state of the server."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"state": "ready"}]})

    state: State
    reason: Annotated[str | None, Field(description="Why the server is stalled or failed.")] = None


class Dtype(enum.StrEnum):
    """Type of the elements of a tensor."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Tensor(BaseModel):
    """A tensor in JSON."""

    model_config = ConfigDict(extra="forbid")

    data: Annotated[
        str,
        Field(
            description="Elements in little-endian byte order, in C order, as base64.",
            json_schema_extra={"format": "byte"},
        ),
    ]
    shape: Annotated[
        list[Annotated[int, Field(ge=1)]],
        Field(description="[channels, h, w], or [batch, channels, h, w]; [tokens, width] or [batch, …] for captions"),
    ]
    dtype: Dtype


class DecodeBody(DecodeOptions):
    """A latent, or a batch of them, and options."""

    latent: Tensor
    caption: Annotated[
        Tensor | None, Field(description="Caption embedding; excludes the option prompt; by default the empty caption.")
    ] = None


class DecodeForm(DecodeOptions):
    """A file with a latent, or with a batch of them, and options."""

    latent: Annotated[bytes, Field(description="File: safetensors, .npy, or raw elements with shape and dtype.")]
    shape: Annotated[str | None, Field(description="Shape of raw elements, such as 16,64,64.")] = None
    dtype: Annotated[Dtype | None, Field(description="Type of raw elements.")] = None


class DecodedImage(BaseModel):
    """One image of a JSON response: its data, or the problem if it failed."""

    index: Annotated[int, Field(description="Index of the latent in the request, from 0.")]
    seed: Annotated[int | None, Field(description="Seed of the decoder's noise.")] = None
    media_type: Annotated[str | None, Field(description="Such as image/png.")] = None
    data: Annotated[
        str | None, Field(description="The image file as base64.", json_schema_extra={"format": "byte"})
    ] = None
    shape: Annotated[list[int] | None, Field(description="Shape of raw pixels, [height, width, 3].")] = None
    dtype: Annotated[str | None, Field(description="Type of raw pixels, uint8.")] = None
    problem: Problem | None = None


class DecodedImages(BaseModel):
    """Images in the order of the latents."""

    images: list[DecodedImage]


class LatentSpace(BaseModel):
    """The latents that the decoder was trained on."""

    name: str
    channels: int
    pixels_per_cell: Annotated[int, Field(description="Pixels of the VAE's image along one side of a latent cell.")]
    sigma_frame: Annotated[
        str, Field(description="Convention for the noise level: flow or variance-preserving; see docs/http-api.md.")
    ]


class SupportedSize(BaseModel):
    """A size that the server decodes."""

    output: Annotated[Pair, Field(description="Size of the image in pixels, [height, width].")]
    latent: Annotated[Pair, Field(description="Size of the latent in cells, [height, width].")]


class CaptionShape(BaseModel):
    """The shape of a caption embedding, [tokens, width]."""

    tokens: Annotated[int, Field(description="0 if the decoder has no captions.")]
    width: int


class TextEncoder(BaseModel):
    """The model that encodes prompts."""

    name: str
    device: str
    identity: Annotated[str, Field(description="Hash of all that determines an embedding.")]
    prefix_tokens: Annotated[int, Field(description="Tokens before those of each prompt.")]
    prompts_per_batch: int
    cache_bytes: int
    disk_cache_bytes: Annotated[int | None, Field(description="Null without a directory.")]


class RequestLimits(BaseModel):
    """Limits of requests and of the queue."""

    images_per_request: int
    body_bytes: int
    pending_bytes: int
    queue_images: int
    queue_seconds: float
    interactive_share: float
    standard_share: float
    batch_share: float
    deadline_seconds: Annotated[float, Field(description="The default of the option deadline_ms.")]
    max_deadline_seconds: float


class StageCost(BaseModel):
    """Estimated time of one stage of a decode."""

    stage: CostStage
    decoder: Annotated[str | None, Field(description="Name of the decoder; null for the stage caption.")]
    size: Annotated[Pair | None, Field(description="Size of the image; null for the stages caption and restore.")]
    tile: Annotated[
        Pair | None,
        Field(description="Size of the tiles of an image in tiles, of which a step costs one; null for other images."),
    ]
    batch: int
    encoding: Annotated[str, Field(description="Such as png-fast or webp; empty for other stages than encode.")]
    seconds: float


class MemoryPart(BaseModel):
    """Memory of a device that was planned before the decoders were loaded."""

    device: Annotated[str, Field(description="Such as cuda:0.")]
    part: Annotated[
        Part, Field(description="Weights; buffers of the slots, of images in tiles, and of everything else.")
    ]
    decoder: Annotated[str | None, Field(description="Name of the decoder; null for what decoders share.")]
    bytes: int


class KernelTime(BaseModel):
    """Measurement of one implementation of an operation."""

    name: str
    seconds: Annotated[float | None, Field(description="Null if it is not usable on the device.")]
    error: Annotated[float | None, Field(description="Relative error; null if it is not a number, or not measured.")]


class KernelChoice(BaseModel):
    """The implementation that was chosen for one operation of the decoder when the server started."""

    operation: str
    shape: str
    chosen: Annotated[str | None, Field(description="Null: the default of PyTorch.")]
    measured: list[KernelTime]


class Decoder(BaseModel):
    """A decoder of the server, and what requests for it may contain."""

    name: Annotated[str, Field(description="The value of the option decoder.")]
    model: Annotated[str, Field(description="The model that was built into the bundle, such as flux-2k.")]
    latent_space: LatentSpace
    upscale: Annotated[int, Field(description="Factor between the sides of the VAE's image and of the decoded image.")]
    sizes: list[SupportedSize]
    max_pixels: Annotated[
        int | None, Field(description="Largest area of an image that is decoded in tiles; null without tiles.")
    ]
    caption: CaptionShape
    images_per_step: Annotated[int, Field(description="Maximum number of images that share a step.")]
    precision: str
    runtime: str
    device: str
    notes: Annotated[list[str], Field(description="Warnings that were recorded when the bundle was built.")]
    kernels: Annotated[
        list[KernelChoice], Field(description="Choices on the first GPU; empty on the CPU and for TensorRT engines.")
    ]


class Info(BaseModel):
    """The decoders, their sizes and memory, the limits of the server and the measured cost of each stage."""

    decoders: Annotated[list[Decoder], Field(min_length=1)]
    text_encoder: Annotated[TextEncoder | None, Field(description="Null if the server accepts no prompts.")]
    image_formats: Annotated[list[str], Field(description="Formats that this server can write.")]
    devices: Annotated[int, Field(description="Number of devices, each of which has all decoders.")]
    resident: Annotated[
        int | None,
        Field(description="Maximum number of decoders whose weights are on a device at once; null: all."),
    ]
    memory: Annotated[
        list[MemoryPart],
        Field(description="Planned memory of the devices, without the working memory of the steps."),
    ]
    limits: RequestLimits
    costs: list[StageCost]


class _ClientSchema(GenerateJsonSchema):
    """Schemas for clients, which leave out a member that is not set.

    They have no defaults: some generated clients send them, and the server rejects an option that is set to two
    different values in the query and in the body. The value null is left out for the same reason.
    """

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def client_schema(model: type[BaseModel], mode: JsonSchemaMode = "validation") -> dict[str, Any]:
    """Return the schema of a model as clients use it; its `$defs` are those of other models, by name."""
    return model.model_json_schema(ref_template=SCHEMA_REF, schema_generator=_ClientSchema, mode=mode)
