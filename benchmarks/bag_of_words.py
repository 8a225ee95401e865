"""The baseline that knows words and their pairs, and nothing of their order: TF-IDF and a linear model."""

from __future__ import annotations

from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge


def vectorizer() -> Any:
    """Counts of words and pairs of words that two texts or more have, weighted by TF-IDF."""
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)


def linear_model(is_regression: bool = False) -> Any:
    """What predicts from them."""
    return Ridge() if is_regression else LogisticRegression(max_iter=1000, C=10.0)
