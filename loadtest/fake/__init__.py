"""``python -m loadtest.fake``: a server without a model, whose delays are known.

It speaks fathom.v1, the Open Inference Protocol and OpenAI's HTTP on one port. Token i of a request is due
`ttft + i * itl` after its bytes were read, by the clock and not by the token before, so that delays do not
add up.
"""

from loadtest.fake.server import serve
from loadtest.fake.source import Behaviour, Fake

__all__ = ["Behaviour", "Fake", "serve"]
