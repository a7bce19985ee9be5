"""SQuAD files, windows, labels and decoding."""

import itertools
import json
import string
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from transformers import BertTokenizer, GPT2Tokenizer

from hf_fnl.tasks.squad import SquadOptions, build_squad_features, load_squad
from hf_fnl.tasks.squad_evaluation import decode_predictions, first_questions, score_predictions

CONTEXT = "Anna sold seven red apples. Boris, who likes pears, bought three of them on Monday morning; Clara ate none."
SMALL = SquadOptions(max_seq_length=48, doc_stride=7, max_query_length=13, max_answer_length=6)


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    """A WordPiece of single characters, so that a token is a character that is not white space."""
    characters = string.ascii_lowercase + string.digits
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation]
    tokens += [*characters, *(f"##{character}" for character in characters)]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


@pytest.fixture(scope="module")
def bert_tokenizer(shared_data) -> BertTokenizer:
    return BertTokenizer(vocab=str(shared_data / "vocab" / "bert-base-uncased" / "vocab.txt"))


def question(id_: str, text: str, *answers: str, context: str = CONTEXT, **extra) -> dict:
    found = [{"text": answer, "answer_start": context.index(answer)} for answer in answers]
    return {"id": id_, "question": text, "answers": found, **extra}


def official(*qas: dict, context: str = CONTEXT) -> dict:
    return {"version": "1.1", "data": [{"title": "Fruit", "paragraphs": [{"context": context, "qas": list(qas)}]}]}


QUESTIONS = official(
    question("q1", "Who ate none?", "Clara", "Clara ate none"),
    question("q2", "What did Anna sell?", "seven red apples", "red apples"),
    question("q3", "When?", "Monday"),
)
WITH_UNANSWERABLE = official(
    question("q1", "Who ate none?", "Clara"), question("q2", "Who ate a cow?", "Boris", is_impossible=True)
)


@pytest.fixture
def load(tmp_path):
    """Write content as a JSON file and load that."""

    def write_and_load(content: dict | str) -> Dataset:
        path = tmp_path / "questions.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return load_squad(path, split="train")

    return write_and_load


def random_logits(features: Dataset, seed: int = 0, width: int = 50) -> tuple[np.ndarray, np.ndarray]:
    start, end = np.random.default_rng(seed).normal(size=(2, len(features), width))
    return start, end


def starts_of(row) -> list[int]:
    return [start for start, _ in row["offset_mapping"]]


# ---- loading


def test_official_file_becomes_rows(load):
    examples = load(QUESTIONS)
    assert examples.column_names == ["id", "title", "context", "question", "answers"]
    assert load(WITH_UNANSWERABLE)[1]["answers"] == {"text": [], "answer_start": []}
    assert examples[0] == {
        "id": "q1",
        "title": "Fruit",
        "context": CONTEXT,
        "question": "Who ate none?",
        "answers": {"text": ["Clara", "Clara ate none"], "answer_start": [CONTEXT.index("Clara")] * 2},
    }
    assert not first_questions(examples, None)[1]
    few, version_2 = first_questions(load(WITH_UNANSWERABLE), 1)
    assert (few["id"][:], version_2) == (["q1"], True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(json.dumps(QUESTIONS)[:-30], "char ", id="truncated"),
        pytest.param([QUESTIONS], "not in the official SQuAD structure", id="a list"),
        pytest.param({"data": [{"title": "x"}]}, "not in the official .* KeyError 'paragraphs'", id="key missing"),
        pytest.param({"data": []}, "holds no questions", id="empty"),
        pytest.param(
            official(*[question("q7", "Who?", "Anna")] * 2), "1 question ids are repeated, first 'q7'", id="repeated id"
        ),
        pytest.param(
            official(question("q1", "Who?", "Anna"), *2 * [question("q2", "Who?", "Anna", context="xx Anna")]),
            "repeated",
            id="repeated before misplaced",
        ),
        pytest.param(
            official(
                question("q2", "Who?", "Anna", context="x Anna"), question("q3", "Who?", "Boris", context="Boris")
            ),
            "the answer of question 'q2' is 'Anna', but its context reads 'na s' at 2; set answer_start",
            id="misplaced",
        ),
        pytest.param(
            official({**question("q1", "Who?"), "answers": [{"text": "none.", "answer_start": -5}]}),
            "'q1' is 'none.', but its context reads '' at -5",
            id="negative start",
        ),
    ],
)
def test_bad_files(load, content, message):
    with pytest.raises(ValueError, match=message):
        load(content)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        load_squad(tmp_path / "nowhere.json", split="train")


