"""The models of the zoo."""

from models.train.loop import Recipe

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
        "max_position_embeddings": 512,
    },
    steps=2500,
)

RECIPES = {recipe.name: recipe for recipe in (GLA,)}
