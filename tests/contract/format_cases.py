"""What the format tests share: random quantised tensors of any scheme, awkward shapes, exact comparison, a checkpoint in memory."""

from __future__ import annotations

from math import prod

import torch

from fewbit.base.manifest import Manifest, TensorInfo, data_bytes
from fewbit.formats.table import Assignment, Format, Stored
from fewbit.formats.words import SAFETENSORS_DTYPE
from fewbit.num.grid import F32, Codebook, FloatGrid, IntGrid, VectorGrid
from fewbit.num.qtensor import QTensor, code_dtype, native_dtype
from fewbit.num.scheme import Scheme, parse_scheme, presets

INTEGERS = [
    f"int{bits}-{blocks}{scale}{zero}"
    for bits in range(2, 9)
    for blocks in ("tensor", "channel", "g32", "g64", "g128")
    for scale in (("", "-bf16", "-f32") if bits in (3, 4, 8) else ("", "-bf16"))
    for zero in ("", "-asym")
]
SPELLINGS = [
    *INTEGERS, *(f"uint{bits}-g{group}-min" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    *(f"uint{bits}-g{group}-bf16-min{{bf16}}" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    "int8-channel+int8-token", "int8-channel-asym+int8-token", "int8-tensor+int8-tensor-static", "int4-g128+int8-token",
    "int4-channel+int8-token", "int4-g128+fp8-e4m3-tensor-static", "int4-g64-bf16+fp8-e4m3-tensor-static", "fp8-e4m3-tensor", "fp8-e4m3-channel", "fp8-e4m3-block128", "fp8-e4m3-tensor-bf16",
    "fp8-e4m3-channel+fp8-e4m3-token", "fp8-e4m3-tensor+fp8-e4m3-tensor", "fp8-e4m3-tensor+fp8-e4m3-tensor-static",
    "fp8-e4m3-block128+fp8-e4m3-g128", "fp8-e4m3-channel-bf16+fp8-e4m3-token", "fp8-e5m2-tensor", "fp8-e4m3-channel-f16",
    "mxfp4", "mxfp8", "mxfp6-e2m3", "mxfp6-e3m2", "nvfp4", "mxfp4+mxfp4", "mxfp8+mxfp8", "mxfp4+mxfp8", "nvfp4+nvfp4-static",
    "fp4-g16-fp8-e4m3", "fp8-e4m3-block128-e8m0+fp8-e4m3-g128", *(f"uint{bits}-g64-f32-min{{f32}}" for bits in (2, 4, 8)),
    "nf4-g64", "nf4-flat64", "nf4-flat64-dq", "nf4-flat128-dq", "bnbfp4-flat64", "bnbfp4-flat64-dq", "nf4-g64-dq", "int8-channel-f32",
    *(f"int{bits}-g64-asym{{f16}}" for bits in (1, 2, 3, 4, 8)), *(f"int{bits}-g64-bf16-asym{{bf16}}" for bits in (2, 4)),
    *presets(), "bf16", "f16", "f32",
]  # fmt: skip
SCHEMES = list(dict.fromkeys(parse_scheme(text) for text in SPELLINGS))
SHAPES = [
    (1, 256),
    (3, 128),
    (7, 100),
    (8, 384),
    (33, 64),
    (160, 256),
    (256, 512),
    (129, 200),
    (2, 6, 128),
    (3, 32, 256),
]


def random_qtensor(scheme: Scheme, shape: tuple[int, ...], seed: int = 0) -> QTensor:
    """A quantised tensor with random legal codes and plausible scales; reciprocal pairs for global scales, as fitting makes them."""
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(scheme, shape, generator)
    parts = {name: random_stored(part, scheme.block_counts(shape), generator, name) for name, part in scheme.parts()}
    sides = {"input_scale": torch.tensor([0.0625])} if scheme.static else {}
    return QTensor(scheme, shape, codes, **parts, sides=sides)


def random_codes(scheme: Scheme, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    grid = scheme.grid
    counts = scheme.block_counts(shape) if scheme.is_leaf else shape
    if isinstance(grid, IntGrid):
        return torch.randint(grid.low, grid.high + 1, counts, generator=generator).to(code_dtype(grid))
    if isinstance(grid, Codebook):
        return torch.randint(0, len(grid.table), counts, generator=generator).to(torch.uint8)
    if isinstance(grid, VectorGrid):
        counts = (*counts[:-1], -(-counts[-1] // grid.dim))
        return torch.randint(0, 1 << min(grid.bits, 30), counts, generator=generator).to(torch.int32)
    if grid.bits > 8:
        return torch.randn(counts, generator=generator).to(native_dtype(grid)).view(code_dtype(grid))
    legal = torch.tensor(
        [code for code, level in enumerate(grid.levels().tolist()) if abs(level) < 1e30], dtype=torch.uint8
    )
    return legal[torch.randint(0, len(legal), counts, generator=generator)]


def random_stored(
    part: Scheme, counts: tuple[int, ...], generator: torch.Generator, name: str
) -> torch.Tensor | QTensor:
    if not part.is_leaf:
        codes = random_codes(part, counts, generator)
        if isinstance(part.grid, FloatGrid):
            codes = (codes & 0x7F).clamp(1, 0x7E)  # scales are positive
        inner = {word: random_stored(below, part.block_counts(counts), generator, word) for word, below in part.parts()}
        return QTensor(part, counts, codes, **inner)
    entries = part.block_counts(counts)
    if isinstance(part.grid, IntGrid):
        return random_codes(part, counts, generator)
    uniform = torch.rand(entries, generator=generator)
    if part.grid.name == "e8m0":
        return (uniform * 20 + 110).to(torch.uint8).view(torch.float8_e8m0fnu)
    if entries[-2:] == (1, 1) and part.grid == F32 and name == "scale":
        return (uniform * 1e4 + 10).reciprocal()
    values = (
        torch.exp(uniform * 5 - 8) if name == "scale" else uniform * 4 - 2 if name == "value_shift" else uniform * 15
    )
    return values.to(native_dtype(part.grid))


def differences(a: QTensor, b: QTensor, where: str = "") -> list[str]:
    """Every way in which two quantised tensors are not the same; empty when they are equal to the bit."""
    found = []
    if a.scheme != b.scheme or tuple(a.shape) != tuple(b.shape):
        found.append(f"{where}: {a.scheme} of {a.shape} became {b.scheme} of {b.shape}")
    mine, theirs = a.named_parts(), b.named_parts()
    if mine.keys() != theirs.keys():
        return [*found, f"{where}: parts {sorted(mine)} became {sorted(theirs)}"]
    for name, tensor in mine.items():
        other = theirs[name]
        if tensor.dtype != other.dtype or not torch.equal(bits_of(tensor), bits_of(other)):
            found.append(
                f"{where}{name}: {tensor.dtype} {tuple(tensor.shape)} became {other.dtype} {tuple(other.shape)}"
            )
    return found


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that NaN equals NaN and -0 differs from 0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def manifest_of(tensors: dict[str, torch.Tensor]) -> Manifest:
    """The manifest of a checkpoint that holds these tensors."""
    infos = {}
    for name, tensor in tensors.items():
        dtype, shape = SAFETENSORS_DTYPE[tensor.dtype], tuple(tensor.shape)
        infos[name] = TensorInfo(name, dtype, shape, data_bytes(dtype, shape), "model.safetensors")
    return Manifest(infos)


def as_found(
    target: Format, q: QTensor, name: str, kept: tuple[str, ...] = ()
) -> tuple[dict[str, torch.Tensor], Stored]:
    """The stored tensors of one weight, and how `detect` finds it in a checkpoint of the format."""
    tensors = target.encode(name, q)
    source = {"hidden_size": q.shape[-1], "intermediate_size": q.shape[-2], "torch_dtype": "bfloat16"}
    stacks = {name: tuple(q.shape)} if len(q.shape) > 2 else {}
    written, _ = target.config(source, Assignment({name: q.scheme}, kept, stacks=stacks))
    found = target.detect(written, manifest_of(tensors))
    assert found is not None and name in found, f"{target.name} does not recognise {name} of {sorted(tensors)}"
    assert prod(found[name].shape) == prod(q.shape)
    return tensors, found[name]
