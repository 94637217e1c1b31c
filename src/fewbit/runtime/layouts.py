"""Which kernel serves which weight: a hand-written table, first row that accepts wins.

A layout is how a weight lies in memory for one kernel. It is derived when a weight is loaded and gives back exactly what it was made of; disk
holds canonical layouts only. Adding one is a file in `kernels/` and one row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fewbit.base.errors import InputError
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme
from fewbit.runtime.kernels import direct, gpu, int4, int8, packed

Held = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """One kernel and the form of weights that it reads.

    Attributes:
        name: for `kernel=` and reports.
        accepts: (scheme, shape, device) -> None, or why not.
        to_layout: (q, compute dtype) -> named tensors.
        from_layout: (scheme, shape, tensors) -> q, exactly.
        matmul: (x [tokens, cols], tensors, scheme, shape) -> [tokens, rows] in x's dtype, without the weight's sides.
        quantises_inputs: whether the product itself quantises x as the scheme says.
        sixteen: whether it is made for 16-bit activations: passed over for others unless it is named.
    """

    name: str
    accepts: Callable[[Scheme, tuple[int, ...], torch.device], str | None]
    to_layout: Callable[[QTensor, torch.dtype], dict[str, torch.Tensor]]
    from_layout: Callable[[Scheme, tuple[int, ...], Held], QTensor]
    matmul: Callable[..., torch.Tensor]
    quantises_inputs: bool = False
    sixteen: bool = False


LAYOUTS: tuple[Layout, ...] = (
    Layout("w8a8", int8.accepts_dynamic, int8.to_layout, int8.from_layout, int8.matmul_dynamic, quantises_inputs=True),
    Layout("int4", int4.accepts, int4.to_layout, int4.from_layout, int4.matmul, sixteen=True),
    Layout("direct", direct.accepts, direct.to_layout, direct.from_layout, direct.matmul),
    Layout("int8", int8.accepts, int8.to_layout, int8.from_layout, int8.matmul, sixteen=True),
    Layout("triton", gpu.accepts, gpu.to_layout, gpu.from_layout, gpu.matmul),
    Layout("packed", packed.accepts, packed.to_layout, packed.from_layout, packed.matmul),
)


def choose(
    scheme: Scheme,
    shape: tuple[int, ...],
    device: torch.device,
    kernel: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Layout:
    """The layout for a weight: the one named, else the first that accepts it and is made for activations of `dtype`.

    Raises:
        InputError: FB-E0903 for an unknown kernel or one that refuses, with every reason.
    """
    named = [layout for layout in LAYOUTS if kernel in (None, layout.name)]
    if not named:
        raise InputError(
            "FB-E0903", f"no kernel is called {kernel!r}; there are {', '.join(row.name for row in LAYOUTS)}"
        )
    reasons = []
    for layout in named:
        if kernel is None and layout.sixteen and dtype.itemsize != 2:
            continue
        reason = layout.accepts(scheme, shape, device)
        if reason is None:
            return layout
        reasons.append(f"{layout.name} {reason}")
    raise InputError("FB-E0903", f"no kernel for {scheme} of {tuple(shape)}: {'; '.join(reasons)}")
