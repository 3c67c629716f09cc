# %% [markdown]
# # 19 · Many processes: solutions

# %% [markdown]
# **1.** In the first round each passes on its own part, then always what has just arrived: in round
# $i$ rank $r$ sends part $r - i$.


# %% tags=["exercise-1"]
def ring_all_gather(parts):  # [part of rank 0, ...] -> ([whole on rank 0, ...], parts sent by each)
    n = len(parts)
    held = [{rank: part} for rank, part in enumerate(parts)]
    for round_ in range(n - 1):
        sent = [(rank, (rank - round_) % n) for rank in range(n)]
        for rank, k in sent:
            held[(rank + 1) % n][k] = held[rank][k]
    return [torch.cat([own[k] for k in range(n)]) for own in held], n - 1


# %% [markdown]
# **2.** A rank sends the logarithm of its own sum, and the target's logit, or 0 where the target is
# another rank's word. The logarithms of sums are put together by `logsumexp` again, which subtracts
# the largest first.


# %% tags=["exercise-2"]
def report(own_logits, targets, first):  # logits of the words first, first + 1, ... -> 2 tensors
    own = (targets >= first) & (targets < first + own_logits.shape[1])
    place = (targets - first).where(own, 0)
    score = own_logits.gather(1, place[:, None])[:, 0].where(own, 0.0)
    return own_logits.logsumexp(1), score


def losses(reports):  # what all ranks reported -> the loss of each position
    log_sums, scores = zip(*reports, strict=True)
    return torch.stack(log_sums).logsumexp(0) - sum(scores)


# %% [markdown]
# **3.** 16 P / n plus the two blocks, 2 bytes a number. On one GPU nothing is gathered, but what
# fits with two blocks more fits without.


# %% tags=["exercise-3"]
def gpus_needed(config, gpu_bytes):  # -> 1, 2, 4, ...
    blocks = 2 * 2 * block_matrix_parameters(config) / config.n_layers
    n = 1
    while 16 * config.n_parameters / n + blocks > gpu_bytes:
        n *= 2
    return n
