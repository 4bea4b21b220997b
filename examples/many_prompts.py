"""Several texts continued, each with its own seed: `python examples/many_prompts.py runs/mine "def " "class "`."""

import sys

import manyhands as mh


def main(path: str, prompts: list[str]) -> None:
    """Print each prompt's two continuations, and how evenly its tokens used the experts of the first sparse layer."""
    model, tokenizer = mh.load(path)
    engine = mh.Engine(model, tokenizer)
    twice = [prompt for prompt in prompts for _ in range(2)]
    settings = [mh.SamplingConfig(temperature=0.8, seed=seed, max_new_tokens=24) for seed in range(len(twice))]
    for prompt, completion in zip(twice, engine.generate(twice, settings, routing=True), strict=True):
        print(repr(prompt + completion.text), completion.finish_reason)
        layer, routing = next(iter(completion.routings.items()))
        print(f"  layer {layer}, tokens per expert: {routing.expert_counts().tolist()}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
