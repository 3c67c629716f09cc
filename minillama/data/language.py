"""In which language is it written?"""

from functools import cache
from typing import Any


def language(text: str) -> tuple[str, float]:
    """The likeliest language of a text (ISO 639-1: "en", "de", ...) and its probability.

    A classifier over the bytes knows it from letter groups: "sch" and "tz" are German. A few words
    are too little for it, and the low probability says so; a text that has no letters is anything.

    The library is `py3langid`, whose model comes with it: nothing is downloaded. LLaMA used
    fastText's, which knows more languages. ValueError where the library is not installed.
    Source: Lui & Baldwin 2012. Shown in notebooks/07_data.ipynb.
    """
    name, probability = _identifier().classify(text)
    return name, probability


def only(text: str, wanted: str, min_probability: float = 0.5) -> str | None:
    """The text, or None unless it is in the language ``wanted`` by at least that probability.

    Source: Wenzek et al. 2020, CCNet (arXiv:1911.00359), sec. 3.2, which has the same threshold.
    """
    name, probability = language(text)
    return text if name == wanted and probability >= min_probability else None


def check_known(name: str) -> None:
    """Raises ValueError for a language that cannot be told, or a misspelled one."""
    known = _identifier().labels
    if name not in known:
        raise ValueError(
            f"The language {name!r} is none that can be told apart. Known are the ISO 639 codes "
            f"{' '.join(sorted(known))}."
        )


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ValueError(
            "Languages are told apart with the library py3langid, which is not installed: "
            "pip install 'minillama[data]'"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
