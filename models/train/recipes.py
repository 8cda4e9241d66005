"""The models of the zoo."""

from models.train.loop import Recipe
from models.train.objectives import every_exit, gated_loops, picked_tokens

VOCABULARY = 4096

GLA = Recipe(
    "gla",
    {
        "architectures": ["GLAForCausalLM"],
        "model_type": "gla",
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_heads": 4,
        "expand_k": 0.5,
        "expand_v": 1.0,
        "intermediate_size": 768,
        "hidden_act": "swish",
        "norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "max_position_embeddings": 4096,
    },
    steps=2100,
    long_length=4096,
)

SORTED = Recipe(
    "sorted",
    {
        "model_type": "sorted",
        "base": GLA.config,
        "exits": [2, 3, 4],
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    objective=every_exit,
    steps=1426,
    tokens=16384,
    learning_rate=1e-3,
    warmup=30,
    start="gla",
)

MOR = Recipe(
    "mor",
    {
        "model_type": "routed",
        "base": GLA.config,
        "sharing": "middle_cycle",
        "num_recursions": 3,
        "skipped": "absent",
        "mor": {
            "type": "expert",
            "router_type": "linear",
            "expert": {
                "router_func": "sigmoid",
                "alpha": 2.0,  # a router that knows nothing lets pass all that a recursion changes
                "sampling": "aux_loss",
                "gating": "residual",
            },
        },
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    objective=picked_tokens,
    steps=390,
    tokens=4096,
    learning_rate=1e-3,
    warmup=30,
    start="looped-gla",
    muon=False,
)

LOOPED_GLA = Recipe(
    "looped-gla",
    {
        "model_type": "recursive",
        "base": GLA.config,
        "sharing": "middle_cycle",
        "num_recursions": 3,
        "skipped": "absent",
        "exit_gate": True,
        "default_depth": "gate(0.5)",
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    objective=gated_loops,
    steps=497,
    tokens=16384,
    learning_rate=1e-3,
    warmup=30,
    start="gla",
)

RECIPES = {recipe.name: recipe for recipe in (GLA, SORTED, LOOPED_GLA, MOR)}
