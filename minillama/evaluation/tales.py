"""How well does a model know the rules of the toy world? Let it write, and check every story."""

from collections.abc import Collection
from dataclasses import dataclass

from minillama.data.tales import check
from minillama.generation import generate
from minillama.model import Llama
from minillama.tokenizer import Tokenizer


@dataclass(frozen=True)
class TalesReport:
    """Stories that a model wrote, and what is wrong with them."""

    stories: list[str]
    problems: dict[int, str]  # index of the story -> its first problem
    n_copied: int  # stories that stand in the training data word for word

    @property
    def n_consistent(self) -> int:
        """Stories in which names, places and objects agree from beginning to end."""
        return len(self.stories) - len(self.problems)


def write_tales(
    model: Llama,
    tokenizer: Tokenizer,
    training_stories: Collection[str],
    n: int = 100,
    temperature: float = 0.8,
    seed: int = 0,
) -> TalesReport:
    """Sample n stories from BOS alone, and check each against the grammar and the training data.

    A story that does not end within the model's context counts as a problem too: it is truncated.
    """
    seeds = range(seed, seed + n)
    completions = generate(
        model,
        tokenizer,
        [""] * n,
        max_new_tokens=model.config.max_seq_len,
        temperature=temperature,
        seed=seeds,
    )
    stories = [completion.text for completion in completions]
    verdicts = {index: check(story) for index, story in enumerate(stories)}
    known = set(training_stories)
    return TalesReport(
        stories=stories,
        problems={index: verdict.problem for index, verdict in verdicts.items() if not verdict.ok},
        n_copied=sum(story in known for story in stories),
    )
