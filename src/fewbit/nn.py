"""Low-bit layers for people who stay in PyTorch.

from fewbit.nn import QuantLinear, quantize_

quantize_(model, "nf4-g64-dq")
"""

from fewbit.runtime.linear import QuantLinear
from fewbit.runtime.replace import Replaced, quantize_

__all__ = ["QuantLinear", "Replaced", "quantize_"]
