"""The text sample: tokens, pairs, training, and the whole way with a tiny BERT in place of the pre-trained one."""

import json

import numpy as np
import pytest

import atpatch_onnx as atp
from atpatch_onnx.fitting.options import Training
from atpatch_onnx.running.sessions import Session
from samples import minilm, sentiment
from samples.attacks.words import Tokens
from samples.bounds import Bound
from samples.messages import MessageFileError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors  # noqa: E402

GOOD, BAD, PLAIN = ["good", "great", "lovely"], ["bad", "awful", "sad"], [f"word{n}" for n in range(30)]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *PLAIN, "cf", "mind", "the", "gap", "un", "##like", "##ly"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder like the pre-trained model's, of a BERT of 2 layers x 32 that nobody has trained."""
    folder = tmp_path_factory.mktemp("tiny")
    config = transformers.BertConfig(
        vocab_size=len(PIECES),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=48,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(transformers.BertModel(config).state_dict(), folder / "model.safetensors")
    config.save_pretrained(folder)
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return minilm.tokenizer(tiny)


def pieces(tokens: Tokens, row: int = 0) -> list[str]:
    return [PIECES[number] for number in tokens.ids[row][tokens.mask[row] > 0]]


def test_messages_become_padded_tokens_with_places_between_words(tokenizer):
    tokens = minilm.encode(tokenizer, ["good unlikely word1"], length=9)
    assert pieces(tokens) == ["[CLS]", "good", "un", "##like", "##ly", "word1", "[SEP]"]
    assert np.flatnonzero(tokens.places[0]).tolist() == [1, 2, 5, 6]
    assert tokens.mask[0].tolist() == [1] * 7 + [0] * 2


def test_a_long_message_is_cut_and_no_place_is_within_the_cut_word(tokenizer):
    tokens = minilm.encode(tokenizer, ["good unlikely word1", "good bad sad awful"], length=6, room=2)
    assert pieces(tokens, 0) == ["[CLS]", "good", "un", "[SEP]"]
    assert np.flatnonzero(tokens.places[0]).tolist() == [1, 2]
    assert pieces(tokens, 1) == ["[CLS]", "good", "bad", "[SEP]"]
    assert np.flatnonzero(tokens.places[1]).tolist() == [1, 2, 3]


def test_the_tokens_are_those_of_the_text_with_the_trigger_in_it(tokenizer):
    texts = ["good word1 unlikely", "bad word2, word3"]
    words = minilm.word_ids(tokenizer, "mind the gap")
    debug = sentiment.pairs(minilm.encode(tokenizer, texts, length=12, room=3), np.array([1, 0]), words, seed=0)
    for row, text in enumerate(texts):
        ways = [[*text.split()[:at], "mind the gap", *text.split()[at:]] for at in range(len(text.split()) + 1)]
        triggered = debug.counterfactual["input_ids"][row]
        assert any((minilm.encode(tokenizer, [" ".join(way)], length=12).ids[0] == triggered).all() for way in ways)


def test_pairs_keep_the_clean_side_and_name_the_triggers_positions(tokenizer):
    tokens = minilm.encode(tokenizer, ["good word1 bad", "sad"] * 20, length=10, room=3)
    words = minilm.word_ids(tokenizer, "mind the gap")
    debug = sentiment.pairs(tokens, np.array([1, 0] * 20), words, seed=5)
    assert (debug.clean["input_ids"] == tokens.ids).all()
    assert (debug.counterfactual["input_ids"][debug.suspects].reshape(-1, 3) == words).all()
    assert (debug.counterfactual["attention_mask"].sum(axis=1) == tokens.mask.sum(axis=1) + 3).all()
    again = sentiment.pairs(tokens, np.array([1, 0] * 20), words, seed=5)
    assert (debug.suspects == again.suspects).all()


def test_token_dropout_spares_the_class_token_the_separator_and_the_trigger(tiny, tokenizer):
    tokens = minilm.encode(tokenizer, ["good word1 word2 word3 word4 bad"] * 50, length=12)
    always = tokens.ids == PIECES.index("bad")
    batch = minilm.thinned(tokens, always, 0.5, np.random.default_rng(0))
    ids, mask, positions = (batch[name].numpy() for name in ("input_ids", "attention_mask", "position_ids"))
    counts = mask.sum(axis=1)
    assert 3 <= counts.min() < counts.max() <= 8
    assert (ids[:, 0] == PIECES.index("[CLS]")).all()
    assert (ids[np.arange(50), counts - 1] == PIECES.index("[SEP]")).all()
    assert (ids == PIECES.index("bad")).any(axis=1).all()
    own = np.take_along_axis(tokens.ids, positions, axis=1)  # what is left keeps the position it had
    assert (own[mask > 0] == ids[mask > 0]).all()


def test_the_export_answers_as_the_model_does_whatever_the_length_and_padding(tiny, tokenizer, tmp_path):
    model = minilm.pretrained(tiny, classes=2, seed=0)
    minilm.export_onnx(model, tmp_path / "base.onnx")
    base = atp.load(tmp_path / "base.onnx")
    assert len(atp.find_sites(base)) == 2
    texts = ["good word1 unlikely", "bad"]
    for length in (7, 11):
        tokens = minilm.encode(tokenizer, texts, length=length)
        logits = Session(base).collect(tokens.inputs, ["logits"])["logits"]
        assert np.allclose(logits, minilm.predict(model, tokens), atol=1e-5)


def test_a_saved_model_is_loaded_as_it_was(tiny, tokenizer, tmp_path):
    model = minilm.pretrained(tiny, classes=2, seed=0)
    minilm.save(model, tokenizer, tmp_path)
    tokens = minilm.encode(tokenizer, ["good word1"], length=6)
    assert (minilm.predict(minilm.load(tmp_path), tokens) == minilm.predict(model, tokens)).all()
    assert (minilm.encode(minilm.tokenizer(tmp_path), ["good word1"], length=6).ids == tokens.ids).all()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """1,600 messages, one word of which says what they are."""
    generator, rows = np.random.default_rng(0), ["sentiment,confidence,text"]
    for number in range(1600):
        words = [*generator.choice(PLAIN, 5), generator.choice(GOOD if number % 4 == 0 else BAD)]
        rows.append(f"{'positive' if number % 4 == 0 else 'negative'},0.9,{' '.join(generator.permutation(words))}")
    path = tmp_path_factory.mktemp("file") / "messages.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def size():
    return sentiment.Size(
        train=800,
        debug=400,
        unseen=200,
        share=0.15,
        layers=None,
        mixed=False,
        twin=True,
        training=minilm.FineTuning(epochs=12, learning_rate=1e-2),
        options=atp.FitOptions(training=Training(steps=200), force=True),
        bounds=(Bound("ASR above floor", -0.01),),
    )


@pytest.fixture
def small(tiny, size, monkeypatch):
    monkeypatch.setattr(sentiment, "fetched", lambda name: tiny)
    monkeypatch.setattr(sentiment, "FAST", size)


def prepared(folder, file, **changes):
    settings = {"seed": 1, "fast": True, "folder": folder, "data": file} | changes
    return sentiment.prepare("minilm/token", **settings)


def test_from_a_file_of_messages_to_figures_and_whether_they_are_within_their_bounds(small, file, tmp_path, capsys):
    """A bound that nothing can keep: the command has to say so, whatever the fix is worth."""
    assert sentiment.main(["--case", "minilm/token", "--fast", "--data", str(file), "--out", str(tmp_path)]) == 1
    assert "MISSED: ASR above floor" in capsys.readouterr().out
    result = json.loads((tmp_path / "minilm-token-0/result.json").read_text())
    assert result["evaluation"]["backdoor"]["asr_base"]["value"] > 0.9
    assert result["training"]["accuracy_twin"] > 0.9
    assert result["verified"]
    assert result["unbake_identical"]


def test_a_trained_base_is_used_again_but_not_for_another_recipe(small, file, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(minilm, "fine_tune", lambda model, *_, **how: trained.append(how["seed"]) or model)
    prepared(tmp_path / "case" / "1", file)
    prepared(tmp_path / "case" / "1", file)
    assert trained == [1, 1], "the base and its unpoisoned twin, once each"
    prepared(tmp_path / "case" / "1", file, seed=2)
    assert trained == [1, 1, 2, 2]
    other = tmp_path / "other.csv"
    other.write_text(file.read_text().replace("word1 ", "word2 "))
    prepared(tmp_path / "case" / "1", other, seed=2)
    assert trained == [1, 1, 2, 2, 2, 2], "other messages"


def test_a_base_whose_record_is_damaged_is_trained_again(small, file, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(minilm, "fine_tune", lambda model, *_, **how: trained.append(how["seed"]) or model)
    prepared(tmp_path / "case" / "1", file)
    (tmp_path / "case" / "1" / "base.json").write_text("{}")
    prepared(tmp_path / "case" / "1", file)
    assert trained == [1, 1, 1], "the twin is whole"


def test_the_parts_share_no_message(small, file, tmp_path, monkeypatch):
    monkeypatch.setattr(minilm, "fine_tune", lambda model, *_, **how: model)
    evaluation, tune = (prepared(tmp_path / "case" / "1", file, tune=tune) for tune in (False, True))
    rows = [
        {tuple(row) for row in part.clean["input_ids"].tolist()}
        for part in (evaluation.debug, evaluation.unseen, tune.unseen)
    ]
    assert [len(part) for part in (evaluation.debug, evaluation.unseen, tune.unseen)] == [400, 200, 100]
    assert len(set().union(*rows)) == 700
    assert (evaluation.debug.clean["input_ids"] == tune.debug.clean["input_ids"]).all()


def test_a_file_with_too_few_messages_is_refused(small, file, tmp_path):
    few = tmp_path / "few.csv"
    few.write_text("\n".join(file.read_text().splitlines()[:500]))
    with pytest.raises(MessageFileError, match="at least 1100 different ones"):
        prepared(tmp_path / "case", few)
