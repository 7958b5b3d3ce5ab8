"""How base weights are stored: the protocols, the dense store and the bitsandbytes stores."""

from .store import Quantizer, WeightStore

__all__ = ["Quantizer", "WeightStore"]
