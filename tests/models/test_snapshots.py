"""Snapshots as bytes: what was written comes back; whatever happened to the file is noticed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.snapshots import DamagedSnapshotError, ForeignSnapshotError, from_bytes, to_bytes
from models.state import Snapshot

ABOUT = {"tokens": 7, "digest": "a" * 32}


def snapshot(dtype: torch.dtype) -> Snapshot:
    entries = torch.arange(6, dtype=torch.float32).reshape(3, 2).to(dtype)
    return Snapshot(torch.randn(40), {(0, "k", 0): entries}, {(0, 0): 0}, {(0, 0): 3})


WHOLE = to_bytes([snapshot(torch.float32)], "model", ABOUT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_written_comes_back(dtype: torch.dtype) -> None:
    written = [snapshot(dtype), snapshot(dtype)]
    read, about = from_bytes(to_bytes(written, "model", ABOUT), "model")
    assert about == ABOUT
    for a, b in zip(written, read, strict=True):
        assert a.row.equal(b.row) and a.counts == b.counts
        assert all(b.entries[key].equal(e) and b.entries[key].dtype is dtype for key, e in a.entries.items())


@given(at=st.integers(0, 8 * len(WHOLE) - 1))
def test_no_bit_may_differ(at: int) -> None:
    flipped = bytearray(WHOLE)
    flipped[at // 8] ^= 1 << at % 8
    with pytest.raises((DamagedSnapshotError, ForeignSnapshotError)):
        from_bytes(bytes(flipped), "model")


@given(length=st.integers(0, len(WHOLE) - 1), more=st.binary(max_size=9))
def test_no_byte_may_be_missing_or_new(length: int, more: bytes) -> None:
    for damaged in (
        WHOLE[:length],
        WHOLE + b"\0" + more,
        WHOLE[:length] + more + WHOLE[length + len(more) + 1 :],
    ):
        with pytest.raises((DamagedSnapshotError, ForeignSnapshotError)):
            from_bytes(damaged, "model")


def test_of_another_model() -> None:
    with pytest.raises(ForeignSnapshotError):
        from_bytes(WHOLE, "another")
