"""Slots: who owns which place in the state pool."""


class SlotPool:
    """Slots 1 to `capacity`, each owned by one sequence at a time. Slot 0 is padding."""

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"slots = {capacity}: must be at least 1")
        self.capacity = capacity
        self._free = list(range(capacity, 0, -1))
        self._used: set[int] = set()

    @property
    def available(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self._used)

    def allocate(self) -> int:
        """Raises IndexError when none is available: callers look first."""
        slot = self._free.pop()
        self._used.add(slot)
        return slot

    def free(self, slot: int) -> None:
        self._used.remove(slot)  # KeyError: freed twice, or never allocated
        self._free.append(slot)


class TokenBudget:
    """Entries of growing state that all sequences together may hold. A sequence takes at admission what it may come to
    need, so that nothing that runs is ever short of memory."""

    def __init__(self, capacity: int | None):
        """None: the model has no growing state."""
        self.capacity = capacity
        self.used = 0

    def fits(self, tokens: int) -> bool:
        return self.capacity is None or self.used + tokens <= self.capacity

    def allocate(self, tokens: int) -> None:
        assert self.fits(tokens), "callers look first"
        self.used += tokens if self.capacity is not None else 0

    def free(self, tokens: int) -> None:
        if self.capacity is not None:
            self.used -= tokens
            assert self.used >= 0, "freed twice"
