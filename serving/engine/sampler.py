"""From logits to tokens."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from serving.engine.core import Floats, Ints
from serving.engine.draw import draw, draw_naive, invert
from serving.engine.grammar import Matcher
from serving.engine.params import SamplingParams
from serving.engine.random import uniform


class Sampler:
    """Samples rows of logits by the parameters of the slots that they belong to.

    A row's token depends on its own logits, parameters, seed and position only, never on the rows beside it.
    """

    def __init__(self, slots: int, vocab_size: int):
        self.vocab_size = vocab_size
        self._params: list[SamplingParams | None] = [None] * (slots + 1)
        self._temperature = np.zeros(slots + 1, np.float32)
        self._seed = np.zeros(slots + 1, np.uint64)
        self._filtered = np.zeros(slots + 1, bool)  # top-k, top-p or min-p
        self._edited = np.zeros(slots + 1, bool)  # logits change before sampling
        self._logprobs = np.full(slots + 1, -1, np.int64)
        self._history: dict[int, _History] = {}
        self._endings: dict[int, list[int]] = {}

    def admit(
        self,
        slot: int,
        params: SamplingParams,
        seed: int,
        prompt: Sequence[int],
        endings: Sequence[int],
        matcher: Matcher | None = None,
        resumed: Sequence[int] = (),
    ) -> None:
        """Take a slot into service. `endings` are the tokens that may not come before min_tokens have; a
        `matcher` says which tokens the request's grammar allows."""
        self._params[slot] = params
        self._temperature[slot] = params.temperature
        self._seed[slot] = seed
        self._filtered[slot] = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        self._edited[slot] = (
            params.penalised or bool(params.logit_bias) or params.min_tokens > 0 or matcher is not None
        )
        self._logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._endings[slot] = list(endings)
        if self._edited[slot]:
            history = self._history[slot] = _History(params, prompt, self.vocab_size, matcher)
            for token in resumed:
                history.take(token)

    def release(self, slot: int) -> None:
        self._params[slot] = None
        self._edited[slot] = False
        self._history.pop(slot, None)
        self._endings.pop(slot, None)

    def sample(
        self, logits: Tensor, slots: Ints, positions: Ints
    ) -> tuple[Ints, Floats | None, Ints | None, Floats | None]:
        """logits [R, vocab] float32, the slot of each row, and the position of the token that each row predicts.
        Returns token ids [R]; their log-probabilities [R], and the likeliest tokens [R, most asked for] with theirs,
        where any row asks for them: of the model's own distribution, before temperature and penalties."""
        edited = self._edited[slots]
        adjusted = logits
        if edited.any():
            adjusted = logits.clone()
            for row in np.flatnonzero(edited):
                self._history[int(slots[row])].edit(adjusted[row], self._endings[int(slots[row])])
        temperature = self._temperature[slots]
        drawn = temperature > 0
        ids = np.zeros(len(slots), np.int64) if drawn.all() else _likeliest(adjusted)
        if drawn.any():
            uniforms = uniform(self._seed[slots], positions)
            filtered = self._filtered[slots]
            for some, pick in ((drawn & ~filtered, self._draw), (drawn & filtered, self._draw_filtered)):
                if some.any():
                    rows = np.flatnonzero(some)
                    chosen = adjusted if len(rows) == len(slots) else adjusted[torch.from_numpy(rows)]
                    ids[rows] = pick(chosen, temperature[rows], slots[rows], uniforms[rows])
        for row in np.flatnonzero(edited):
            self._history[int(slots[row])].take(int(ids[row]))
        return ids, *self._log_probabilities(logits, slots, ids)

    def _draw(self, logits: Tensor, temperature: Floats, slots: Ints, uniforms: np.ndarray) -> Ints:
        return (draw_naive if logits.is_cuda else draw)(logits, temperature, uniforms)

    def _draw_filtered(self, logits: Tensor, temperature: Floats, slots: Ints, uniforms: np.ndarray) -> Ints:
        """Among the likeliest tokens only: those that top-k, top-p and min-p all leave."""
        params = [p for s in slots if (p := self._params[s]) is not None]
        column = lambda values, dtype: torch.tensor(values, dtype=dtype, device=logits.device)[:, None]  # noqa: E731
        top_k = column([p.top_k or self.vocab_size for p in params], torch.int64)
        top_p = column([p.top_p for p in params], torch.float64)
        min_p = column([p.min_p for p in params], torch.float32)
        most = min(int(top_k.max()), self.vocab_size)
        probabilities = (logits / torch.from_numpy(temperature).to(logits.device)[:, None]).softmax(-1)
        if most < self.vocab_size:
            values, order = probabilities.topk(most)
        else:
            values, order = probabilities.sort(descending=True, stable=True)
        before = values.double().cumsum(-1) - values  # probability of the tokens likelier than this one
        kept = (
            (torch.arange(most, device=logits.device) < top_k)
            & (before < top_p)
            & (values >= min_p * values[:, :1])
        )
        kept[:, 0] = True
        ranks = invert(values * kept, uniforms)
        return order.gather(1, torch.from_numpy(ranks)[:, None].to(order.device)).squeeze(1).cpu().numpy()

    def _log_probabilities(
        self, logits: Tensor, slots: Ints, ids: Ints
    ) -> tuple[Floats | None, Ints | None, Floats | None]:
        most = int(self._logprobs[slots].max(initial=-1))
        if most < 0:
            return None, None, None
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, torch.from_numpy(ids)[:, None].to(logits.device)).squeeze(1).cpu().numpy()
        if most == 0:
            return chosen, None, None
        values, indices = logprobs.topk(min(most, self.vocab_size))
        return chosen, indices.cpu().numpy(), values.cpu().numpy()


def _likeliest(logits: Tensor) -> Ints:
    """logits [R, V] -> [R]. On a CPU by numpy, which takes a sixteenth of torch's time."""
    return logits.argmax(-1).cpu().numpy() if logits.is_cuda else logits.numpy().argmax(-1)


class _History:
    """What a slot has seen, for the parameters that look back."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], vocab_size: int, matcher: Matcher | None
    ):
        self.params = params
        self.matcher = None if matcher is None else matcher.copy()
        self.generated = 0
        self.counts: Tensor | None = None
        if params.penalised:
            self.counts = torch.zeros(vocab_size)  # of the output
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)  # in prompt or output
            self.seen[torch.tensor(list(prompt), dtype=torch.int64)] = True
        self.biased = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self.biases = torch.tensor([float(b) for b in params.logit_bias.values()])

    def take(self, token: int) -> None:
        self.generated += 1
        if self.matcher is not None:
            self.matcher.take(token)
        if self.counts is not None:
            self.counts[token] += 1
            self.seen[token] = True

    def edit(self, logits: Tensor, endings: Sequence[int]) -> None:
        """Change one row of logits [vocab] in place."""
        p = self.params
        if self.counts is not None:
            counts, seen = self.counts.to(logits.device), self.seen.to(logits.device)
            scaled = torch.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
            logits.copy_(torch.where(seen, scaled, logits))
            logits -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
        if len(self.biased):
            logits[self.biased.to(logits.device)] += self.biases.to(logits.device)
        if self.generated < p.min_tokens and endings:
            logits[list(endings)] = float("-inf")
        if self.matcher is not None:
            logits.masked_fill_(~torch.from_numpy(self.matcher.allowed()).to(logits.device), float("-inf"))
