"""The recipe: everything that decides what the output holds, frozen, as YAML or as command-line flags.

What only decides how the work is done (memory, workers, progress) is no part of it: `run.settings`. Two runs with equal recipes and
equal sources write equal bytes.
"""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fewbit.base.errors import InputError

OptionValue = bool | int | float | str


class Rule(BaseModel):
    """What to do with the tensors that a pattern selects; the last rule that matches counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str = Field(description="glob of the tensor name, or re:EXPRESSION")
    scheme: str = Field(default="keep", description="scheme or preset, or `keep` for the source's own precision")
    method: str | None = Field(default=None, description="solver for these tensors, if another than the recipe's")


class Recipe(BaseModel):
    """What to make of a checkpoint. Unknown keys are errors.

    The descriptions below are the help texts of the flags of `fewbit quantize`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    to: tuple[str, ...] = Field(
        default=(), description="output as FORMAT[:SCHEME][,option=value]; may be given many times"
    )
    method: str = Field(default="rtn", description="solver; see `fewbit methods`")
    options: dict[str, OptionValue] = Field(
        default_factory=dict, description="solver option as name=value; may be given many times"
    )
    rules: tuple[Rule, ...] = Field(
        default=(), description="PATTERN=SCHEME or PATTERN=keep; may be given many times, the last match counts"
    )
    include: tuple[str, ...] = Field(
        default=(), description="roles kept by default that shall be quantised too: embed,head,router …"
    )
    on_misfit: Literal["refuse", "keep"] = Field(
        default="refuse", description="a tensor that the scheme does not suit: refuse the job, or keep the tensor"
    )
    requantize: bool = Field(
        default=False, description="accept a source that is already quantised, by its decoded values"
    )
    rewrites: tuple[str, ...] = Field(
        default=(), description="rewrites of the float model before solving: smooth,awq,rotate …"
    )
    calib: str | None = Field(
        default=None, description="calibration text: file (txt, jsonl, parquet), `default`, or a dataset name"
    )
    calib_samples: int = Field(default=128, ge=1, description="calibration sequences")
    calib_length: int = Field(default=512, ge=8, description="tokens per calibration sequence")
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="what calibration text is run through the model in; auto: bfloat16 for large blocks, and for weights stored so where the machine multiplies it",
    )
    activation_range: Literal["absmax", "percentile", "mse"] = Field(
        default="absmax",
        description="how far static activation scales reach: the largest input, a percentile, or least squared error",
    )
    activation_percentile: float = Field(
        default=99.99,
        gt=0,
        le=100,
        description="per cent of the inputs inside the range of `--activation-range percentile`",
    )
    kv: Literal["fp8"] | None = Field(
        default=None,
        description="calibrated scales of cached keys and values (fp8), where the format has a place for them",
    )
    imatrix: str | None = Field(default=None, description="importance matrix file (GGUF or the older binary form)")
    seed: int = Field(default=0, ge=0, description="seed of everything random")
    max_shard_size: str = Field(default="5GB", description="largest output file, e.g. 5GB")

    @field_validator("to", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("rewrites", "include", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        words = (value,) if isinstance(value, str) else value
        return tuple(part.strip() for word in words for part in word.split(",")) if _texts(words) else value


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def parse_size(text: str) -> int:
    """Bytes of a size such as 8GB, 512MiB, 2.5G or 4096.

    Raises:
        InputError: FB-E0402 when it is not a size.
    """
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", 1):
        units |= {letter: 1000**power, f"{letter}b": 1000**power, f"{letter}ib": 1024**power}
    word = text.strip().lower().replace(" ", "")
    number = word.rstrip("bikmgt")
    try:
        size = int(float(number) * units[word[len(number) :]])
    except (KeyError, ValueError, OverflowError):
        raise InputError("FB-E0402", f"{text!r} is not a size") from None
    if size <= 0:
        raise InputError("FB-E0402", f"a size must be positive, got {text!r}")
    return size


def parse_target(text: str) -> tuple[str, str | None, dict[str, str]]:
    """The format, scheme and options of `FORMAT[:SCHEME][,option=value …]`.

    Raises:
        InputError: FB-E0403.
    """
    head, *options = text.split(",")
    name, _, scheme = head.partition(":")
    pairs = [option.partition("=") for option in options]
    if not name.strip() or not all(sign and key and value for key, sign, value in pairs):
        raise InputError("FB-E0403", f"{text!r} is not of the form FORMAT[:SCHEME][,option=value]")
    return name.strip(), scheme.strip() or None, {key.strip(): value.strip() for key, _, value in pairs}


def parse_rule(text: str) -> Rule:
    """A rule of the form PATTERN=SCHEME or PATTERN=SCHEME@METHOD.

    Raises:
        InputError: FB-E0404.
    """
    pattern, sign, scheme = text.rpartition("=")
    if not sign or not pattern or not scheme:
        raise InputError("FB-E0404", f"{text!r} is not of the form PATTERN=SCHEME")
    scheme, _, method = scheme.partition("@")
    return Rule(pattern=pattern, scheme=scheme, method=method or None)


def parse_option(text: str) -> tuple[str, OptionValue]:
    """A solver option of the form name=value; the value is read as YAML (`true`, `0.01`, `64`, `descending`)."""
    name, sign, value = text.partition("=")
    if not sign or not name or not value.strip():
        raise InputError("FB-E0405", f"{text!r} is not of the form name=value")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError("FB-E0405", f"the value of {text!r} cannot be read") from None


def recipe_from(data: dict[str, Any], *, file: object = None) -> Recipe:
    """A recipe from plain data.

    Raises:
        InputError: FB-E0401 with each field that is wrong.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise InputError("FB-E0401", f"the recipe is not valid: {problems}", file=file) from None


def recipe_from_yaml(text: str, *, file: object = None) -> Recipe:
    """A recipe from YAML text (safe loader).

    Raises:
        InputError: FB-E0401 when it is not YAML, no mapping, or not a valid recipe.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError("FB-E0401", f"the recipe is not YAML: {str(error).splitlines()[0]}", file=file) from None
    if not isinstance(data, dict):
        raise InputError("FB-E0401", f"a recipe is a mapping, got {type(data).__name__}", file=file)
    return recipe_from(data, file=file)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, without fields at their defaults."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
