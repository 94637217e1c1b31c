"""The vector grids that schemes can name: one row each. Their tables are read at first use (see `tables.py`)."""

from __future__ import annotations

from fewbit.num.grid import VectorGrid

# ggml's i-quants. dim weights per code; index bits per magnitude vector; sign bits; magnitude vectors per code.
VECTOR_GRIDS: dict[str, VectorGrid] = {
    grid.name: grid
    for grid in (
        VectorGrid("iq2xxs", dim=8, index_bits=8, sign_bits=7),
        VectorGrid("iq2xs", dim=8, index_bits=9, sign_bits=7),
        VectorGrid("iq2s", dim=8, index_bits=10, sign_bits=8),
        VectorGrid("iq3xxs", dim=8, index_bits=8, sign_bits=7, parts=2),
        VectorGrid("iq3s", dim=8, index_bits=9, sign_bits=8, parts=2),
        VectorGrid("iq1", dim=8, index_bits=11, sign_bits=0),
        VectorGrid("iq1m", dim=8, index_bits=12, sign_bits=0),  # the top index bit takes 1/8 away instead of adding it
    )
}
