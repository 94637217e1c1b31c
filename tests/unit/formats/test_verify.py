"""verify finds every fault that no loader reports: each is planted in a good checkpoint, and the good one passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.base.errors import QualityError
from fewbit.eval.findings import Verified
from fewbit.eval.verify import verify
from fewbit.formats.table import Assignment, format_named
from fewbit.math.scales import Search, quantize
from fewbit.num.scheme import parse_scheme

Tensors = dict[str, torch.Tensor]
CONFIG = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 96, "num_local_experts": 4, "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (128, 128),
    **{f"mlp.experts.{e}.{p}": s for e in range(4) for p, s in (("up_proj", (64, 128)), ("down_proj", (128, 64)))},
}
Q = "model.layers.1.self_attn.q_proj"
EXPERT = "model.layers.1.mlp.experts.2.up_proj"


def float_model() -> Tensors:
    generator = torch.Generator().manual_seed(7)
    tensors = {
        "model.embed_tokens.weight": torch.randn(96, 128, generator=generator),
        "lm_head.weight": torch.randn(96, 128, generator=generator),
    }
    for layer in range(2):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(128)
        for module, shape in SHAPES.items():
            skew = torch.rand(shape[0], 1, generator=generator) * 0.1  # rows off centre, so zero points differ
            tensors[f"model.layers.{layer}.{module}.weight"] = torch.randn(shape, generator=generator) * 0.05 + skew
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def write(folder: Path, tensors: Tensors, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("base"), float_model(), CONFIG)


def quantised(format_name: str, spelling: str, skip: tuple[str, ...] = ()) -> tuple[Tensors, dict]:
    """The model in a format, as stored tensors and config."""
    target = format_named(format_name)
    scheme = target.conform(parse_scheme(spelling), "BF16")
    stored, schemes, kept = {}, {}, []
    for name, tensor in float_model().items():
        if ".layers." in name and tensor.dim() == 2 and name not in skip:
            schemes[name] = scheme
            stored |= target.encode(name, quantize(scheme, tensor.float(), search=Search(method="absmax")))
        else:
            stored[name] = tensor
            kept += [name] if tensor.dim() == 2 and name not in skip else []
    config, _ = target.config(CONFIG, Assignment(schemes, tuple(kept)))
    return stored, config


FORMATS = [
    ("compressed-tensors", "int4-g32-asym"), ("compressed-tensors", "fp8-e4m3-channel"), ("compressed-tensors", "nvfp4"), ("gptq", "int4-g32"),
    ("gptq-v2", "int3-g32-asym"), ("awq", "int4-g32-asym"), ("bitsandbytes", "nf4-flat64-dq"), ("fp8", "fp8-e4m3-block128"),
    ("modelopt", "nvfp4"), ("mlx", "uint4-g32-min"), ("hqq", "int4-g32-asym{f16}"), ("auto-round", "int4-g32"),
]  # fmt: skip


@pytest.mark.parametrize(("format_name", "spelling"), FORMATS)
def test_good_checkpoints_pass(format_name: str, spelling: str, base: Path, tmp_path: Path) -> None:
    found = verify(write(tmp_path, *quantised(format_name, spelling)), base)
    assert found.ok, found.findings
    assert found.format == format_name and found.weights == 2 * len(SHAPES) and len(found.compared) == found.weights
    assert all(abs(one.sqnr_db - one.expected_db) < 3 for one in found.compared), found.compared[:3]
    json.dumps(found.record())
    found.require()


def faulty(
    fault: Callable[[Tensors, dict], None],
    base: Path,
    folder: Path,
    *,
    form: str = "compressed-tensors",
    spelling: str = "int4-g32-asym",
) -> Verified:
    tensors, config = quantised(form, spelling)
    fault(tensors, config)
    found = verify(write(folder, tensors, config), base)
    assert not found.ok, "the fault was not found"
    with pytest.raises(QualityError, match="FB-E0820"):
        found.require()
    return found


def test_missing_scale(base: Path, tmp_path: Path) -> None:
    found = faulty(lambda tensors, _: tensors.pop(f"{Q}.weight_scale"), base, tmp_path)
    assert found.findings[0].kind == "config" and found.findings[0].tensor == f"{Q}.weight_scale"


def test_missing_packed_weight(base: Path, tmp_path: Path) -> None:
    found = faulty(lambda tensors, _: tensors.pop(f"{Q}.weight_packed"), base, tmp_path)
    assert found.findings[0].kind == "config" and found.findings[0].tensor == f"{Q}.weight_packed"


def test_swapped_zero_points(base: Path, tmp_path: Path) -> None:
    def swap(tensors: Tensors, _: dict) -> None:
        tensors[f"{Q}.qzeros"] = tensors[f"{Q}.qzeros"].flip(1)

    found = faulty(swap, base, tmp_path, form="gptq-v2")
    assert [(f.kind, f.tensor) for f in found.findings] == [("source", f"{Q}.weight")]


def test_one_wrong_scale(base: Path, tmp_path: Path) -> None:
    """One group of 512, too little to show in the whole tensor's noise."""

    def swap(tensors: Tensors, _: dict) -> None:
        tensors[f"{Q}.weight_scale"][17, 2] *= 2.2

    found = faulty(swap, base, tmp_path)
    assert [(f.kind, f.tensor) for f in found.findings] == [("source", f"{Q}.weight")] and "block" in found.findings[
        0
    ].message


