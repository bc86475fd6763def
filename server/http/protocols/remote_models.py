"""Parameters and JSON bodies of diffusers' `remote_decode` as typed models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _read_shape(value: object) -> object:
    """Read `1,16,64,64`, or a list whose items may be text; other values are left to pydantic."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list):
        return items
    return tuple(int(item) if isinstance(item, str) else item for item in items)


class Parameters(BaseModel):
    """Parameters of a request; each description completes the sentence "The option … must be …"."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    shape: Annotated[
        tuple[int, ...],
        BeforeValidator(_read_shape, json_schema_input_type=list[int]),
        Field(max_length=8, description="the integers of the tensor's shape, each as one parameter shape"),
    ] = ()
    dtype: Annotated[str, Field(description="float16, bfloat16 or float32")] = ""
    scaling_factor: Annotated[float | None, Field(allow_inf_nan=False, description="a finite number")] = None
    """Scaling factor by which the latent is normalised; without it, the latent is raw unless `do_scaling` is true."""
    shift_factor: Annotated[float | None, Field(allow_inf_nan=False, description="a finite number")] = None
    """Shift by which the latent is normalised, with `scaling_factor`."""
    do_scaling: Annotated[bool | None, Field(description="true or false")] = None
    """Whether the latent is normalised if there is no `scaling_factor`."""
    output_type: Annotated[Literal["pil", "pt"], Field(description="pil or pt; this server decodes no videos")] = "pil"
    """Send an image or a tensor, unless the Accept header decides."""
    image_format: Annotated[Literal["png", "jpg", "jpeg"], Field(description="png or jpg")] = "jpg"
    partial_postprocess: Annotated[bool, Field(description="true or false")] = False
    """Send uint8 [B, H, W, 3] instead of float16 [B, 3, H, W] in [-1, 1]."""
    input_tensor_type: Annotated[Literal["binary", "base64"], Field(description="binary or base64")] = "binary"
    output_tensor_type: Annotated[Literal["binary", "base64"], Field(description="binary or base64")] = "binary"


class RemoteBody(BaseModel):
    """A tensor in base64, and its parameters, some of which may be in the query."""

    inputs: Annotated[
        str,
        Field(description="Elements in little-endian byte order, as base64.", json_schema_extra={"format": "byte"}),
    ]
    parameters: Parameters = Parameters()


class RemoteTensor(BaseModel):
    """The shape and dtype of a tensor."""

    shape: list[int]
    dtype: str


class RemoteImages(BaseModel):
    """A tensor of pixels in base64."""

    inputs: Annotated[str, Field(description="The elements as base64.", json_schema_extra={"format": "byte"})]
    parameters: RemoteTensor
