# %% [markdown]
# # 11 · Ghost Attention: solutions

# %% [markdown]
# **1.** Only the user's messages change, and of these the first, or all.


# %% tags=["exercise-1"]
def told(messages, instruction, reminder=""):
    """`messages` are Message; give back a list of them."""
    from dataclasses import replace

    new, words = [], instruction
    for message in messages:
        if message.role == "user":
            message = replace(message, content=f"{words} {message.content}".strip())
            words = reminder
        new.append(message)
    return new


# %% [markdown]
# **2.** Examples of their own read 40 (1 + 2 + ... + n) tokens, one pass 40 n; both learn 9 n.


# %% tags=["exercise-2"]
def shares_learned(n):
    """Give back two floats: examples of their own, and one pass."""
    read = 40 * n * (n + 1) // 2
    return 9 * n / read, 9 / 40


# %% [markdown]
# **3.** Whole words only: a beard is no bear.


# %% tags=["exercise-3"]
class NamesAnAnimal:
    kind, text, short = "animal", "Always speak of an animal.", "Animal."

    def obeys(self, answer):
        from minillama.data.tales import ANIMALS

        words = answer.replace(".", " ").replace(",", " ").split()
        return any(animal in words for animal in ANIMALS)
