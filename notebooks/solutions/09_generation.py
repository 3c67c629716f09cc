# %% [markdown]
# # 9 · Generation: solutions

# %% [markdown]
# **1.** All seeds share one call; the mean makes texts of different lengths comparable.


# %% tags=["exercise-1"]
def best_of(prompt, seeds):  # 30 tokens each, at temperature 1 -> Completion
    prompts = [prompt] * len(seeds)
    drawn = generate(toy, tok, prompts, 30, temperature=1.0, seed=list(seeds), logprobs=True)
    return max(drawn, key=lambda completion: sum(completion.logprobs) / len(completion.logprobs))


# %% [markdown]
# **2.** One step for each chunk, the last of which gives the first token; one for each of the rest.


# %% tags=["exercise-2"]
def n_steps(n_prompt, n_new, chunk):  # -> int
    return -(-n_prompt // chunk) + n_new - 1  # rounded up


# %% [markdown]
# **3.** From the end, and a place that ends before the text does: there is something behind it.


# %% tags=["exercise-3"]
def look_up(ids, n, n_draft):  # -> list of at most n_draft ids
    for start in range(len(ids) - n - 1, -1, -1):
        if ids[start : start + n] == ids[-n:]:
            return ids[start + n :][:n_draft]
    return []
