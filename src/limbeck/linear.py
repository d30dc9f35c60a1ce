"""The baseline a user should know of: a linear model on TF-IDF of the very same words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from limbeck.errors import MissingExtraError
from limbeck.progress import Progress

# Tuned as our own method is: on the validation rows, never on the test rows.
_GRID = [(ngrams, c) for ngrams in (1, 2) for c in (0.1, 0.3, 1.0, 3.0)]


def linear_predictions(
    train: tuple[Sequence[str], np.ndarray],
    validation: tuple[Sequence[str], np.ndarray],
    test: Sequence[str],
    classes: int,
    progress: Progress,
) -> tuple[np.ndarray, dict[str, float]]:
    """Scores (N, C) on `test` by the best of eight settings, and which that was."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.svm import LinearSVC
    except ImportError:
        raise MissingExtraError.of("recipe.evidence.linear", "compare") from None
    best = (-1.0, 0, 0.0)
    with progress.bar("linear baseline", len(_GRID) + 1, "fits") as bar:
        for ngrams, c in _GRID:
            vectors = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, ngrams))
            model = LinearSVC(C=c, random_state=0).fit(vectors.fit_transform(train[0]), train[1])
            found = float((model.predict(vectors.transform(validation[0])) == validation[1]).mean())
            best = max(best, (found, ngrams, c))
            bar.advance(1)
        accuracy, ngrams, c = best
        vectors = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, ngrams))
        model = LinearSVC(C=c, random_state=0).fit(vectors.fit_transform(train[0]), train[1])
        decision = model.decision_function(vectors.transform(test))
        bar.advance(1)
    if decision.ndim == 1:  # two classes: one column
        decision = np.stack([-decision, decision], axis=1)
    scores = np.full((len(test), classes), -np.inf)
    scores[:, model.classes_] = decision
    return scores, {"ngrams": ngrams, "C": c, "validation_accuracy": accuracy}
