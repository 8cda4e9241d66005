"""Falcon Mamba (arXiv 2410.05355): Mamba with normed B, C and dt, in transformers' checkpoint format."""

from typing import Any

from models.config import Epsilon
from models.decoder import Decoder
from models.mixers import mamba
from models.mixers.mamba import NAMES

__all__ = ["NAMES", "Config", "build"]


class Config(mamba.Config):
    mixer_rms_eps: Epsilon = 1e-6


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, mamba.decoder(c, c.mixer_rms_eps)
