"""Trainings of BERT and GPT-2 for grids: masks, windows, decays, going on after a break, and plans that parse."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from benchmarks.grid_runs import _words, read_plan
from benchmarks.training import bert, gpt2
from benchmarks.training.common import Broken, Run
from benchmarks.training.squad_data import MAX_ANSWER_LENGTH, best_spans, read_questions, score_answers
from benchmarks.training.text_data import TextData, Tokens

WORDS = "the cat sat on a mat while seven dogs ran over green hills near old towns with many cold rivers"
TEXT_PLANS = ("k21_table4_tuning", "k21_table4_bert", "text_rates_bert", "text_rates_gpt2", "k22_table4_7_gpt2")
SIZES = ["--hidden_size", "16", "--layers", "1", "--heads", "2", "--device", "cpu", "--vocab_size", "300"]
OFTEN = ["--log_steps", "2", "--eval_steps", "4", "--check_steps", "1"]
BERT = [*SIZES, *OFTEN, "--phases", "16:4:4", "24:4:4", "--head_rank", "4", "--eval_windows", "8", "--lr", "1e-2"]
BERT += ["--squad_length", "64", "--squad_stride", "16", "--squad_epochs", "1", "--squad_batch", "4"]
GPT2 = [*SIZES, *OFTEN, "--length", "16", "--batch", "4", "--steps", "12", "--eval_blocks", "8", "--eval_batch", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of articles and questions in the form of the real ones."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def text(words):
        return " ".join(random.choice(WORDS.split(), words)) + "."

    (folder / "wikipedia").mkdir()
    for split, count in {"train": 12, "validation": 4}.items():
        table = pa.table({"title": ["a"] * count, "text": [text(90) for _ in range(count)]})
        parquet.write_table(table, folder / "wikipedia" / f"{split}.parquet")
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "test.txt").write_text(text(90))
    (folder / "squad").mkdir()
    for name, contexts in {"train-partial-v1.1": 6, "dev-v1.1": 3}.items():
        paragraphs = []
        for number in range(contexts):
            context = text(60)
            begin = context.index(" ", 200) + 1
            answer = {"text": context[begin : context.index(" ", begin + 8)], "answer_start": begin}
            asked = [{"id": f"{number}-{i}", "question": f" Where is {text(3)}", "answers": [answer]} for i in range(2)]
            paragraphs.append({"context": context, "qas": asked})
        content = {"data": [{"title": "a", "paragraphs": paragraphs}]}
        (folder / "squad" / f"{name}.json").write_text(json.dumps(content))
    return folder


def run(program, out, data, *options):
    return program.main(["--out", str(out), "--data", str(data), *options])


def break_off(monkeypatch, number):
    """Runs stop at their check of this number."""
    calls = iter(range(1, 10**6))
    monkeypatch.setattr(Run, "must_stop", lambda self: next(calls) == number)


def test_masks_hide_fifteen_percent_by_the_rule_of_bert():
    ids = torch.randint(bert.FIRST_ORDINARY, 1000, (400, 102))
    ids[:, 0], ids[:, -1] = bert.CLS, bert.SEP
    batch = bert.mask_tokens(ids, 1000)
    assert batch.positions.shape == (400, 15)
    assert all(len(set(row)) == 15 for row in batch.positions.tolist())
    assert batch.positions.min() >= 1
    assert batch.positions.max() <= 100
    torch.testing.assert_close(batch.labels, ids.gather(1, batch.positions))
    torch.testing.assert_close(batch.ids.scatter(1, batch.positions, batch.labels), ids)
    shown = batch.ids.gather(1, batch.positions)
    masked, kept = shown == bert.MASK, shown == batch.labels
    others = shown[~masked & ~kept]
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean().item() == pytest.approx(0.1, abs=0.015)
    assert others.min() >= bert.FIRST_ORDINARY


def test_windows_lie_in_one_document_each():
    corpus = bert.Corpus(Tokens(np.arange(10, 30, dtype=np.uint16), np.array([0, 7, 9, 20])), torch.device("cpu"))
    assert corpus.window_begins(5).tolist() == [0, 1, 2, 9, 10, 11, 12, 13, 14, 15]
    assert corpus.even_begins(5, 100).tolist() == [0, 9, 14]
    assert corpus.windows(torch.tensor([9]), 5).tolist() == [[bert.CLS, 19, 20, 21, 22, 23, bert.SEP]]
    with pytest.raises(ValueError, match="lower --phases"):
        corpus.window_begins(12)


def bert_model(seed=0):
    options = bert.parse([*BERT, "--out", "x", "--seed", str(seed), "--head_rank", "8"])
    return bert.build_model(options, 300)


def after_steps(optimizer, ov_decay, steps):
    model, rate = bert_model(), torch.tensor(1e-2)
    trained = bert.build_optimizer(optimizer, model, rate, 0.01, ov_decay)
    products = bert.find_products(model, ["ov"])
    for step in range(steps):
        torch.manual_seed(step)
        batch = bert.mask_tokens(torch.randint(5, 300, (4, 16)), 300)
        loss = torch.nn.functional.cross_entropy(bert.masked_logits(model, batch), batch.labels.flatten())
        if optimizer == "lamb_fd":
            loss = loss + bert.frobenius_penalty(products, model, ov_decay)
        model.zero_grad()
        loss.backward()
        trained.step()
    return dict(model.named_parameters()), {name for product in products for name in product.parameter_names}


@pytest.mark.parametrize("optimizer", ["lamb_fd", "flambe"])
def test_optimizers_differ_in_the_decay_of_output_value_products_alone(optimizer):
    none, _ = after_steps("lamb", bert.NO_DECAY, 3)
    same, _ = after_steps(optimizer, bert.NO_DECAY, 3)
    torch.testing.assert_close(same, none)
    lamb, factors = after_steps("lamb", 50.0, 1)
    other, _ = after_steps(optimizer, 50.0, 1)
    differ = {name for name in lamb if not torch.allclose(lamb[name], other[name], rtol=1e-4, atol=1e-7)}
    assert differ >= factors
    if optimizer == "flambe":  # a penalty also changes the norm by which all gradients are clipped
        assert differ == factors


def test_halved_heads_are_cut_from_the_heads_of_the_full_model():
    full = bert_model()
    options = bert.parse([*BERT, "--out", "x", "--seed", "0", "--head_rank", "4"])
    half = bert.build_model(options, 300)
    differ = {
        name
        for (name, ours), theirs in zip(half.named_parameters(), full.parameters(), strict=True)
        if ours.shape != theirs.shape or not torch.equal(ours, theirs)
    }
    assert all("attention" in name for name in differ)
    for short, long in zip(bert.find_products(half, ["ov"]), bert.find_products(full, ["ov"]), strict=True):
        expected = long.singular_values(full)[..., :4]
        torch.testing.assert_close(short.singular_values(half)[..., :4], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optimizer", bert.OPTIMIZERS)
def test_bert_goes_on_as_if_it_had_not_been_broken_off(optimizer, data, tmp_path, monkeypatch):
    options = [*BERT, "--optimizer", optimizer, "--ov_decay", "0.1", "--squad_seeds"]
    expected = run(bert, tmp_path / "a", data, *options, "3", "4")
    assert {"mlm_loss", "f1", "exact_match", "ov_effective_rank"} <= expected["measures"].keys()
    assert [scores["seed"] for scores in expected["fine_tuning"]] == [3, 4]
    for number in (2, 4):  # in the first phase, and after that in the second
        break_off(monkeypatch, number)
        with pytest.raises(Broken):
            run(bert, tmp_path / "b", data, *options, "3", "4")
    monkeypatch.undo()
    found = run(bert, tmp_path / "b", data, *options, "3", "4")
    timed = "pretraining_seconds"
    assert {**found["measures"], timed: 0} == {**expected["measures"], timed: 0}
    assert found["fine_tuning"] == expected["fine_tuning"]
    assert len(found["history"]) == len(expected["history"])
    assert not (tmp_path / "b" / "checkpoint.pt").exists()


def test_bert_broken_off_in_fine_tuning_does_not_pretrain_again(data, tmp_path, monkeypatch):
    options = [*BERT, "--squad_seeds", "1", "2"]
    expected = run(bert, tmp_path / "a", data, *options)
    break_off(monkeypatch, 8 + 5)  # eight updates of pretraining, three of the first fine-tuning
    with pytest.raises(Broken, match="fine-tuning"):
        run(bert, tmp_path / "b", data, *options)
    monkeypatch.undo()
    monkeypatch.setattr(bert, "Pretraining", None)
    assert run(bert, tmp_path / "b", data, *options)["fine_tuning"] == expected["fine_tuning"]


@pytest.mark.parametrize("number", [2, 3, 5], ids=["dense", "at the switch", "low-rank"])
def test_gpt2_goes_on_as_if_it_had_not_been_broken_off(number, data, tmp_path, monkeypatch):
    options = [*GPT2, "--form", "dense_first", "--decay", "FD"]
    expected = run(gpt2, tmp_path / "a", data, *options)
    break_off(monkeypatch, number)
    with pytest.raises(Broken):
        run(gpt2, tmp_path / "b", data, *options)
    monkeypatch.undo()
    found = run(gpt2, tmp_path / "b", data, *options)
    assert found["measures"] == expected["measures"]
    assert found["history"] == expected["history"]


def test_gpt2_learns_and_its_forms_have_the_same_data(data, tmp_path):
    measures, losses = {}, {}
    for form in gpt2.FORMS:
        result = run(gpt2, tmp_path / form, data, *GPT2, "--form", form, "--lr", "2e-2")
        measures[form], losses[form] = result["measures"], [line["loss"] for line in result["history"][:-1]]
        assert losses[form][-1] < losses[form][0] - 0.5
    assert losses["dense"][0] == losses["dense_first"][0] != losses["low_rank"][0]
    assert measures["dense"]["parameters"] > measures["low_rank"]["parameters"]
    assert measures["low_rank"]["parameters"] == measures["dense_first"]["parameters"]
    assert "effective_rank" not in measures["dense"]


def test_l2_and_frobenius_decay_differ_in_the_factors_alone():
    options = gpt2.parse([*GPT2, "--out", "x"])
    moved = {}
    for decay in (False, True):
        model = gpt2.build_model(options, 300, dense=False)
        optimizer, _ = gpt2.build_optimizer(model, torch.tensor(0.1), 0.5, frobenius=decay)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moved[decay] = dict(model.named_parameters())
    factors = {name for product in gpt2.linear_products(model) for name in product.parameter_names}
    assert {name for name in moved[True] if not torch.equal(moved[True][name], moved[False][name])} == factors
    start = dict(gpt2.build_model(options, 300, dense=False).named_parameters())
    name = next(name for name in factors if name.endswith(".U"))
    U, V = (start[f"{name[:-2]}.{letter}"] for letter in "UV")
    torch.testing.assert_close(moved[False][name], U * (1 - 0.1 * 0.5))
    torch.testing.assert_close(moved[True][name], U - 0.1 * 0.5 * U @ (V.mT @ V))


def test_perplexity_is_that_of_all_blocks(data, tmp_path):
    arguments = [*GPT2, "--out", str(tmp_path), "--data", str(data), "--eval_blocks", "7"]
    options = gpt2.parse(arguments)
    training = gpt2.Training(options, Run(options, gpt2.PROGRAM, arguments), TextData.of(data, vocab_size=300))
    stream = training.held_out["perplexity"][: 7 * 16 + 1].long()
    logits = training.model(input_ids=stream[:-1].view(7, 16)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), stream[1:])
    assert training.perplexity("perplexity") == pytest.approx(loss.exp().item(), rel=1e-4)


def test_windows_of_questions_hold_their_answers(data):
    text = TextData.of(data, vocab_size=300)
    windows, questions = text.squad("train", 64, 16), read_questions(data / "squad" / "train-partial-v1.1.json")
    assert len(windows.ids) > len(questions) == 12
    assert set(windows.owners.tolist()) == set(range(12))
    found = set()
    for window, owner in enumerate(windows.owners.tolist()):
        start, end, length = windows.starts[window], windows.ends[window], windows.lengths[window]
        assert windows.ids[window, 0] == bert.CLS
        assert windows.ids[window, length - 1] == bert.SEP
        assert not windows.ids[window, length:].any()
        if start:
            question = questions[owner]
            begin, stop = windows.spans[window, start, 0], windows.spans[window, end, 1]
            assert question.context[begin:stop] == question.answers[0]["text"]
            found.add(owner)
    assert found == set(range(12))
    right = windows.starts > 0
    scores = score_answers(questions, windows, windows.starts, windows.ends, right.astype(np.float32))
    assert scores == {"exact_match": 100.0, "f1": 100.0}


def test_best_spans_are_those_of_a_search_over_all():
    start, end = torch.randn(2, 5, 50)
    in_context = torch.zeros(5, 50, dtype=torch.bool)
    in_context[:, 7:45] = True
    first, last, score = best_spans(start, end, in_context)
    for window in range(5):
        allowed = [(s, e) for s in range(7, 45) for e in range(s, min(45, s + MAX_ANSWER_LENGTH))]
        best = max(allowed, key=lambda span: (start[window, span[0]] + end[window, span[1]]).item())
        assert (first[window].item(), last[window].item()) == best
        assert score[window] == start[window, best[0]] + end[window, best[1]]


def test_texts_are_encoded_once(data, tmp_path, monkeypatch):
    text = TextData.of(data, tmp_path, vocab_size=300)
    tokens = text.tokens("byte_bpe", "train")
    assert (tokens.ids[tokens.begins[:-1]] == 0).all()
    tokenizer = text.tokenizer("byte_bpe")
    first = tokens.ids[1 : tokens.begins[1]]
    assert tokenizer.decode(first.tolist()) == text.texts("train")[0]
    monkeypatch.setattr(TextData, "texts", None)
    np.testing.assert_array_equal(text.tokens("byte_bpe", "train").ids, tokens.ids)


@pytest.mark.parametrize("name", TEXT_PLANS)
def test_plans_name_options_of_their_program(name):
    plan = read_plan(name)
    program = {module.PROGRAM: module for module in (bert, gpt2)}[plan.program]
    for cell in plan.cells.values():
        for options in ({**plan.options, **cell}, {**plan.options, **cell, **plan.tiny}):
            program.parse(["--out", "x", *_words(options)])
    assert all(len(pair) == 4 and pair[2] in plan.measures for pair in plan.pairs)