# ---- windows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_length": 0}, "max_seq_length must be at least 1, got 0"),
        ({"max_answer_length": -2}, "max_answer_length must be at least 1, got -2"),
        ({"doc_stride": -1}, "doc_stride must be at least 0, got -1"),
        ({"doc_stride": 317}, "leaves 317 tokens .* doc_stride 317 must be below that"),
        ({"max_seq_length": 64}, "leaves 0 tokens of context"),
    ],
    ids=lambda value: "-".join(f"{key}={number}" for key, number in value.items()) if isinstance(value, dict) else "",
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        SquadOptions(**options)


def test_a_tokenizer_that_pads_on_the_left_is_refused(load, tokenizer):
    with pytest.raises(ValueError, match="set padding_side=\"right\", got 'left'"):
        build_squad_features(load(QUESTIONS), SimpleNamespace(padding_side="left"), SMALL, train=True)


@pytest.mark.parametrize(("max_seq_length", "doc_stride"), [(48, 0), (48, 7), (41, 23), (200, 100)])
def test_windows_cover_the_context(load, tokenizer, max_seq_length, doc_stride):
    options = SquadOptions(max_seq_length=max_seq_length, doc_stride=doc_stride, max_query_length=13)
    features = build_squad_features(load(QUESTIONS), tokenizer, options, train=False)
    whole = [offset for offset, character in enumerate(CONTEXT) if character != " "]
    for id_, windows in itertools.groupby(features, key=lambda row: row["example_id"]):
        assert id_ in ("q1", "q2", "q3")
        joined: list[int] = []
        for row in windows:
            assert len(row["input_ids"]) == len(row["offset_mapping"]) <= max_seq_length
            starts = [start for start in starts_of(row) if start >= 0]
            assert joined[len(joined) - doc_stride :] == starts[:doc_stride] or not joined
            joined += starts[doc_stride if joined else 0 :]
        assert joined == whole


def test_a_window_is_question_and_context(load, tokenizer):
    row = build_squad_features(load(QUESTIONS), tokenizer, SMALL, train=False)[0]
    text = "[CLS] " + " ".join("who") + " "
    assert (
        tokenizer.decode(row["input_ids"]).replace(" ", "").startswith(text.replace(" ", "") + "atenone?[SEP]annasold")
    )
    question_length = row["input_ids"].index(tokenizer.sep_token_id) + 1
    assert row["token_type_ids"] == [0] * question_length + [1] * (len(row["input_ids"]) - question_length)
    assert row["offset_mapping"][:question_length] == [[-1, -1]] * question_length
    assert row["offset_mapping"][-1] == [-1, -1]


def test_long_questions_are_cut_and_leading_space_is_dropped(load, tokenizer):
    examples = load(official(question("q1", " \n\t  Which person sold many red apples?", "Anna")))
    row = build_squad_features(examples, tokenizer, SMALL, train=False)[0]
    length = row["input_ids"].index(tokenizer.sep_token_id)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"][1:length]) == tokenizer.tokenize("Which person so")
    assert length - 1 == SMALL.max_query_length


