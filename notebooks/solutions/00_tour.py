# %% [markdown]
# # 0 · The tour: solutions


# %% tags=["exercise-1"]
def write_by_counting(word, n_words, rng):
    words = [word]
    while len(words) < n_words:
        found = counts[words[-1]]
        words += rng.choices(list(found), weights=found.values())
    return words


# %% [markdown]
# Dividing a logarithm by T takes the T-th root of the number: temperature is a power.


# %% tags=["exercise-2"]
def with_temperature(p, temperature):
    powers = p ** (1 / temperature)
    return powers / powers.sum()


# %% tags=["exercise-3"]
@torch.no_grad()
def loss_per_letter(model, tok, story):
    ids = torch.tensor([tok.encode(story, bos=True)])
    logprobs = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])
    return -logprobs.sum().item() / len(story)
