"""Files of adapters of diffusion models: read into one neutral form, and written from it.

`read`, `write`, `detect` and `convert` are all that is needed; docs/formats.md has what each format holds. Importing this
package imports torch, and none of diffusers, transformers and peft.
"""

from .base import Format
from .conversion import Conversion, convert
from .factors import Factors, LohaFactors, LokrFactors, LoraFactors
from .families import FAMILIES, family_of
from .low_rank import low_rank, truncated
from .peft_layers import PeftForm, as_peft
from .portable import PortableAdapter
from .registry import detect, read, specs, write
from .source import Source

__all__ = [
    "FAMILIES",
    "Conversion",
    "Factors",
    "Format",
    "LohaFactors",
    "LokrFactors",
    "LoraFactors",
    "PeftForm",
    "PortableAdapter",
    "Source",
    "as_peft",
    "convert",
    "detect",
    "family_of",
    "low_rank",
    "read",
    "specs",
    "truncated",
    "write",
]
