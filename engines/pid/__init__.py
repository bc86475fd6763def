"""The PiD network as pure functions of tensors: configuration, blocks, sampler, folding and checkpoints."""

from engines.pid.checkpoint import load_checkpoint
from engines.pid.config import PidConfig
from engines.pid.fold import FoldedDecoder, fold
from engines.pid.network import Conditioning, PidDecoder
from engines.pid.released import released
from engines.pid.sampler import NoiseSource, sample

__all__ = [
    "Conditioning",
    "FoldedDecoder",
    "NoiseSource",
    "PidConfig",
    "PidDecoder",
    "fold",
    "load_checkpoint",
    "released",
    "sample",
]
