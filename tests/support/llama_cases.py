"""Small Llamas, shared by the tests of all families: heads share keys and values, and are wider than need be."""

from typing import Any

from family import Family, Head
from gpt2_cases import next_words, tokens

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = Family(
    "Llama",
    SIZES,
    {"all": {"ov_rank": 6, "ffn_rank": 28, "embedding_rank": 28}, "one-layer": {"ov_rank": [6, None]}},
    {"all": {"ov_rank": 2, "ffn_rank": 8, "embedding_rank": 13}, "only-ov": {"ov_rank": 3}},
    "layers.{}",
)
HEADS = {
    "backbone": Head(LLAMA, "Model", "AutoModel", tokens),
    "lm": Head(LLAMA, "ForCausalLM", "AutoModelForCausalLM", next_words, config={"tie_word_embeddings": True}),
    "biases": Head(
        LLAMA,
        "ForCausalLM",
        "AutoModelForCausalLM",
        next_words,
        config={"attention_bias": True, "mlp_bias": True},
    ),
}
