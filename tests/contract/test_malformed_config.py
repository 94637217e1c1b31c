"""Cases 43-52 of the catalogue: config, tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors_cases import file_of

from fewbit.base.errors import InputError
from fewbit.base.manifest import data_bytes
from fewbit.store import template
from fewbit.store.checkpoint import open_checkpoint
from fewbit.store.config import require_full_precision
from fewbit.store.tokenizer import check_tokenizer

VOCAB, WIDTH, LAYERS = 12, 4, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "tie_word_embeddings": True,
}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors(**changes: tuple[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    named = {f"model.layers.{i}.mlp.up_proj.weight": ("F32", (8, WIDTH)) for i in range(LAYERS)}
    return {EMBED: ("F32", (VOCAB, WIDTH)), **named, **changes}


def make(
    root: Path, config: Any = CONFIG, files: dict[str, Any] | None = None, fills: dict[str, int] | None = None, **shapes
) -> Path:
    """A checkpoint; `shapes` adds tensors by names with __ for dots, None removes."""
    listed = tensors() | {name.replace("__", "."): value for name, value in shapes.items()}
    header, data = {}, b""
    for name, value in listed.items():
        if value is not None:
            dtype, shape = value
            size = data_bytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + size]}
            data += bytes([(fills or {}).get(name, 0)]) * size
    text = json.dumps(header)
    (root / "model.safetensors").write_bytes(file_of(text + " " * (-len(text) % 8), data))
    for name, content in {"config.json": config, **(files or {})}.items():
        data = (
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content)).encode()
        )
        (root / name).write_bytes(data)
    return root


def refused(root: Path, code: str, says: str = "", tensor: str | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        open_checkpoint(root)
    error = caught.value
    assert error.code == code
    assert says in error.message
    assert error.tensor == tensor
    assert Path(error.file).name == "config.json"
    assert error.remedy
    return error


def test_sound(tmp_path: Path) -> None:
    with open_checkpoint(make(tmp_path)) as checkpoint:
        assert checkpoint.warnings == ()
        assert checkpoint.config == CONFIG


def test_43_config_missing(tmp_path: Path) -> None:
    (make(tmp_path) / "config.json").unlink()
    refused(tmp_path, "FB-E0201", "no config.json")
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:  # a single file was asked for by its path
        assert "no config.json" in checkpoint.warnings[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"\xef\xbb\xbf{}", "byte-order mark"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": Infinity}', "Infinity"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' stands twice"),
        (b"[]", "an object is needed"),
        (b"null", "an object is needed"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": 1} x', "not JSON"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\\udc00"}', "surrogate"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": "' + b"x" * (17 << 20) + b'"}', "at most"),
        (b'{"a": [' + b"1," * 1_100_000 + b"1]}", "values"),
    ],
)  # fmt: skip
def test_43_config_not_readable(tmp_path: Path, content: bytes, says: str) -> None:
    refused(make(tmp_path, content), "FB-E0201", says)


@pytest.mark.parametrize("value", [-1, 0, "4", 1 << 40, 4.0, True, [4], {}])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "n_embd"])
@pytest.mark.parametrize("nested", [False, True], ids=["top", "nested"])
def test_44_impossible_sizes(tmp_path: Path, key: str, value: Any, nested: bool) -> None:
    config = {**CONFIG, key: value}
    refused(make(tmp_path, {"model_type": "vl", "text_config": config} if nested else config), "FB-E0202", key)


def test_45_sizes_disagree_with_the_tensors(tmp_path: Path) -> None:
    refused(make(tmp_path, {**CONFIG, "hidden_size": 8}), "FB-E0203", "hidden_size 8", EMBED)
    refused(make(tmp_path, {**CONFIG, "vocab_size": 13}), "FB-E0203", "vocab_size 13", EMBED)
    refused(make(tmp_path, {**CONFIG, "num_hidden_layers": 3}), "FB-E0203", "3 layers")
    refused(make(tmp_path, {**CONFIG, "num_hidden_layers": 1}), "FB-E0203", "1 layers")


def test_45_padded_vocabulary_and_extra_stacks_are_fine(tmp_path: Path) -> None:
    config = {**CONFIG, "vocab_size": 10, "num_nextn_predict_layers": 1, "num_hidden_layers": 1}
    vision = {"visual__blocks__7__qkv__weight": ("F32", (4, 4))}
    with open_checkpoint(make(tmp_path, config, **vision)) as checkpoint:
        assert any("12 rows" in warning for warning in checkpoint.warnings)


def test_46_tied_but_another_head(tmp_path: Path) -> None:
    head = {"lm_head__weight": ("F32", (VOCAB, WIDTH))}
    refused(make(tmp_path, fills={HEAD: 1}, **head), "FB-E0204", "differs", HEAD)
    refused(make(tmp_path, lm_head__weight=("F16", (VOCAB, WIDTH))), "FB-E0204", "differs", HEAD)
    with open_checkpoint(make(tmp_path, **head)) as checkpoint:
        assert any("repeats" in warning for warning in checkpoint.warnings)


def test_46_untied_without_head(tmp_path: Path) -> None:
    config = {**CONFIG, "tie_word_embeddings": False}
    refused(make(tmp_path, config), "FB-E0204", "no tensor is an output head", EMBED)
    open_checkpoint(make(tmp_path, config, lm_head__weight=("F32", (VOCAB, WIDTH)))).close()
    open_checkpoint(make(tmp_path, config, lm_head__qweight=("I32", (1, VOCAB)))).close()
    open_checkpoint(make(tmp_path, {**config, "architectures": ["LlamaModel"]})).close()
    refused(make(tmp_path, {**CONFIG, "tie_word_embeddings": "yes"}), "FB-E0202", "tie_word_embeddings")


def test_47_keys_that_run_code_are_dropped_and_told(tmp_path: Path) -> None:
    bad = {
        "auto_map": {"AutoModel": "evil.Model"},
        "_attn_implementation_internal": "evil/kernel",
        "trust_remote_code": True,
    }
    config = {**CONFIG, **bad, "text_config": {**CONFIG, **bad}, "list": [{"auto_map": 1, "kept": 2}]}
    root = make(tmp_path, config, {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.T", None]}}})
    with open_checkpoint(root) as checkpoint:
        assert checkpoint.config == {**CONFIG, "text_config": CONFIG, "list": [{"kept": 2}]}
        told = "\n".join(checkpoint.warnings)
        for where in (*bad, *(f"text_config.{key}" for key in bad), "list[0].auto_map", "tokenizer_config.json"):
            assert where in told


def test_48_unknown_architecture_opens(tmp_path: Path) -> None:
    """What an unknown family allows is for arch and plan to say; the store only notes when nothing is named at all."""
    strange = {**CONFIG, "architectures": ["FrobnicatorForCausalLM"], "model_type": "frobnicator"}
    with open_checkpoint(make(tmp_path, strange)) as checkpoint:
        assert checkpoint.config["model_type"] == "frobnicator"
    with open_checkpoint(make(tmp_path, {"hidden_size": WIDTH})) as checkpoint:
        assert any("no architecture" in warning for warning in checkpoint.warnings)


def test_49_already_quantised(tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    quantised = open_checkpoint(make(tmp_path, config, x__qweight=("I32", (1, 8))))
    quantised.close()
    with pytest.raises(InputError, match=r"FB-E0205.*gptq"):
        require_full_precision(quantised.config, quantised.root)
    with open_checkpoint(make(tmp_path)) as checkpoint:
        require_full_precision(checkpoint.config, checkpoint.root)


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8", "mxfp4", "hqq", "modelopt"]
)
def test_50_quantization_config_untrue(tmp_path: Path, method: str) -> None:
    refused(make(tmp_path, {**CONFIG, "quantization_config": {"quant_method": method}}), "FB-E0206", method)


def vocabulary(count: int) -> dict[str, int]:
    return {f"t{i}": i for i in range(count)}


def tokenizer(vocab: Any, added: Any = ()) -> dict[str, Any]:
    return {"model": {"type": "BPE", "vocab": vocab}, "added_tokens": list(added)}


def checked(root: Path) -> None:
    with open_checkpoint(root) as checkpoint:
        check_tokenizer(checkpoint.root, checkpoint.config, checkpoint.manifest)


def test_51_sound_tokenizers(tmp_path: Path) -> None:
    added = [{"id": 0, "content": "t0"}, {"id": 11, "content": "<x>"}]
    checked(make(tmp_path, files={"tokenizer.json": tokenizer(vocabulary(10), added)}))
    unigram = [[f"t{i}", -1.0] for i in range(VOCAB)]
    generation = {"eos_token_id": [1, 2], "pad_token_id": -1, "bos_token_id": None}
    checked(make(tmp_path, files={"tokenizer.json": tokenizer(unigram), "generation_config.json": generation}))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (tokenizer(vocabulary(13)), "only 12 rows"),
        (tokenizer(vocabulary(12), [{"id": 12, "content": "<x>"}]), "'<x>' has the id 12"),
        (tokenizer({"a": 1, "b": 1}), "listed twice"),
        (tokenizer([["a", 0], ["a", 0]]), "listed twice"),
        (json.dumps(tokenizer({"a": 1})).replace('"a": 1', '"a": 1, "a": 2'), "stands twice"),
        (tokenizer({"a": -1}), "id '-1'"),
        (tokenizer({"a": "1"}), "id '1'"),
        (tokenizer({"a": True}), "id 'True'"),
        (tokenizer([1]), "entry 0"),
        (tokenizer(None), "no vocabulary"),
        (tokenizer({}, ["x"]), "added token"),
        ("{", "not JSON"),
    ],
)
def test_51_tokenizer_unusable(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(InputError) as caught:
        checked(make(tmp_path, files={"tokenizer.json": content}))
    assert caught.value.code == "FB-E0211"
    assert says in caught.value.message
    assert Path(caught.value.file).name == "tokenizer.json"


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [12, -2, [1, 12], "1", 1.0])
def test_51_special_id_out_of_range(tmp_path: Path, key: str, value: Any) -> None:
    files = {"tokenizer.json": tokenizer(vocabulary(12))}
    with pytest.raises(InputError, match=f"FB-E0211 {key}"):
        checked(make(tmp_path, {**CONFIG, key: value}, files))
    with pytest.raises(InputError, match=f"FB-E0211 {key}"):
        checked(make(tmp_path, CONFIG, {**files, "generation_config.json": {key: value}}))


def test_51_tokenizer_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="FB-E0210"):
        checked(make(tmp_path))


MESSAGES = [{"role": "user", "content": 'say "hi"'}]


def test_52_sound_template() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 5 %}{% break %}{% endif %}<{{ m.role }}>{{ m['content'] | tojson }}{% endfor %}"
        "{% generation %}.{% endgeneration %}{{ eos_token }}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert template.render(source, MESSAGES, eos_token="</s>") == '<user>"say \\"hi\\"".</s><assistant>'


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].system('id') }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ messages | attr('__class__') | attr('__base__') | string | list | count / 0 }}",
        "{{ '{0.__class__.__base__}'.format(messages) }}{{ undefined.x }}",
        "{% if %}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ range(10**6) | list }}",
    ],
)  # fmt: skip
def test_52_template_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        template.render(source, MESSAGES, file=tmp_path / "t.jinja")
    assert caught.value.code == "FB-E0220"
    assert caught.value.file == str(tmp_path / "t.jinja")


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 'x' | center(10 ** 10) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 7 ** (7 ** 12) }}",
    ],
    ids=["endless", "100 MB", "memory", "padding", "recursion", "power"],
)
def test_52_template_stopped(source: str) -> None:
    with pytest.raises(InputError) as caught:
        template.render(source, MESSAGES, seconds=1)
    assert caught.value.code == "FB-E0221"


def test_52_where_templates_are_found(tmp_path: Path) -> None:
    assert template.chat_template(tmp_path) is None
    several = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert template.chat_template(tmp_path) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert template.chat_template(tmp_path) == "J"
    (tmp_path / "chat_template.jinja").write_text("J" * (2 << 20))
    with pytest.raises(InputError, match="FB-E0220"):
        template.chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 5}')
    with pytest.raises(InputError, match="FB-E0220"):
        template.chat_template(tmp_path)
