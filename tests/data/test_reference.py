import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from minillama.data import reference
from minillama.data.reference import N_FEATURES, ReferenceClassifier, features, sigmoid
from minillama.data.tales import stories

CITED = ["the river rises in the north", "the castle was built by the river"]
RANDOM = ["click here to buy", "buy now and click", "the river rises"]


def test_features_by_hand():
    """Three words and two pairs, 1 / sqrt(5) each; a second mention changes nothing."""
    ids, values = features("a b a")
    assert len(ids) == 4  # a, b, "a b", "b a"
    np.testing.assert_allclose(values, 0.5)
    assert set(ids) == set(features("A b A b a")[0])
    assert all(0 <= i < N_FEATURES for i in ids)
    assert len(features("")[0]) == 0


def test_learns_what_cited_pages_have_and_random_ones_do_not():
    classifier = ReferenceClassifier.fit(CITED, RANDOM)
    assert classifier.keep("a castle in the north") == "a castle in the north"
    assert classifier.keep("buy here, now") is None
    assert classifier.probability("buy") < 0.5 < classifier.probability("castle")


def test_a_page_of_which_nothing_is_known_stays():
    assert ReferenceClassifier.fit(CITED, RANDOM).keep("xyzzy") == "xyzzy"


def test_the_gradient_is_that_of_autograd():
    """One step of AdaGrad is as large as the learning rate, against the gradient's sign."""
    weights = torch.zeros(N_FEATURES, dtype=torch.float64, requires_grad=True)
    shares = [2 / 3 / len(CITED)] * len(CITED) + [1 / 3 / len(RANDOM)] * len(RANDOM)
    loss = 0.0
    for page, share, label in zip(
        [*CITED, *RANDOM], shares, [1.0] * len(CITED) + [0.0] * len(RANDOM), strict=True
    ):
        ids, values = features(page)
        score = weights[torch.from_numpy(ids)] @ torch.from_numpy(values)
        loss = loss + share * binary_cross_entropy_with_logits(score, torch.tensor(label).double())
    loss.backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "STEPS", 1)
        found = ReferenceClassifier.fit(CITED, RANDOM).weights
    gradient = weights.grad.numpy()
    expected = -reference.LEARNING_RATE * gradient / np.sqrt(gradient**2 + 1e-12)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_the_same_pages_give_the_same_weights():
    first, second = (ReferenceClassifier.fit(CITED, RANDOM).weights for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_how_many_there_are_of_each_kind_does_not_count():
    once = ReferenceClassifier.fit(CITED, RANDOM)
    often = ReferenceClassifier.fit(CITED, RANDOM * 10)
    np.testing.assert_allclose(once.weights, often.weights, atol=1e-6)


def test_random_pages_may_be_good_ones():
    """Half of the random pages are tales, and still no tale is lost, and no advert is kept."""
    told = list(stories(900, seed=1))
    adverts = [f"Order the {thing} now, pay half!" for thing in ("kite", "boat", "bell", "drum")]
    pages = [*told[600:800], *adverts * 50]
    classifier = ReferenceClassifier.fit(told[:600], pages)
    assert all(classifier.keep(story) for story in told[800:])
    assert not any(classifier.keep(f"Order the {thing} now!") for thing in ("lamp", "kite"))


def test_sigmoid_neither_overflows_nor_warns():
    np.testing.assert_allclose(sigmoid(np.array([-1e9, 0.0, 1e9])), [0.0, 0.5, 1.0], atol=1e-12)


@pytest.mark.parametrize(("cited", "pages"), [([], RANDOM), (CITED, [])])
def test_one_kind_of_page_is_not_enough(cited, pages):
    with pytest.raises(ValueError, match=f"{len(cited)} cited and {len(pages)} random pages"):
        ReferenceClassifier.fit(cited, pages)