@pytest.mark.parametrize(
    ("answer", "windows_with_it"),
    [
        pytest.param("Anna", 1, id="first"),
        pytest.param("none.", 1, id="last"),
        pytest.param("who", 2, id="in two windows"),
        pytest.param("Boris, who likes", 0, id="cut by both windows"),
        pytest.param(" bought ", 1, id="white space around"),
    ],
)
def test_labels_are_the_answer_or_the_first_token(load, tokenizer, answer, windows_with_it):
    examples = load(official(question("q1", "Who ate none?", answer)))
    labelled = build_squad_features(examples, tokenizer, SMALL, train=True)
    windows = build_squad_features(examples, tokenizer, SMALL, train=False)
    first = CONTEXT.index(answer.strip(), CONTEXT.index(answer))
    held = 0
    for row, window in zip(labelled, windows, strict=True):
        start, end = row["start_positions"], row["end_positions"]
        inside = {first, first + len(answer.strip()) - 1} <= set(starts_of(window))
        if inside:
            span = CONTEXT[window["offset_mapping"][start][0] : window["offset_mapping"][end][1]]
            assert span == answer.strip()
        else:
            assert (start, end) == (0, 0)
        held += inside
    assert held == windows_with_it < len(labelled)


def test_byte_level_tokens_give_clean_answers(load, shared_data):
    """GPT-2's tokens hold the space before a word, and white space may be a token of its own."""
    folder = shared_data / "vocab" / "gpt2"
    tokenizer = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    context = "Anna \n\n\tsold seven red apples."
    examples = load(official(question("q1", "What?", "seven red", context=context), context=context))
    label = build_squad_features(examples, tokenizer, SMALL, train=True)[0]
    features = build_squad_features(examples, tokenizer, SMALL, train=False)
    start, end = np.zeros((2, 1, 48))
    start[0, label["start_positions"]] = end[0, label["end_positions"]] = 1
    decoded = decode_predictions(examples, features, start, end, SMALL, version_2=False)
    assert decoded == {"q1": "seven red"}


def test_context_without_tokens(tokenizer):
    row = {"id": "q1", "title": "", "context": "\u0000\u200b", "question": "Who?"}
    examples = Dataset.from_list([{**row, "answers": {"text": [], "answer_start": []}}])
    with pytest.raises(ValueError, match="context of question 'q1' holds no token"):
        build_squad_features(examples, tokenizer, SMALL, train=False)


# ---- decoding


def brute_force(examples, features, start_logits, end_logits, max_answer_length):
    """The best allowed span of each question, of all that there are."""
    found = {}
    for example in examples:
        spans: dict[tuple[int, int], float] = {}
        for window, row in enumerate(features):
            tokens = range(len(row["input_ids"])) if row["example_id"] == example["id"] else ()
            for start, end in itertools.combinations_with_replacement(tokens, 2):
                span = (row["offset_mapping"][start][0], row["offset_mapping"][end][1])
                if end - start < max_answer_length and row["offset_mapping"][end][0] >= 0 <= span[0]:
                    score = start_logits[window, start] + end_logits[window, end]
                    spans[span] = max(score, spans.get(span, -np.inf))
        found[example["id"]] = example["context"][slice(*max(spans, key=spans.__getitem__))]
    return found


@pytest.mark.parametrize("max_answer_length", [1, 6, 60])
def test_decoding_equals_brute_force(load, tokenizer, max_answer_length):
    options = SquadOptions(max_seq_length=48, doc_stride=7, max_query_length=13, max_answer_length=max_answer_length)
    examples = load(QUESTIONS)
    features = build_squad_features(examples, tokenizer, options, train=False).shuffle(seed=0)
    logits = random_logits(features)
    decoded = decode_predictions(examples, features, *logits, options, version_2=False)
    assert decoded == brute_force(examples, features, *logits, max_answer_length)


