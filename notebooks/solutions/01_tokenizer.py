# %% [markdown]
# # 1 · Tokenizer: solutions

# %% [markdown]
# **1.** A character may be spread over several byte pieces, so all is collected as bytes first.
# Only the space that was put in front is dropped: a text that starts with a line break has its
# `▁` before the break.


# %% tags=["exercise-1"]
def decode(ids, pieces):  # list of ids -> str
    data = b""
    for i in ids:
        if i >= 259:
            data += pieces[i].replace("▁", " ").encode()
        elif i >= 3:
            data += bytes([i - 3])
    return data.decode().removeprefix(" ")


# %% [markdown]
# **2.** Walk back over the bytes that continue a character to the one that starts it, and compare
# how long the character should be with how long it is.


# %% tags=["exercise-2"]
def unfinished(data):  # bytes -> int
    for n in range(1, min(4, len(data)) + 1):
        first = data[-n]
        if not 0x80 <= first < 0xC0:
            length = 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)
            return n if n < length else 0
    return 0


# %% [markdown]
# **3.** `low` is always too small and `high` always large enough; they meet.


# %% tags=["exercise-3"]
def smallest_vocabulary(limit):  # pieces per word -> vocab_size
    low, high = 320, 1000
    while high - low > 1:
        middle = (low + high) // 2
        if pieces_per_word(train_tokenizer(stories, middle), unseen) <= limit:
            high = middle
        else:
            low = middle
    return high
