"""Selectors, and the parts of stock models that they tell apart."""

from collections import Counter

import pytest
import transformers as T
from torch import nn

from hf_fnl import FactorizationConfig, factorize_
from hf_fnl.attention import find_products
from hf_fnl.attention.selectors import KINDS, PARTS, Selector

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Two layers of encoder, three of decoder, so that neither can pass for the other.
_BART = {
    "vocab_size": 13,
    "d_model": 15,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 7,
    "decoder_ffn_dim": 7,
    "max_position_embeddings": 11,
    **_TOKENS,
}
_BERT = {
    "vocab_size": 13,
    "hidden_size": 15,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 7,
    "max_position_embeddings": 11,
}
_T5 = {"vocab_size": 13, "d_model": 15, "d_kv": 4, "num_heads": 3, "d_ff": 7, "num_layers": 2, **_TOKENS}
_GPT2 = {"vocab_size": 13, "n_embd": 15, "n_head": 3, "n_layer": 2, "n_positions": 11, **_TOKENS}
_CROSS_BERT = {**_BERT, "is_decoder": True, "add_cross_attention": True}


def _marian(**fields) -> T.MarianConfig:
    return T.MarianConfig(**_BART, decoder_start_token_id=0, forced_eos_token_id=None, **fields)


def _bert_pair() -> T.EncoderDecoderModel:
    decoder = T.BertConfig(**{**_CROSS_BERT, "num_hidden_layers": 3})
    return T.EncoderDecoderModel(T.EncoderDecoderConfig.from_encoder_decoder_configs(T.BertConfig(**_BERT), decoder))


BOTH = {"encoder": 2, "decoder": 3, "cross": 3}
# Each model, and how many attentions it has in each part.
MODELS = {
    "marian": (lambda: T.MarianMTModel(_marian()), BOTH),
    "marian-decoder": (lambda: T.MarianForCausalLM(_marian()), {None: 3, "cross": 3}),
    "t5": (lambda: T.T5ForConditionalGeneration(T.T5Config(**_T5, num_decoder_layers=3)), BOTH),
    "t5-encoder": (lambda: T.T5EncoderModel(T.T5Config(**_T5)), {None: 2}),
    "bert-pair": (_bert_pair, BOTH),
    "bert": (lambda: T.BertForPreTraining(T.BertConfig(**_BERT)), {None: 2}),
    "bert-with-cross-attention": (lambda: T.BertLMHeadModel(T.BertConfig(**_CROSS_BERT)), {None: 2, "cross": 2}),
    "gpt2": (lambda: T.GPT2LMHeadModel(T.GPT2Config(**_GPT2)), {None: 2}),
    "gpt2-with-cross-attention": (
        lambda: T.GPT2LMHeadModel(T.GPT2Config(**_GPT2, add_cross_attention=True)),
        {None: 2, "cross": 2},
    ),
    "torch": (lambda: nn.Transformer(16, 4, 2, 3, 7, batch_first=True), BOTH),
    "inside-another": (lambda: nn.ModuleDict({"model": T.MarianMTModel(_marian())}), BOTH),
}


@pytest.fixture(scope="module")
def factorized() -> T.MarianMTModel:
    """Marian whose linear layers and embeddings, which its parts do not share, are products."""
    model = T.MarianMTModel(_marian(share_encoder_decoder_embeddings=False, tie_word_embeddings=False))
    factorize_(model, FactorizationConfig(rank=2, kinds=("linear", "embedding"), exclude=("*embed_positions",)))
    return model


@pytest.mark.parametrize("text", ["tensor", *(f"ov:{part}" for part in PARTS)])
def test_a_selector_is_written_as_it_is_read(text):
    assert str(Selector.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("ov", {("ov", None), ("ov", "encoder"), ("ov", "decoder"), ("ov", "cross")}),
        ("ov:encoder", {("ov", "encoder")}),
        ("qk:cross", {("qk", "cross")}),
    ],
)
def test_a_selector_matches_its_kind_in_its_part(text, matches):
    everything = {(kind, part) for kind in KINDS for part in (None, *PARTS)}
    assert {pair for pair in everything if Selector.parse(text).matches(*pair)} == matches


@pytest.mark.parametrize("text", ["vo", "ov:", ":encoder", "ov:head", "ov:encoder:cross", "OV", "", "ov: encoder"])
def test_what_is_no_selector(text):
    message = (
        "^frobenius_decay must be any of linear, embedding, conv, qk, ov, tensor, each alone or with one of the parts "
        f"encoder, decoder, cross, as in 'ov:encoder'; got '{text}'$"
    )
    with pytest.raises(ValueError, match=message):
        Selector.parse(text, "frobenius_decay")


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_models(name):
    build, expected = MODELS[name]
    model = build()
    for kind in ("qk", "ov"):
        assert Counter(product.part for product in find_products(model, [kind])) == expected
        for part in expected.keys() - {None}:
            chosen = find_products(model, [f"{kind}:{part}"])
            assert [(p.kind, p.part) for p in chosen] == [(kind, part)] * expected[part]


def test_selectors_add_up_and_keep_the_order_of_the_model():
    model = T.MarianModel(_marian())
    chosen = find_products(model, ["ov:decoder", "ov:encoder", "qk:cross", "qk:cross"])
    assert [p.name for p in chosen] == [
        *(f"encoder.layers.{number}.self_attn.ov" for number in range(2)),
        *(
            name
            for number in range(3)
            for name in (f"decoder.layers.{number}.self_attn.ov", f"decoder.layers.{number}.encoder_attn.qk")
        ),
    ]


def test_factorized_layers_belong_to_the_part_that_holds_them(factorized):
    parts = {p.name: p.part for p in find_products(factorized, ["linear", "embedding"])}
    assert parts["model.encoder.layers.0.self_attn.q_proj"] == parts["model.encoder.layers.1.fc1"] == "encoder"
    assert parts["model.decoder.layers.0.self_attn.q_proj"] == parts["model.decoder.layers.2.fc2"] == "decoder"
    assert parts["model.decoder.layers.1.encoder_attn.out_proj"] == "cross"
    assert parts["model.encoder.embed_tokens"] == "encoder"
    assert parts["model.decoder.embed_tokens"] == "decoder"
    assert parts["lm_head"] is None


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        pytest.param({}, None, id="encoder-and-decoder"),
        pytest.param({"share_encoder_decoder_embeddings": False}, "decoder", id="decoder-and-output"),
    ],
)
def test_shared_embeddings_belong_to_a_part_only_if_it_is_one(fields, part):
    model = T.MarianMTModel(_marian(**fields))
    factorize_(model, FactorizationConfig(rank=2, kinds=("embedding",), exclude=("*embed_positions",)))
    assert find_products(model, ["embedding"])[-1].part == part


@pytest.mark.parametrize(
    ("name", "selector", "there"),
    [
        ("marian", "linear:cross", "ov:cross, ov:decoder, ov:encoder, qk:cross, qk:decoder, qk:encoder"),
        ("bert", "ov:encoder", "ov, qk"),
        ("gpt2-with-cross-attention", "ov:decoder", "ov, ov:cross, qk, qk:cross"),
    ],
)
def test_errors_say_which_parts_there_are(name, selector, there):
    with pytest.raises(ValueError, match=f"has no product of kind {selector}; it has: {there}$"):
        find_products(MODELS[name][0](), ["ov", selector])