@pytest.mark.parametrize(("spelling", "kind"), [("int4-g32", "codes"), ("int4-g32-asym", "source")])
def test_version_confusion(spelling: str, kind: str, base: Path, tmp_path: Path) -> None:
    def lie(_: Tensors, config: dict) -> None:
        config["quantization_config"]["checkpoint_format"] = "gptq"

    assert {f.kind for f in faulty(lie, base, tmp_path, form="gptq-v2", spelling=spelling).findings} == {kind}


def test_wrong_nibble_order(base: Path, tmp_path: Path) -> None:
    def swap(tensors: Tensors, _: dict) -> None:
        words = tensors[f"{Q}.weight_packed"]
        tensors[f"{Q}.weight_packed"] = ((words & 0x0F0F0F0F) << 4) | ((words >> 4) & 0x0F0F0F0F)

    assert faulty(swap, base, tmp_path).findings[0].kind == "source"


@pytest.mark.parametrize(
    ("form", "spelling"),
    [("compressed-tensors", "int4-g32-asym"), ("compressed-tensors", "fp8-e4m3-channel"), ("gptq-v2", "int4-g32-asym"), ("awq", "int4-g32-asym")],
)  # fmt: skip
def test_transposed_scales(form: str, spelling: str, base: Path, tmp_path: Path) -> None:
    name = f"{Q}.weight_scale" if form == "compressed-tensors" else f"{Q}.scales"

    def turn(tensors: Tensors, _: dict) -> None:
        tensors[name] = tensors[name].T.contiguous()

    assert faulty(turn, base, tmp_path, form=form, spelling=spelling).findings[0].kind == "config"


def test_transposed_scales_of_the_right_shape(base: Path, tmp_path: Path) -> None:
    def turn(tensors: Tensors, _: dict) -> None:
        scales = tensors[f"{Q}.weight_scale"]
        tensors[f"{Q}.weight_scale"] = scales.T.reshape(scales.shape).contiguous() * torch.linspace(
            0.5, 2, scales.shape[0]
        )[:, None].to(scales.dtype)

    assert faulty(turn, base, tmp_path).findings[0].kind == "source"


def test_truncated_shard(base: Path, tmp_path: Path) -> None:
    place = write(tmp_path, *quantised("gptq", "int4-g32"))
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    found = verify(place, base)
    assert [f.kind for f in found.findings] == ["opens"]


@pytest.mark.parametrize(
    ("form", "part"), [("compressed-tensors", f"{Q}.weight_scale"), ("awq", f"{Q}.scales"), ("mlx", f"{Q}.biases")]
)
def test_nan_in_one_scale(form: str, part: str, base: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors, _: dict) -> None:
        tensors[part].view(-1)[5] = float("nan")

    found = faulty(spoil, base, tmp_path, form=form, spelling="uint4-g32-min" if form == "mlx" else "int4-g32-asym")
    assert [(f.kind, f.tensor) for f in found.findings] == [("finite", f"{Q}.weight")]


def test_nan_in_a_kept_tensor(base: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors, _: dict) -> None:
        tensors["model.layers.0.input_layernorm.weight"][3] = float("inf")

    assert faulty(spoil, base, tmp_path).findings[0].kind == "finite"


