"""The RWKV-7 model, and its time mix and channel mix as layers for other networks."""

from src.config import ModelConfig
from src.model.layers import Block, ChannelMix, TimeMix
from src.model.rwkv7 import RWKV7
from src.model.state import LayerState, State

__all__ = ["RWKV7", "Block", "ChannelMix", "LayerState", "ModelConfig", "State", "TimeMix"]
