"""A run from Python with a model, batches, a loss and a callback of one's own: train_from_python.py [DIRECTORY]

The task is made up: to copy the first half of a sequence. The loss is cross entropy on the second half, and a penalty
on large logits; the balance terms, the loss-free bias, checkpoints, guards and report are the run's.
"""

import sys

import torch
import torch.nn.functional as F

import manyhands as mh

HALF, SYMBOLS, VOCAB, B = 4, 16, 300, 16


class Copies:
    """Endless batches [B, 2 · HALF] that know where they are: so the run resumes bit for bit."""

    def __init__(self, seed):
        self.draw = torch.Generator().manual_seed(seed)

    def __iter__(self):
        return self

    def __next__(self):
        half = torch.randint(SYMBOLS, (B, HALF), generator=self.draw)
        return torch.cat([half, half], 1)

    def state_dict(self):
        return {"generator": self.draw.get_state().tolist()}

    def load_state_dict(self, state):
        self.draw.set_state(torch.tensor(state["generator"], dtype=torch.uint8))


def loss(model, ids):
    """The mean, and who went where: the run adds the balance terms."""
    out = model(ids[:, :-1])
    logits = out.logits[:, HALF - 1 :].float()
    copied = F.cross_entropy(logits.flatten(0, 1), ids[:, HALF:].flatten())
    return copied + 1e-4 * logits.logsumexp(-1).square().mean(), out.routings


class Watch(mh.Callback):
    """Tells the worst load of a step now and then, and each validation."""

    def on_step(self, moment):
        if moment.step % 50 == 0:
            worst = max(layer["max_vio"] for layer in moment.record["moe"].values())
            print(f"step {moment.step}: loss {moment.record['loss']:.3f}, MaxVio {worst:.2f}")

    def on_validation(self, moment):
        print(f"validation at step {moment.step}: {moment.record['valid_loss']:.3f}")


def main(directory="runs/copies", steps=200):
    moe = mh.MoEConfig(
        router=mh.RouterConfig(num_experts=8, num_experts_per_tok=2, score="sigmoid", bias=True),
        moe_intermediate_size=16,
    )
    config = mh.ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        max_position_embeddings=32,
        moe=moe,
    )
    model = mh.Decoder(config)
    mh.init_weights(model, 0)
    run = mh.RunConfig(
        data={"sources": [__file__]},
        train={"max_steps": steps, "eval_every": 100, "sequence_length": 2 * HALF, "batch_size": B},
        optim={"lr": 6e-3},
    )
    held_out = [next(batches) for batches in [Copies(seed=1)] for _ in range(4)]
    return mh.train(run, model, Copies(seed=0), loss, [Watch()], valid=held_out, out=directory, quiet=True)


if __name__ == "__main__":
    summary = main(*sys.argv[1:])
    print(f"validation loss {summary.valid_loss:.3f} after {summary.steps} steps: {summary.checkpoint}")
