"""A diffusion model as the image generator (StableLLaVA used SDXL base 1.0). Needs ``pip install diffusers``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vlit.errors import ConfigError
from vlit.registry import GENERATORS
from vlit.synth.engine.images import GeneratorConfig, ImageGenerator


@GENERATORS.register("diffusers")
class DiffusersConfig(GeneratorConfig):
    """Any text-to-image pipeline that diffusers loads."""

    type: str = "diffusers"
    model: str
    """Folder of the pipeline, for example a copy of stabilityai/stable-diffusion-xl-base-1.0. Only safetensors are loaded."""
    steps: Annotated[int, Field(ge=1)] = 30
    guidance: Annotated[float, Field(ge=0)] = 7.0
    side: Annotated[int, Field(ge=64)] = 768
    """Pixels of both sides."""
    negative_prompt: str = "blurry, distorted, watermark, text"
    device: str = "cuda"

    def build(self, **kwargs: Any) -> DiffusersGenerator:
        """The generator. ConfigError when diffusers is not installed or the folder is missing."""
        try:
            import diffusers  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "generator diffusers: the package is not installed. Run: pip install diffusers"
            ) from error
        if not Path(self.model).is_dir():
            raise ConfigError(f"generator.model: {self.model} is not a folder. Download the pipeline first.")
        return DiffusersGenerator(self)


class DiffusersGenerator(ImageGenerator):
    """The pipeline is loaded with the first picture."""

    abilities = "photo"

    def __init__(self, config: DiffusersConfig) -> None:
        self.config = config
        self._pipeline: Any = None

    def generate(self, prompt: str, target: Path, *, seed: int) -> None:
        import torch
        from diffusers import AutoPipelineForText2Image

        config = self.config
        if self._pipeline is None:
            dtype = torch.float32 if config.device == "cpu" else torch.bfloat16
            self._pipeline = AutoPipelineForText2Image.from_pretrained(
                config.model, torch_dtype=dtype, use_safetensors=True, local_files_only=True
            ).to(config.device)
        picture = self._pipeline(
            prompt, negative_prompt=config.negative_prompt, num_inference_steps=config.steps, guidance_scale=config.guidance,
            height=config.side, width=config.side, generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]  # fmt: skip
        picture.save(target)
