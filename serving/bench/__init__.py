"""Benchmarks: ``fathom bench NAME``. Each prints a table, and one line of JSON last. Timings are compared within one
run only."""
