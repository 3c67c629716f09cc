"""Draw docs/demo.png: the loss curve of the toy, and where it looks when it writes a word.

python docs/demo_figure.py
"""

import json
from pathlib import Path

import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from minillama import load
from minillama.data import tales
from minillama.model import Llama, apply_rope, rope_angles

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "data" / "toy"


@torch.inference_mode()
def attention_of_last(model: Llama, ids: list[int]) -> torch.Tensor:
    """The attention of the last position: (layer, head, token)."""
    tokens = torch.tensor([ids])
    angles = rope_angles(torch.arange(len(ids)), model.config.head_dim, model.config.rope_theta)
    x, weights = model.tok_embeddings(tokens), []
    for layer in model.layers:
        attention, normed = layer.attention, layer.attention_norm(x)
        q = attention.wq(normed).unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)
        k = attention.wk(normed).unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        q, k = apply_rope(q, angles), apply_rope(k, angles)
        scores = q[0, :, -1:] @ k[0].transpose(1, 2) / model.config.head_dim**0.5
        weights.append(scores.softmax(-1)[:, 0])
        x = layer(x, angles[None, None])
    return torch.stack(weights)


def main() -> None:
    model, tok = load(TOY / "checkpoint")
    losses = [json.loads(line).get("loss") for line in (TOY / "log.jsonl").open()][:-1]

    # A story that the model has never seen, up to the last mention of its thing.
    ids, answer = next(filter(None, map(_puzzle(model, tok), tales.corpus("valid"))))
    weights = attention_of_last(model, ids)
    head = weights.flatten(0, 1)[:, [i for i, t in enumerate(ids) if t == answer]].sum(-1).argmax()
    weight = weights.flatten(0, 1)[head]

    figure = Figure(figsize=(9.5, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    left.plot(range(1, len(losses) + 1), losses, linewidth=0.8)
    left.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    left.set_title("Pretraining the toy", fontsize=9)
    left.grid(alpha=0.3)

    right.set(xlim=(0, 62), ylim=(-11, 1))
    right.axis("off")
    layer, number = divmod(int(head), weights.shape[1])
    right.set_title(
        f"Where head {number} of layer {layer} looks, to write the next word", fontsize=9
    )
    column, line = 0.0, 0
    for index, token in enumerate([*ids[1:], answer]):
        text = tok.pieces[token].replace("▁", " ")
        if column + len(text) > 60:
            column, line, text = 0.0, line - 1, text.lstrip()
        is_next = index == len(ids) - 1
        shade = 0.0 if is_next else float(weight[index + 1])
        right.text(
            column, line, text, family="monospace", fontsize=8.7, va="center",
            color="white" if is_next else "black",
            bbox={
                "facecolor": "tab:blue" if is_next else to_rgba("tab:orange", min(1, 1.5 * shade)),
                "edgecolor": "none", "pad": 1.2,
            },
        )  # fmt: skip
        column += len(text)
    figure.savefig(ROOT / "docs" / "demo.png", dpi=130)


def _puzzle(model: Llama, tok):
    """For a story: the ids before the last mention of its thing, if the model then writes it."""

    @torch.inference_mode()
    def puzzle(story: str):
        thing = str(tales.check(story).cast.get("thing"))
        head, found, _ = story.rpartition(f" {thing}")
        if not found or len(head) < 300:
            return None
        ids = tok.encode(head, bos=True)
        answer = tok.encode(f"{head} {thing}", bos=True)[len(ids)]
        right = int(model(torch.tensor([ids]))[0, -1].argmax()) == answer
        return (ids, answer) if right else None

    return puzzle


if __name__ == "__main__":
    main()
