"""Sink for a GGUF output: the file, split where asked, with a model card and an Ollama Modelfile beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewbit.base.errors import QualityError
from fewbit.formats.gguf.card import model_card, modelfile
from fewbit.formats.gguf.encode import apart, source_values, tensor_bytes
from fewbit.formats.gguf.plan import GgufPlan, PlannedTensor
from fewbit.formats.gguf.types import FLOATS
from fewbit.math.stats import Stats
from fewbit.num.qtensor import QTensor
from fewbit.plan.jobs import Job, Output
from fewbit.run.imatrix import imatrix_bytes
from fewbit.run.imatrix_kept import keep_stats, kept_matrix
from fewbit.run.sinks import ShardSink, facts_of, row_pieces
from fewbit.run.source import Source
from fewbit.store.checkpoint import open_checkpoint
from fewbit.store.gguf_layout import lay_out_gguf
from fewbit.store.writer import ShardWriter

ONE_FILE = 1 << 62
IMATRIX_NAME, IMATRIX_PARTS = "imatrix.dat", "imatrix"  # not .gguf: it is no second model
MAX_TEXT = 1 << 20  # bytes of a card or a JSON file that are read for the texts beside the output


class GgufSink(ShardSink):
    """An output folder with one GGUF file (or its parts)."""

    def __init__(self, output: Output, source: Source, out: Path, overwrite: bool, shard_bytes: int) -> None:
        plan: GgufPlan = output.carry
        self.planned: dict[str, PlannedTensor] = {tensor.name: tensor for tensor in plan.tensors}
        self.stem = f"{source.root.name}-{plan.recipe.name}"
        split = shard_bytes if output.options.get("split") == "true" else ONE_FILE
        layout = lay_out_gguf(plan.layout_rows(), plan.metadata, stem=self.stem, max_bytes=split)
        super().__init__(output, source, ShardWriter(out, layout, overwrite=overwrite, sources=[source.root]))

    def encode(self, job: Job, q: QTensor) -> dict[str, torch.Tensor]:
        """The bytes of a tensor, and beside NVFP4 blocks the scale over all of them."""
        if len(job.writes) == 1:
            return super().encode(job, q)
        blocks, over = apart(q)
        beside = next(name for name in job.writes if name != job.target)
        return {**super().encode(replace(job, writes={job.target: job.writes[job.target]}), blocks), beside: over}

    def copy(self, job: Job, source: Source) -> None:
        """Writes a tensor of a plain type (F32, F16, BF16), or blocks of a GGUF as they are."""
        self.copy_pieces(job, self._pieces(self.planned[job.target], source))

    def _pieces(self, tensor: PlannedTensor, source: Source) -> Iterator[torch.Tensor]:
        if tensor.type not in FLOATS:
            yield source.checkpoint.read(tensor.reads[0])
        elif len(tensor.reads) == 1 and not tensor.ops:
            for piece in row_pieces(source, tensor.reads[0]):
                yield tensor_bytes(tensor, piece.float() if tensor.type == "F32" else piece)
        else:
            yield tensor_bytes(tensor, source_values(tensor, source.read))

    def saw(self, name: str, stats: Mapping[int | None, Stats]) -> None:
        """Keeps the statistics in the scratch folder until the importance matrix is written: a killed run goes on with the next block."""
        keep_stats(self.scratch / IMATRIX_PARTS, name, stats)

    def finish(self, record: dict[str, Any]) -> Path:
        self.close_journal()
        files = [shard.name for shard in self.writer.layout.shards]
        plan, target = self.output.carry, self.output.target
        small = {
            "README.md": model_card(plan, files, record, target, self._beside("README.md"), hub_id(record)).encode(),
            "Modelfile": modelfile(files, plan, self._generation()).encode(),
        }
        matrix = kept_matrix(self.scratch / IMATRIX_PARTS, plan.tensors, record["recipe"])
        if matrix is not None:
            small[IMATRIX_NAME] = imatrix_bytes(matrix)
        place = self.writer.finish(small, [], facts_of(self.output, record))
        self._audit(place)
        return place

    def _beside(self, name: str) -> str:
        """Text of a file that lies beside the source's weights, empty without one."""
        path = self.source.root / name
        if not self.source.root.is_dir() or not path.is_file() or path.stat().st_size > MAX_TEXT:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")

    def _generation(self) -> dict[str, Any]:
        try:
            found = json.loads(self._beside("generation_config.json") or "{}")
        except ValueError:  # of no use to anyone; the model does not depend on it
            return {}
        return found if isinstance(found, dict) else {}

    def _audit(self, place: Path) -> None:
        """Opens the file by our strict reader and compares every tensor with the plan."""
        with open_checkpoint(place / self.writer.layout.shards[0].name) as written:
            found = {name: (info.dtype, info.shape) for name, info in written.manifest.items()}
        wanted = {name: (info.dtype, info.shape) for name, info in self.writer.layout.tensors.items()}
        for name in wanted.keys() | found.keys():
            if wanted.get(name) != found.get(name):
                raise QualityError(
                    "FB-E0412", f"planned {wanted.get(name)}, written {found.get(name)}", tensor=name, file=place
                )


def hub_id(record: Mapping[str, Any]) -> str:
    """The source as the hub calls it, "" for a folder or file of this machine."""
    source = str(record["source"])
    return source if source.count("/") == 1 and not Path(source).expanduser().exists() else ""
