"""MaxViT's door to `isa_triton.models.timm`."""

from .timm import accelerate, restore

__all__ = ["accelerate", "restore"]
