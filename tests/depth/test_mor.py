"""Mixture-of-Recursions from the published files: against a plain decoder that is written from the equations and reads
the tensors by their published names."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.errors import ConfigError
from models.load import load
from serving import LLM, SamplingParams
from serving.engine.depth import DepthPolicy
from tests.engine.fake import assert_no_leak

D, HEADS, KV, HEAD, INNER, VOCAB = 20, 4, 2, 6, 28, 53
AUX_LOSS = {"router_func": "sigmoid", "alpha": 0.1, "sampling": "aux_loss", "gating": "weighted"}


def make(folder: Path, *, expert: bool, sharing: str = "middle_cycle", n: int = 3, base: int = 2, untied: bool = True,
         mlp_router: bool = False, kv: dict[str, Any] | None = None, capacity: str | None = None,
         part: dict[str, Any] | None = None) -> Path:  # fmt: skip
    """A random checkpoint with the published names; `part` is the section of its kind of routing."""
    torch.manual_seed(0)
    part = AUX_LOSS if part is None else part
    plain = 1 if sharing == "middle_cycle" else 0
    tensors: dict[str, Tensor] = {}

    def put(name: str, *shape: int, scale: float = 0.3, mean: float = 0.0) -> None:
        tensors[name] = torch.randn(shape) * scale + mean

    def layer(prefix: str, attention_only: bool = False) -> None:
        for part, rows in (("q", HEADS * HEAD), ("k", KV * HEAD), ("v", KV * HEAD)):
            put(f"{prefix}self_attn.{part}_proj.weight", rows, D)
        put(f"{prefix}self_attn.o_proj.weight", D, HEADS * HEAD)
        if not attention_only:
            put(f"{prefix}mlp.gate_proj.weight", INNER, D)
            put(f"{prefix}mlp.up_proj.weight", INNER, D)
            put(f"{prefix}mlp.down_proj.weight", D, INNER)
            put(f"{prefix}input_layernorm.weight", D, scale=0.2, mean=1)
            put(f"{prefix}post_attention_layernorm.weight", D, scale=0.2, mean=1)

    def router(prefix: str, outputs: int) -> None:
        if mlp_router:
            put(f"{prefix}router.0.weight", 2 * D, D)
            put(f"{prefix}router.2.weight", outputs, 2 * D)
        else:
            put(f"{prefix}router.weight", outputs, D)

    put("model.embed_tokens.weight", VOCAB, D, scale=1.0)
    put("model.norm.weight", D, scale=0.2, mean=1)
    put("lm_head.weight", VOCAB, D)
    for r in range(n):
        for j in range(base):
            at = (
                f"model.layers.{plain + r}.block.{j}."
                if expert
                else f"model.layers.{plain}.block_list.{r}.{j}."
            )
            first = (
                f"model.layers.{plain}.block.{j}." if expert else f"model.layers.{plain}.block_list.0.{j}."
            )
            if r == 0:
                layer(at)
            else:
                for name in [name for name in tensors if name.startswith(first)]:
                    tensors[at + name.removeprefix(first)] = tensors[name].clone()
                if untied:
                    layer(at, attention_only=True)
        if expert:
            router(f"model.layers.{plain + r}.mor_router.", 1)
            if part["sampling"] == "aux_router":
                router(f"model.layers.{plain + r}.mlp_router.", 1)
    if not expert:
        router(f"model.layers.{plain}.mor_router.", n)
        if part.get("balancing") == "loss_free":
            put(f"model.layers.{plain}.router_bias", n, scale=0.5)
    if plain:
        layer("model.layers.0.")
        layer(f"model.layers.{1 + (n if expert else 1)}.")
    folder.mkdir(exist_ok=True)
    save_file(tensors, str(folder / "model.safetensors"))
    config = {
        "architectures": ["MoRLlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": D,
        "intermediate_size": INNER, "num_hidden_layers": 2 * plain + n * base, "num_attention_heads": HEADS,
        "num_key_value_heads": KV, "head_dim": HEAD, "rms_norm_eps": 1e-6, "max_position_embeddings": 256,
        "rope_theta": 10000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    kind = "expert" if expert else "token"
    mor = {
        "type": kind,
        "router_type": "mlp" if mlp_router else "linear",
        "temp": 1.0,
        "capacity": capacity,
        kind: part,
    }
    text = {
        "recursive": {"enable": True, "num_recursion": n, "sharing": sharing},
        "kv_sharing": kv or {"enable": False}, "mor": {"enable": True, **mor},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(text))
    return folder


class Reference:
    """One sequence, one token at a time."""

    def __init__(self, folder: Path, depth: int | None = None):
        self.w = load_file(str(folder / "model.safetensors"))
        self.y = yaml.safe_load((folder / "config.yaml").read_text())
        self.n = self.y["recursive"]["num_recursion"]
        self.plain = 1 if self.y["recursive"]["sharing"] == "middle_cycle" else 0
        self.layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        self.base = (self.layers - 2 * self.plain) // self.n
        self.mor, self.kv = self.y["mor"], self.y["kv_sharing"]
        self.fixed = depth
        self.entries: dict[tuple[Any, ...], dict[int, tuple[Tensor, Tensor]]] = {}

    def generate(self, prompt: list[int], count: int) -> tuple[list[int], list[float], list[int]]:
        ids, logprobs, depths = list(prompt), [], []
        for position in range(len(prompt) + count - 1):
            logits, depth = self.token(ids[position], position)
            if position >= len(prompt) - 1:
                ids.append(int(logits.argmax()))
                logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
                depths.append(depth)
        return ids[len(prompt) :], logprobs, depths

    def token(self, token: int, position: int) -> tuple[Tensor, int]:
        x = self.w["model.embed_tokens.weight"][token]
        if self.plain:
            x = self.layer("model.layers.0.", x, position, ("first",))
        x, depth = (self.expert if self.mor["type"] == "expert" else self.token_choice)(x, position)
        if self.plain:
            last = f"model.layers.{1 + (self.n if self.mor['type'] == 'expert' else 1)}."
            x = self.layer(last, x, position, ("last",))
        return self.w["lm_head.weight"] @ self.norm("model.norm.weight", x), depth

    def expert(self, x: Tensor, position: int) -> tuple[Tensor, int]:
        part = self.mor["expert"]
        capacity = self.mor.get("capacity")
        shares = [(self.n - r) / self.n for r in range(self.n)]
        if capacity is not None:
            shares = [float(c) for c in capacity.split(",")]
        for r in range(self.n):
            at = f"model.layers.{self.plain + r}."
            logit = self.route(at + "mor_router.", x / self.mor["temp"])[0]
            judge = self.route(at + "mlp_router.", x)[0] if part["sampling"] == "aux_router" else logit
            goes = r < self.fixed if self.fixed is not None else shares[r] >= 1 or judge >= 0
            if not goes:
                if self.kv.get("update_cache"):
                    self.fill(r, position)
                return x, r
            y = x
            for j in range(self.base):
                y = self.layer(f"{at}block.{j}.", y, position, ("core", j), r)
            functions = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "none": lambda s: s}
            gate = functions[part.get("router_func", "sigmoid")](logit)
            if part.get("router_func", "sigmoid") != "none":
                gate = gate * part.get("alpha", 0.1)
            x = x + (gate * y if part.get("gating", "weighted") == "weighted" else y)
        return x, self.n

    def fill(self, exit_: int, position: int) -> None:
        """At the recursions that the token skips, later tokens see what it wrote at its last one."""
        for r in range(max(exit_, 1), self.n):
            for j in range(self.base):
                known = self.entries[("core", j, max(exit_, 1) - 1)][position]
                self.entries.setdefault(("core", j, r), {})[position] = known

    def token_choice(self, x: Tensor, position: int) -> tuple[Tensor, int]:
        part = self.mor["token"]
        at = f"model.layers.{self.plain}."
        logits = self.route(at + "mor_router.", x / self.mor["temp"])
        sigmoid = part.get("router_func") == "sigmoid"
        p = (
            torch.sigmoid(logits) * part.get("alpha", 0.1)
            if sigmoid
            else logits.softmax(-1) * part.get("alpha", 1.0)
        )
        biased = p + self.w[at + "router_bias"] if part.get("balancing") == "loss_free" else p
        depth = int(biased.argmax()) + 1 if self.fixed is None else self.fixed
        h = x
        for r in range(depth):
            for j in range(self.base):
                h = self.layer(f"{at}block_list.{r}.{j}.", h, position, ("core", j), r)
        return x + (p[depth - 1] * h if part.get("gating", "weighted") == "weighted" else h), depth

    def route(self, prefix: str, x: Tensor) -> Tensor:
        if prefix + "router.weight" in self.w:
            return self.w[prefix + "router.weight"] @ x
        inner = torch.nn.functional.gelu(self.w[prefix + "router.0.weight"] @ x)
        return self.w[prefix + "router.2.weight"] @ inner

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean() + 1e-6) * self.w[name]

    def layer(self, prefix: str, x: Tensor, position: int, where: tuple[Any, ...], r: int = 0) -> Tensor:
        h = self.norm(prefix + "input_layernorm.weight", x)
        q, k, v = ((self.w[f"{prefix}self_attn.{p}_proj.weight"] @ h).view(-1, HEAD) for p in "qkv")
        q, k = self.rotate(q, position), self.rotate(k, position)
        shared = self.kv.get("enable") and not self.kv.get("update_cache") and where[0] == "core"
        known = self.entries.setdefault((*where, 0 if shared else r), {})
        if not (shared and r):
            known[position] = (k, v)
        seen = [known[p] for p in sorted(known) if p <= position]
        keys, values = (torch.stack(z) for z in zip(*seen, strict=True))
        out = []
        for head in range(HEADS):
            weights = (keys[:, head * KV // HEADS] @ q[head] * HEAD**-0.5).softmax(0)
            out.append(weights @ values[:, head * KV // HEADS])
        x = x + self.w[prefix + "self_attn.o_proj.weight"] @ torch.cat(out)
        h = self.norm(prefix + "post_attention_layernorm.weight", x)
        gate = torch.nn.functional.silu(self.w[prefix + "mlp.gate_proj.weight"] @ h)
        return x + self.w[prefix + "mlp.down_proj.weight"] @ (
            gate * (self.w[prefix + "mlp.up_proj.weight"] @ h)
        )

    def rotate(self, x: Tensor, position: int) -> Tensor:
        angles = position / 10000.0 ** (torch.arange(0, HEAD, 2).float() / HEAD)
        a, b = x[:, : HEAD // 2], x[:, HEAD // 2 :]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


KINDS: dict[str, dict[str, Any]] = {
    "expert": {"expert": True, "part": AUX_LOSS},
    "expert tied shared": {
        "expert": True,
        "untied": False,
        "kv": {"enable": True, "update_cache": False},
        "part": AUX_LOSS,
    },
    "expert untied shared": {"expert": True, "kv": {"enable": True, "update_cache": False}, "part": AUX_LOSS},
    "expert tied update_cache": {
        "expert": True,
        "untied": False,
        "kv": {"enable": True, "update_cache": True},
        "part": AUX_LOSS,
    },
    "expert untied update_cache": {"expert": True, "kv": {"enable": True, "update_cache": True}, "part": AUX_LOSS},
    "expert cycle aux_router": {
        "expert": True, "sharing": "cycle", "mlp_router": True, "capacity": "0.9,0.5", "n": 2,
        "part": {**AUX_LOSS, "sampling": "aux_router", "router_func": "tanh", "alpha": 0.5},
    },
    "expert unweighted": {"expert": True, "base": 1, "part": {**AUX_LOSS, "gating": None, "router_func": "none"}},
    "token": {"expert": False, "part": {"router_func": "softmax", "balancing": "loss_free", "gating": "weighted"}},
    "token cycle sigmoid": {
        "expert": False, "sharing": "cycle", "mlp_router": True, "untied": False,
        "part": {"router_func": "sigmoid", "alpha": 0.5, "balancing": "loss"},
    },
    "token shared": {"expert": False, "kv": {"enable": True}, "part": {"router_func": "softmax", "gating": "none"}},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_plain_decoder(tmp_path: Path, kind: str) -> None:
    folder = make(tmp_path, **KINDS[kind])
    rng = random.Random(kind)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in (1, 7, 30, 7)]
    llm = LLM(folder, dtype="float32", slots=3, prefill_tokens=11)
    policies: list[tuple[DepthPolicy | None, int | None]] = [(None, None), (DepthPolicy.fixed(1), 1)]
    for policy, fixed in policies:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0, depth=policy)
        made = llm.generate(prompts, params)
        depths = set()
        for prompt, completion in zip(prompts, made, strict=True):
            ids, logprobs, expected = Reference(folder, fixed).generate(prompt, 12)
            assert completion.token_ids == ids
            assert completion.depths == expected
            assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)
            depths |= set(expected)
        if fixed is None:
            assert len(depths) > 1, "the router always says the same: nothing is tested"
    assert_no_leak(llm.engine)


def test_untied_attention_stays_and_tied_weights_are_shared(tmp_path: Path) -> None:
    untied = load(make(tmp_path / "a", expert=True)).model
    block = untied.blocks[1]
    assert len(block.mixer.copies) == 3 and len(block.mlp.copies) == 1 and len(block.mixer_norm.copies) == 1  # type: ignore[union-attr]
    tied = load(make(tmp_path / "b", expert=True, untied=False)).model
    assert len(tied.blocks[1].mixer.copies) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mor": {"type": "expert", "expert": {"sampling": "top_k"}}}, "sampling"),
        ({"mor": {"type": "token", "token": None}}, "section token"),
        ({"recursive": {"num_recursion": 4, "sharing": "middle_cycle"}}, "num_hidden_layers = 8"),
        ({"recursive": {"num_recursion": 3, "sharing": "sequence"}}, "sharing"),
        ({"mor": {"type": "expert", "capacity": "1,0.5", "expert": AUX_LOSS}}, "mor.capacity"),
        (
            {
                "mor": {"type": "expert", "capacity": "0.9,0.5,0.1", "expert": AUX_LOSS},
                "kv_sharing": {"enable": True},
            },
            "mor.capacity = '0.9,0.5,0.1'.*begin with 1 where skipped recursions are shared",
        ),
        ({"relaxation": {"enable": True}}, "relaxation.enable"),
        ({"kv_sharing": {"enable": True, "num_recursion": 2}}, "kv_sharing.num_recursion = 2.*must be"),
        ({"kv_sharing": {"enable": True, "sharing": "cycle"}}, "kv_sharing.sharing = 'cycle'.*middle_cycle"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = make(tmp_path, expert=True)
    text = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**text, **change}))
    with pytest.raises(ConfigError, match=words):
        load(folder)
