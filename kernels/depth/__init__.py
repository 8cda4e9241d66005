"""Operations of adaptive depth: low-rank updates by depth, routing, and the confidence of a prediction."""

from kernels.depth.lora import depth_lora, depth_lora_naive

__all__ = ["depth_lora", "depth_lora_naive"]
