"""What the scripts refuse of a model to go on from: other sizes and ranks, another family, another tokenizer."""

from __future__ import annotations

import pytest
from transformers import BertConfig, BertForPreTraining, GPT2Config, GPT2LMHeadModel, MarianConfig, MarianMTModel

from hf_fnl import FactorizedBertConfig, FactorizedBertForPreTraining
from hf_fnl.scripts import pretrain_bert, train_clm, train_translation
from hf_fnl.tasks.embedded import embedded_documents
from hf_fnl.tasks.tokenization import train_byte_bpe, train_joint_bpe, train_wordpiece

SIZES = {"vocab_size": 300, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40}
HEADS = {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "decoder_ffn_dim": 40, "pad_token_id": 1}
BERT = {"vocab_size": 300, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Models of each family with their tokenizers, and a longer tokenizer."""
    folder, texts = tmp_path_factory.mktemp("sources"), embedded_documents()[:3]
    gpt2 = GPT2Config(vocab_size=300, n_embd=24, n_layer=1, n_head=3, n_positions=32)
    made = {
        "bert": (BertForPreTraining(BertConfig(**BERT)), train_wordpiece),
        "factorized": (FactorizedBertForPreTraining(FactorizedBertConfig(**BERT, ffn_rank=5)), train_wordpiece),
        "gpt2": (GPT2LMHeadModel(gpt2), train_byte_bpe),
        "marian": (MarianMTModel(MarianConfig(**SIZES, **HEADS, decoder_start_token_id=1)), train_joint_bpe),
    }
    for name, (model, train) in made.items():
        model.save_pretrained(folder / name)
        train(texts, vocab_size=300).save_pretrained(folder / name)
    train_wordpiece(texts, vocab_size=400).save_pretrained(folder / "longer")
    return folder


@pytest.mark.parametrize(
    ("script", "source", "flags", "message"),
    [
        (pretrain_bert, "bert", "--ffn_rank 4", "ffn_rank=4 is for a fresh model, and the one of .* has None"),
        (pretrain_bert, "factorized", "--ffn_rank 4", "ffn_rank=4 is for a fresh model, and the one of .* has 5"),
        (pretrain_bert, "bert", "--dropout 0", r"dropout=0\.0 is for .* has 0\.1: leave dropout out"),
        (pretrain_bert, "bert", "--num_attention_heads 2", "num_attention_heads=2 is for .* has 3"),
        (pretrain_bert, "factorized", "--factor_init he", "factor_init=he is for .* has spectral"),
        (pretrain_bert, "factorized", "--stock true", "it is a factorized_bert, which BertForPreTraining does not"),
        (pretrain_bert, "gpt2", "", "it is a gpt2, which FactorizedBertForPreTraining does not load"),
        (pretrain_bert, "bert", "--tokenizer {folder}/longer", "has 400 tokens, and this .* embeds 300"),
        (train_clm, "bert", "", "it is a bert, which FactorizedGPT2LMHeadModel does not load"),
        (train_clm, "gpt2", "--rank_scale 0.5", r"rank_scale=0\.5 is for .* leave rank_scale out"),
        (train_clm, "gpt2", "--rank_scale 0.5 --dense_steps 1", r"rank_scale=0\.5 is for .* leave rank_scale out"),
        (train_translation, "marian", "--ov_rank 4", "ov_rank=4 is for .* has None"),
        (train_translation, "marian", "--normalize_before true", "normalize_before=True is for .* has None"),
        (train_translation, "marian", "--intermediate_size 48", "intermediate_size=48 is for .* has 40"),
    ],
)
def test_what_a_model_to_go_on_from_has_not_is_refused(sources, tmp_path, script, source, flags, message):
    limit = "--max_train_pairs 20" if script is train_translation else "--max_documents 3"
    given = f"--init_from {sources}/{source} {flags} {limit} --output_dir {tmp_path}/run --use_cpu --max_steps 2"
    with pytest.raises(ValueError, match=message):
        script.main(given.format(folder=sources).split())
    assert not (tmp_path / "run").exists()


def test_a_trained_model_is_dense_at_first_and_then_of_the_ranks_and_the_method_that_are_given(sources, tmp_path):
    flags = "--dense_steps 1 --max_steps 2 --ffn_rank 4 --factor_init spectral_ones --save_strategy no --report_to none"
    given = f"--init_from {sources}/gpt2 {flags} --output_dir {tmp_path} --max_documents 3 --use_cpu"
    train_clm.main(given.split())
    config = train_clm.FactorizedGPT2LMHeadModel.from_pretrained(tmp_path).config
    assert (config.ffn_rank, config.factor_init) == (4, "spectral_ones")