@pytest.mark.parametrize(
    ("threshold", "predictions"),
    [(0.0, {"q1": "Clara", "q2": ""}), (2.5, {"q1": "Clara", "q2": "Clara"}), (-3.5, {"q1": "", "q2": ""})],
)
def test_version_2_answers_where_the_null_score_allows(load, tokenizer, threshold, predictions):
    """The least null score over the windows is 8 - 3 = 5 for q1 and 8 + 2 = 10 for q2; the best span scores 8."""
    options = SquadOptions(max_seq_length=48, doc_stride=7, max_query_length=13, null_score_diff_threshold=threshold)
    examples = load(WITH_UNANSWERABLE)
    features = build_squad_features(examples, tokenizer, options, train=False)
    start = np.full((len(features), 50), -100.0)
    end = start.copy()
    first, last = CONTEXT.index("Clara"), CONTEXT.index("Clara") + 4
    seen = {"q1": 0, "q2": 0}
    for window, row in enumerate(features):
        start[window, 0] = 4 + seen[row["example_id"]]
        end[window, 0] = {"q1": 1, "q2": 6}[row["example_id"]]
        seen[row["example_id"]] += 1
        if {first, last} <= set(starts := starts_of(row)):
            start[window, starts.index(first)] = end[window, starts.index(last)] = 4
    decoded = decode_predictions(examples, features, start, end, options, version_2=True)
    assert decoded == predictions
    scores = score_predictions(examples, decoded, version_2=True)
    assert scores["exact"] == 50.0 * ((predictions["q1"] == "Clara") + (predictions["q2"] == ""))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits[1:], r"logits must be of \d+ windows of at least 48 tokens, got shape"),
        (lambda logits: logits[:, :40], "at least 48 tokens, got shape"),
        (lambda logits: np.where(logits > 1, np.nan, logits), "logits hold NaN or Inf"),
    ],
    ids=["rows", "width", "nan"],
)
def test_unusable_logits(load, tokenizer, change, message):
    examples = load(QUESTIONS)
    features = build_squad_features(examples, tokenizer, SMALL, train=False)
    start, end = random_logits(features)
    with pytest.raises(ValueError, match=message):
        decode_predictions(examples, features, change(start), end, SMALL, version_2=False)


def test_windows_of_other_questions(load, tokenizer):
    examples = load(QUESTIONS)
    features = build_squad_features(examples, tokenizer, SMALL, train=False)
    with pytest.raises(ValueError, match="the windows are not those of the 2 questions"):
        decode_predictions(examples.select([0, 1]), features, *random_logits(features), SMALL, version_2=False)


def test_gold_positions_decode_to_the_gold_answers(shared_data, bert_tokenizer):
    """Every 70th real question: what the labels point at is the gold answer, but for answers that cut a token."""
    examples = load_squad(shared_data / "squad" / "dev-v1.1.json", split="validation")
    assert len(examples) == 10570
    examples = examples.select(range(0, 10570, 70))
    options = SquadOptions(max_seq_length=192, doc_stride=64, max_answer_length=100)
    features = build_squad_features(examples, bert_tokenizer, options, train=False)
    labels = build_squad_features(examples, bert_tokenizer, options, train=True)
    start, end = np.full((2, len(features), 384), -100.0)
    rows, starts, ends = (
        np.arange(len(features)),
        np.array(labels["start_positions"]),
        np.array(labels["end_positions"]),
    )
    start[rows, starts] = end[rows, ends] = 9.0
    decoded = decode_predictions(examples, features, start, end, options, version_2=False)
    labelled = {id_ for id_, last in zip(features["example_id"], ends, strict=True) if last > 0}
    assert len(labelled) == len(examples) >= 150
    cut = [
        row["id"]
        for row in examples
        if (text := decoded[row["id"]]) != (gold := row["answers"]["text"][0].strip())
        and not (gold in text and " " not in text.replace(gold, ""))
    ]
    assert cut == []
    assert score_predictions(examples, decoded, version_2=False)["exact_match"] > 98


# ---- scores


def test_scores_need_every_prediction(load):
    with pytest.raises(ValueError, match="2 of 3 questions have no prediction, first 'q2'"):
        score_predictions(load(QUESTIONS), {"q1": "Clara"}, version_2=False)
