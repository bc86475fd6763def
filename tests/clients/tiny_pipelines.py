"""Pipelines of diffusers with tiny random networks, but latents and channels as in the real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

HEIGHT, WIDTH = 64, 96  # of the image that the VAE decodes; tests.clients.latent_server supports this size
TOKENS, FEATURES = 6, 32  # of the prompt embeddings


@dataclass(frozen=True)
class Pipeline:
    """A pipeline and what it is called with."""

    pipe: Any
    latent_space: str
    embeddings: Callable[[int], dict[str, Any]]  # arguments for a number of prompts
    calls_per_step: int = 1  # of the network; 2 if classifier-free guidance is not one batch
    arguments: dict[str, Any] = field(default_factory=dict)
    packed: bool = False

    @property
    def network(self) -> torch.nn.Module:
        return self.pipe.unet if self.latent_space == "sdxl" else self.pipe.transformer

    @property
    def size(self) -> dict[str, int]:
        """Return the arguments height and width for packed latents."""
        return {"height": HEIGHT, "width": WIDTH} if self.packed else {}

    def run(self, prompts: int = 1, **arguments: Any) -> Any:
        """Run the pipeline with the same noise and prompts each time."""
        generator = torch.Generator().manual_seed(5)
        size = {"height": HEIGHT, "width": WIDTH}
        return self.pipe(**{**self.embeddings(prompts), **size, **self.arguments, "generator": generator, **arguments})


def random(prompts: int, *shape: int, seed: int = 3) -> torch.Tensor:
    """Return one random tensor per prompt, the same in each run."""
    return torch.randn(prompts, *shape, generator=torch.Generator().manual_seed(seed))


def autoencoder(channels: int, scale: float, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        latent_channels=channels,
        scaling_factor=scale,
        shift_factor=shift,
        mid_block_add_attention=False,
    )


def flow(shift: float = 3.0, **options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shift, **options)


def flux() -> Pipeline:
    transformer = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = FluxPipeline(
        flow(use_dynamic_shifting=True), autoencoder(16, 0.3611, 0.1159), None, None, None, None, transformer
    )

    def embeddings(prompts: int) -> dict[str, Any]:
        return {"prompt_embeds": random(prompts, TOKENS, FEATURES), "pooled_prompt_embeds": random(prompts, 8)}

    return Pipeline(pipe, "flux", embeddings, packed=True)


def flux2_networks(guidance: bool) -> tuple[AutoencoderKLFlux2, Flux2Transformer2DModel]:
    transformer = Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    vae = AutoencoderKLFlux2(block_out_channels=(4,) * 4, norm_num_groups=2, mid_block_add_attention=False)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.2, 4)
    return vae.eval(), transformer


def flux2() -> Pipeline:
    vae, transformer = flux2_networks(guidance=True)
    pipe = Flux2Pipeline(flow(use_dynamic_shifting=True), vae, None, None, transformer)
    return Pipeline(pipe, "flux2", lambda n: {"prompt_embeds": random(n, TOKENS, FEATURES)}, packed=True)


def flux2_klein() -> Pipeline:
    vae, transformer = flux2_networks(guidance=False)
    pipe = Flux2KleinPipeline(flow(use_dynamic_shifting=True), vae, None, None, transformer)

    def embeddings(prompts: int) -> dict[str, Any]:
        negative = random(prompts, TOKENS, FEATURES, seed=4)
        return {"prompt_embeds": random(prompts, TOKENS, FEATURES), "negative_prompt_embeds": negative}

    return Pipeline(pipe, "flux2", embeddings, calls_per_step=2, packed=True)


def sd3() -> Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        caption_projection_dim=32,
        pooled_projection_dim=8,
    )
    vae = autoencoder(16, 1.5305, 0.0609)
    pipe = StableDiffusion3Pipeline(transformer, flow(), vae, None, None, None, None, None, None)

    def embeddings(prompts: int) -> dict[str, Any]:
        return {
            "prompt_embeds": random(prompts, TOKENS, FEATURES),
            "pooled_prompt_embeds": random(prompts, 8),
            "negative_prompt_embeds": random(prompts, TOKENS, FEATURES, seed=4),
            "negative_pooled_prompt_embeds": random(prompts, 8, seed=4),
        }

    return Pipeline(pipe, "sd3", embeddings)


def sdxl(scheduler: Any = None) -> Pipeline:
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + 8,
        cross_attention_dim=FEATURES,
        norm_num_groups=2,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = scheduler or EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **betas)
    vae = autoencoder(4, 0.13025)
    pipe = StableDiffusionXLPipeline(vae, None, None, None, None, unet, scheduler, add_watermarker=False)
    text = sd3().embeddings

    def embeddings(prompts: int) -> dict[str, Any]:
        # The network does not remove noise; with less of it, tests.clients.latent_server can show the latents.
        return {**text(prompts), "latents": 0.1 * random(prompts, 4, HEIGHT // 8, WIDTH // 8)}

    return Pipeline(pipe, "sdxl", embeddings)


def qwenimage() -> Pipeline:
    transformer = QwenImageTransformer2DModel(
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe = QwenImagePipeline(flow(use_dynamic_shifting=True, shift_terminal=0.02), vae, None, None, transformer)

    def embeddings(prompts: int) -> dict[str, Any]:
        mask = torch.ones(prompts, TOKENS, dtype=torch.long)
        return {
            "prompt_embeds": random(prompts, TOKENS, FEATURES),
            "prompt_embeds_mask": mask,
            "negative_prompt_embeds": random(prompts, TOKENS, FEATURES, seed=4),
            "negative_prompt_embeds_mask": mask,
        }

    return Pipeline(pipe, "qwenimage", embeddings, calls_per_step=2, arguments={"true_cfg_scale": 2.0}, packed=True)


def z_image() -> Pipeline:
    transformer = ZImageTransformer2DModel(
        dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=FEATURES, axes_dims=[4, 6, 6]
    )
    pipe = ZImagePipeline(flow(), autoencoder(16, 0.3611, 0.1159), None, None, transformer)

    def embeddings(prompts: int) -> dict[str, Any]:
        return {
            "prompt_embeds": list(random(prompts, TOKENS, FEATURES)),
            "negative_prompt_embeds": list(random(prompts, TOKENS, FEATURES, seed=4)),
        }

    return Pipeline(pipe, "flux", embeddings)


PIPELINES: dict[str, Callable[[], Pipeline]] = {
    "FLUX.1": flux,
    "FLUX.2": flux2,
    "FLUX.2 klein": flux2_klein,
    "SD3": sd3,
    "SDXL": sdxl,
    "Qwen-Image": qwenimage,
    "Z-Image": z_image,
}


def create(name: str) -> Pipeline:
    """Create a pipeline with the same weights each time."""
    torch.manual_seed(0)
    pipeline = PIPELINES[name]()
    pipeline.pipe.set_progress_bar_config(disable=True)
    return pipeline
