# %% [markdown]
# # 7 · Data: solutions
#
# A context that never occurred has a count of 0, and every word is equally likely after it.


# %% tags=["exercise-1"]
def add_one(pairs, vocabulary, word, before):
    after = sum(pairs[before, other] for other in vocabulary)
    return (pairs[before, word] + 1) / (after + len(vocabulary))


# %% [markdown]
# Each page counts a line once, so its lines are made a set first. Only after the last page is known
# which lines are frequent: the pages must be read twice, or kept.


# %% tags=["exercise-2"]
def drop_frequent(pages, n):
    on_pages = Counter(line for page in pages for line in set(page.split("\n")))
    return ["\n".join(line for line in page.split("\n") if on_pages[line] < n) for page in pages]


# %% [markdown]
# What is read of a source, divided by what there is of it. At 15 trillion tokens, Wikipedia would
# be read 26 times.


# %% tags=["exercise-3"]
def epochs(total, shares, unique):
    return {name: total * shares[name] / unique[name] for name in shares}
