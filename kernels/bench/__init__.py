"""How fast the decoding kernels are, on a GPU: ``python -m kernels.bench``.

Every op has cases (``cases.py``), each one step of decoding at a model's sizes. A case first has to agree
with the naive recurrence; only then is it timed. What is reported is a ratio within one run on one machine:
the bytes that a step must move over its time, against a copy on the same device; and its time against
flash-linear-attention's kernel and against a compiled step of torch, on the same numbers. Without a GPU, the
agreement alone is checked, with small sizes in Triton's interpreter.
"""
