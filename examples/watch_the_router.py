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
        experts = []
        for layer, routing in out.routings.items():
            chosen = zip(routing.expert_ids[t].tolist(), routing.weights[t].tolist(), strict=True)
            experts.append(f"L{layer} " + " ".join(f"{expert}·{weight:.2f}" for expert, weight in chosen))
        print(f"{tokenizer.decode([token])!r:16} {'  '.join(experts)}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
