"""Snapshots of constant state: what is dropped makes room for what comes."""

import torch

from models.state import SLAB, Layout, Leaf, StatePool


def test_dropped_snapshots_give_their_rows_to_later_ones() -> None:
    pool = StatePool(Layout.of([{"state": Leaf((1024,))}]), slots=2)
    together = SLAB // pool.arena[0].nbytes
    kept = pool.read(1)
    seen = {pool.read(1).row.data_ptr() for _ in range(2 * together)}
    assert len(seen) == 1, "one row served them all"
    assert kept.row.data_ptr() not in seen


def test_a_snapshot_stays_what_it_was() -> None:
    pool = StatePool(Layout.of([{"state": Leaf((3, 5), fill=1.0)}]), slots=2)
    pool.reset(1)
    before = pool.read(1)
    for value in range(10):
        pool.arena[1] = value
        pool.read(1)
    assert torch.equal(before.row[:15], torch.ones(15))
    pool.write(2, [before])
    assert torch.equal(pool.arena[2], before.row)
