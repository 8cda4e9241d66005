"""What a tick costs: for each stage, seconds = fixed + per_token * tokens, fitted as ticks go by."""

from dataclasses import dataclass

MEMORY = 0.98  # weight of what was known, at each new tick


@dataclass(slots=True)
class Cost:
    """Least squares over the ticks of one stage, older ones fading away."""

    weight: float = 0.0
    tokens: float = 0.0
    tokens2: float = 0.0
    seconds: float = 0.0
    product: float = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        self.weight = MEMORY * self.weight + 1
        self.tokens = MEMORY * self.tokens + tokens
        self.tokens2 = MEMORY * self.tokens2 + tokens * tokens
        self.seconds = MEMORY * self.seconds + seconds
        self.product = MEMORY * self.product + tokens * seconds

    @property
    def per_token(self) -> float:
        spread = self.weight * self.tokens2 - self.tokens**2
        if spread <= 1e-9 * self.weight * self.tokens2:
            return 0.0  # always the same number of tokens: nothing tells the two apart
        slope = (self.weight * self.product - self.tokens * self.seconds) / spread
        return min(max(slope, 0.0), self.seconds / self.tokens)

    @property
    def fixed(self) -> float:
        """Seconds of a tick however few its tokens; 0 before the first."""
        if not self.weight:
            return 0.0
        return max(0.0, (self.seconds - self.per_token * self.tokens) / self.weight)

    def of(self, tokens: int) -> float:
        """Expected seconds of a tick."""
        return self.fixed + self.per_token * tokens