def test_illegal_fp8_code(base: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors, _: dict) -> None:
        tensors[f"{Q}.weight"].view(torch.uint8)[2, 2] = 0x7F

    assert faulty(spoil, base, tmp_path, spelling="fp8-e4m3-channel").findings[0].kind == "finite"


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq-v2", "mlx"])
def test_skipped_expert(form: str, tmp_path: Path) -> None:
    """An expert that stayed in floating point although its kind is quantised and the config does not leave it out; no base needed."""
    spelling = "uint4-g32-min" if form == "mlx" else "int4-g32-asym"
    place = write(tmp_path, *quantised(form, spelling, skip=(f"{EXPERT}.weight",)))
    assert [(f.kind, f.tensor) for f in verify(place).findings] == [("skipped", f"{EXPERT}.weight")]


def test_lost_expert(base: Path, tmp_path: Path) -> None:
    tensors, config = quantised("gptq", "int4-g32")
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(EXPERT)}
    place = write(tmp_path, rest, config)
    assert ("skipped", f"{EXPERT}.weight") in [(f.kind, f.tensor) for f in verify(place).findings]
    assert {("skipped", f"{EXPERT}.weight"), ("source", f"{EXPERT}.weight")} == {
        (f.kind, f.tensor) for f in verify(place, base).findings
    }


def test_layers_left_out_by_name_are_no_fault(base: Path, tmp_path: Path) -> None:
    tensors, config = quantised("compressed-tensors", "int4-g32-asym", skip=(f"{EXPERT}.weight",))
    config["quantization_config"]["ignore"].append(EXPERT)
    assert verify(write(tmp_path, tensors, config), base).ok


@pytest.mark.parametrize(
    "lie", [{"num_bits": 8}, {"group_size": 64}, {"group_size": 16}, {"symmetric": True}, {"num_bits": 3}]
)
def test_lying_config(lie: dict, base: Path, tmp_path: Path) -> None:
    def change(_: Tensors, config: dict) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"] |= lie

    assert faulty(change, base, tmp_path).findings[0].kind in ("config", "source")


@pytest.mark.parametrize("lie", [{"bits": 8}, {"bits": 2}, {"group_size": 64}])
def test_lying_gptq_config(lie: dict, base: Path, tmp_path: Path) -> None:
    def change(_: Tensors, config: dict) -> None:
        config["quantization_config"] |= lie

    assert faulty(change, base, tmp_path, form="gptq", spelling="int4-g32").findings[0].kind == "config"


@pytest.mark.parametrize("form", ["compressed-tensors", "modelopt"])
def test_lying_nvfp4_config(form: str, base: Path, tmp_path: Path) -> None:
    def change(_: Tensors, config: dict) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64
        if form == "modelopt":
            config["quantization_config"]["group_size"] = 64

    assert faulty(change, base, tmp_path, form=form, spelling="nvfp4").findings[0].kind == "config"


@pytest.mark.parametrize("spelling", ["nf4-flat64-dq", "int8-channel-f32"])
def test_lying_bitsandbytes_config(spelling: str, base: Path, tmp_path: Path) -> None:
    def change(_: Tensors, config: dict) -> None:
        words = config["quantization_config"]
        words["load_in_4bit"], words["load_in_8bit"] = words["load_in_8bit"], words["load_in_4bit"]

    assert faulty(change, base, tmp_path, form="bitsandbytes", spelling=spelling).findings[0].kind == "config"


def test_from_the_command_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 0 for a good one, 4 for a bad one; the sentence names the tensor once, and JSON says the same."""
    from fewbit.cli.app import run

    tensors, config = quantised("compressed-tensors", "int4-g32-asym")
    good = str(write(tmp_path / "good", tensors, config))
    assert run(["verify", good, "--base", str(base)]) == 0 and "ok" in capsys.readouterr().out
    tensors.pop(f"{Q}.weight_scale")
    bad = str(write(tmp_path / "bad", tensors, config))
    assert run(["verify", bad]) == 4
    shown = capsys.readouterr().out
    assert "NOT ok" in shown and "cannot be read" in shown and "FB-E0621" in shown
    assert run(["verify", bad, "--json"]) == 4
    record = json.loads(capsys.readouterr().out)
    assert not record["ok"] and record["findings"][0]["tensor"] == f"{Q}.weight_scale"


def test_another_base(base: Path, tmp_path: Path) -> None:
    other = {
        name: tensor + 0.1 * torch.randn(tensor.shape).to(tensor.dtype)
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    write(tmp_path / "other", other, CONFIG)
    found = verify(write(tmp_path / "out", *quantised("gptq", "int4-g32")), tmp_path / "other")
    assert {f.kind for f in found.findings} == {"source"}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the sample as Q4_K_M, the sample)."""
    from fewbit import api

    sample = Path(__file__).parents[3] / "samples" / "sample"
    out = tmp_path_factory.mktemp("gguf") / "out"
    api.quantize(sample, to=["gguf:Q4_K_M"], out=out, verify=False)
    (file,) = out.rglob("*.gguf")
    return file, sample


