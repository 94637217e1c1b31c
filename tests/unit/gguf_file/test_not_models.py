"""GGUF files that are no language model are refused at plan time, in words: projectors, adapters, files without an architecture."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from fewbit import api
from fewbit.base.errors import FewbitError, Refusals


def written(path: Path, architecture: str, kind: str | None) -> Path:
    """A small file of the `gguf` package's own writer."""
    writer = gguf.GGUFWriter(path, architecture)
    if kind is not None:
        writer.add_type(kind)
    writer.add_tensor("v.patch_embd.weight", np.ones((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "kind", "words"),
    [("clip", "mmproj", "projector"), ("clip", None, "projector"), ("llama", "adapter", "an adapter")],
)
def test_what_is_no_model_is_refused_before_any_work(
    architecture: str, kind: str | None, words: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "mmproj-F32.gguf", architecture, kind)
    with pytest.raises(FewbitError) as caught:
        api.quantize(path, to="gguf:Q4_K_M", out=tmp_path / "out.gguf")
    error = caught.value.errors[0] if isinstance(caught.value, Refusals) else caught.value
    assert error.code == "FB-E0320" and words in error.message and error.remedy
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
