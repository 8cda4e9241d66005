"""States whose transition is diagonal: every element decays on its own.

- ``selective``: Mamba-1, a decay for every (channel, state element) made from the token.
- ``linear``: given or static decays, real (RG-LRU, HGRN) or complex (LRU, S4D).
- ``logsumexp``: a softmax average over the past, as a numerator, a denominator and a maximum (Aaren, RWKV-4).

Each is a folder with the file names of ``kernels``. Channels are the last dimension of every state, so that
neighbouring lanes of a vector unit or a warp hold neighbouring channels and a sum over the state elements
stays in a lane.
"""