def test_gguf_is_held_against_its_source(gguf: tuple[Path, Path]) -> None:
    found = verify(*gguf)
    assert found.ok and found.format == "gguf" and len(found.compared) == found.weights == 57, found.summary
    assert all(one.sqnr_db > one.expected_db - 1 for one in found.compared)


def test_damaged_gguf_blocks(gguf: tuple[Path, Path], tmp_path: Path) -> None:
    from fewbit.run.source import open_source

    file, sample = gguf
    with open_source(file) as source:
        name = "blk.3.ffn_up.weight"
        offset = source.checkpoint.manifest[name].offset
    data = bytearray(file.read_bytes())
    data[offset : offset + 2] = b"\x00\x7e"  # the first super-block's scale: a NaN
    (tmp_path / "nan.gguf").write_bytes(data)
    assert [(f.kind, f.tensor) for f in verify(tmp_path / "nan.gguf").findings] == [("finite", name)]
    data[offset : offset + 2] = b"\x00\x4c"  # sixteen: finite, and far from what it was
    (tmp_path / "wrong.gguf").write_bytes(data)
    assert [f.kind for f in verify(tmp_path / "wrong.gguf", sample).findings] == ["source"]


def noisy(folder: Path, base: Path, level: float, tokens: int, method: str = "gptq") -> tuple[Path, Path]:
    """(a checkpoint that says what it was calibrated on, a base that its weights miss by noise of `level` times their size)."""
    generator, other = torch.Generator().manual_seed(3), load_file(base / "model.safetensors")
    for name, tensor in other.items():
        if ".layers." in name and tensor.dim() == 2:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().square().mean().sqrt()
            other[name] = (tensor.float() + level * noise).to(tensor.dtype)
    write(folder / "base", other, CONFIG)
    write(folder / "out", *quantised("gptq", "int4-g32"))
    recipe = {"method": method, "calib_samples": tokens // 64, "calib_length": 64}
    (folder / "out" / "fewbit-manifest.json").write_text(json.dumps({"recipe": recipe}))
    return folder / "out", folder / "base"


def test_few_tokens_of_calibration_are_a_warning(base: Path, tmp_path: Path) -> None:
    found = verify(*noisy(tmp_path, base, 0.3, 128))
    assert found.ok, found.findings
    (warning,) = found.warnings
    assert "18 of 18 weights" in warning and "128 tokens" in warning and "--calib-samples" in warning
    assert found.summary.endswith(f"\nwarning: {warning}") and found.record()["warnings"] == [warning]


@pytest.mark.parametrize(
    ("level", "tokens", "method"),
    [(0.3, 65536, "gptq"), (0.3, 128, "rtn"), (1.5, 128, "gptq"), (0.3, 128, "no such method")],
)
def test_noise_that_few_tokens_do_not_explain(
    level: float, tokens: int, method: str, base: Path, tmp_path: Path
) -> None:
    found = verify(*noisy(tmp_path, base, level, tokens, method))
    assert {f.kind for f in found.findings} == {"source"} and len(found.findings) == 18 and not found.warnings


def test_damaged_block_of_a_noisy_weight(base: Path, tmp_path: Path) -> None:
    """Few tokens excuse noise, not one wrong scale."""
    out, other = noisy(tmp_path, base, 0.3, 128)
    tensors = load_file(out / "model.safetensors")
    tensors[f"{Q}.scales"][1, 5] *= 8
    save_file(tensors, out / "model.safetensors")
    found = verify(out, other)
    assert [f.tensor for f in found.findings] == [f"{Q}.weight"], found.findings
    assert "far off" in found.findings[0].message
