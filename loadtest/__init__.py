"""The load harness: a client like any other. ``python -m loadtest --help``; docs/loadtest.md defines every
figure."""
