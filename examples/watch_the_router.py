"""Which experts read a text: `python examples/watch_the_router.py runs/quickstart "def f(x):"`."""

import sys

import torch

import manyhands as mh


def main(path: str, text: str) -> None:
    """Print every token with the experts of each sparse layer and their weights."""
    model, tokenizer = mh.load(path)
    ids = tokenizer.encode(text)
    with torch.inference_mode():
        out = model(torch.tensor([ids]))
    for t, token in enumerate(ids):
        experts = "  ".join(
            f"L{layer} " + " ".join(f"{e}·{w:.2f}" for e, w in zip(r.expert_ids[t].tolist(), r.weights[t].tolist()))
            for layer, r in out.routings.items()
        )
        print(f"{tokenizer.decode([token])!r:16} {experts}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
