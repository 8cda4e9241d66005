"""The cases: every kernel at the sizes of a published model. To add one, write it beside its op's others."""

from kernels.bench.case import Case
from kernels.bench.cases import attention, cell, conv, delta, diagonal, outer

CASES: tuple[Case, ...] = (
    *outer.CASES,
    *delta.CASES,
    *diagonal.CASES,
    *cell.CASES,
    *conv.CASES,
    *attention.CASES,
)
