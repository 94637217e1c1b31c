"""Journal, activation store, byte gate, row tiles, observers: the parts of a run, each on its own."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.math.scales import quantize
from fewbit.num.scheme import parse_scheme
from fewbit.run.acts import ActStore
from fewbit.run.journal import Journal
from fewbit.run.limits import ByteGate
from fewbit.run.observe import Observer, StopForward, Use
from fewbit.run.pieces import cat_rows


def test_a_journal_remembers_and_ignores_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {"source": "a", "recipe.to": ["x"]})
    journal.record("one", {"crc32": {"w": 12}})
    journal.note("block", {"index": 3})
    journal.close()
    with open(path, "ab") as file:
        file.write(b'{"key": "two", "sha2')
    again = Journal(path, {"source": "a", "recipe.to": ["x"]})
    assert set(again.done) == {"one"} and again.notes["block"]["index"] == 3
    again.record("two", {})
    again.close()
    assert set(Journal(path, {"source": "a", "recipe.to": ["x"]}).done) == {"one", "two"}


def test_a_journal_of_another_run_is_refused_naming_the_fields(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, {"source": "a", "recipe.seed": 1, "recipe.method": "rtn"}).close()
    with pytest.raises(InputError, match=r"recipe\.method.*recipe\.seed"):
        Journal(path, {"source": "a", "recipe.seed": 2, "recipe.method": "hqq"})


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_come_back_as_they_went_in(tmp_path: Path, spill: bool, dtype: torch.dtype) -> None:
    store = ActStore((7, 5, 6), dtype, 3, tmp_path / "acts" if spill else None)
    values = torch.randn(7, 5, 6).to(dtype)
    for index in range(len(store)):
        store.put(index, values[slice(*store.span(index))])
    assert all(torch.equal(store.get(i), values[slice(*store.span(i))]) for i in range(len(store)))
    store.save(tmp_path / "saved")
    other = ActStore((7, 5, 6), dtype, 2, None)
    assert other.load(tmp_path / "saved") and torch.equal(other.get(3), values[6:7])
    assert not ActStore((8, 5, 6), dtype, 2, None).load(tmp_path / "saved")
    store.close()
    assert not (tmp_path / "acts").exists()


def test_the_gate_keeps_bytes_in_flight_below_the_limit_and_never_starves() -> None:
    gate = ByteGate(100)
    held, most, lock = 0, 0, threading.Lock()

    def work(nbytes: int) -> None:
        nonlocal held, most
        with gate.hold(nbytes):
            with lock:
                held += nbytes
                most = max(most, held if held > nbytes else 0)
            time.sleep(0.002)
            with lock:
                held -= nbytes

    threads = [threading.Thread(target=work, args=(size,)) for size in (40, 60, 30, 500, 10, 90, 20) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads) and most <= 100


@pytest.mark.parametrize(
    "spelling", ["int4-g32-asym", "q4_k", "fp8-e4m3-block128", "nf4-g64", "uint4-g32-min", "mxfp4", "q6_k"]
)
def test_tiles_of_rows_join_to_the_whole(spelling: str) -> None:
    scheme = parse_scheme(spelling)
    w = torch.randn(300, 512, generator=torch.Generator().manual_seed(1))
    step = max(1, scheme.blocks.rows)
    cut = 128 // step * step
    whole = quantize(scheme, w)
    joined = cat_rows(scheme, (300, 512), [quantize(scheme, w[:cut]), quantize(scheme, w[cut:])])
    joined.check()
    assert torch.equal(joined.dequantize(), whole.dequantize())


def test_an_observer_sees_products_of_all_kinds_and_no_others() -> None:
    whole, turned, stack, other = torch.randn(4, 3), torch.randn(3, 4), torch.randn(2, 4, 3), torch.randn(4, 3)
    x = torch.randn(5, 3)
    seen: list[Use] = []
    with Observer({"a": whole, "b": turned, "c": stack}, lambda use: seen.append(use)):
        torch.nn.functional.linear(x, whole)
        x @ turned
        torch.addmm(torch.zeros(4), x, turned)
        torch.nn.functional.linear(x, stack[1])
        torch.nn.functional.linear(x, other)
        x.sum()
    assert [(use.param, use.expert) for use in seen] == [("a", None), ("b", None), ("b", None), ("c", 1)]
    assert all(torch.equal(use.x, x) for use in seen)


def test_an_observer_can_replace_inputs_stop_and_see_outputs() -> None:
    w, x = torch.eye(3), torch.ones(2, 3)
    outputs: list[torch.Tensor] = []
    with Observer({"w": w}, lambda use: use.x * 2, lambda use, out: outputs.append(out)):
        assert torch.equal(torch.nn.functional.linear(x, w), 2 * x)
    assert torch.equal(outputs[0], 2 * x)

    def stop(use: Use) -> None:
        raise StopForward

    with pytest.raises(StopForward), Observer({"w": w}, stop):
        torch.nn.functional.linear(x, w)
    assert torch.equal(torch.nn.functional.linear(x, w), x)
