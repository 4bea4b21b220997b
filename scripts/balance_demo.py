"""Balance works and is needed: `python scripts/balance_demo.py [--steps 300] [--seeds 2]`.

Trains one small model on the standard library's sources without balancing, with the auxiliary loss, with the loss-free
bias, and with both, from the same weights and on the same tokens, and prints for each: MaxVio and dead experts (worst
layer, over the last 50 steps) and the validation loss.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from manyhands.config.load import parse_run
from manyhands.train.loop import train
from manyhands.train.memory import keep_freed_memory

BASE = """
model:
  vocab_size: 2048
  hidden_size: 128
  num_hidden_layers: 3
  intermediate_size: 320
  max_position_embeddings: 128
  attention: {num_attention_heads: 4, head_dim: 32, qk_norm: head}
  moe:
    moe_intermediate_size: 64
    first_k_dense_replace: 1
    router: {num_experts: 16, num_experts_per_tok: 2, score: sigmoid, bias: true}
optim: {lr: 0.01, weight_decay: 0.0}
train: {sequence_length: 128, batch_size: 16}
"""
METHODS = {
    "none": ["balance.aux_loss_coef=0", "balance.bias_update_rate=0"],
    "auxiliary loss (0.01)": ["balance.aux_loss_coef=0.01", "balance.bias_update_rate=0"],
    "loss-free bias (0.01)": ["balance.aux_loss_coef=0", "balance.bias_update_rate=0.01"],
    "both (0.001, 0.01)": ["balance.aux_loss_coef=0.001", "balance.bias_update_rate=0.01"],
}


def main() -> None:
    """Train each, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    keep_freed_memory()
    console = Console()
    table = Table(title=f"{arguments.steps} steps, {arguments.seeds} seeds: mean (range)")
    for column in ("balancing", "MaxVio", "dead experts of 16", "validation nats/token"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in METHODS.items():
            vio, dead, loss = [], [], []
            for seed in range(arguments.seeds):
                settings = [*changes, f"train.seed={seed}", f"train.max_steps={arguments.steps}"]
                summary = train(Path(folder) / f"{name}-{seed}", parse_run(BASE, "demo", settings), quiet=True)
                vio.append(max(layer.max_vio for layer in summary.balance.values()))
                dead.append(max(layer.dead for layer in summary.balance.values()))
                loss.append(summary.valid_loss)
                console.print(f"{name}, seed {seed}: MaxVio {vio[-1]:.2f}, dead {dead[-1]}, loss {loss[-1]:.4f}")
            table.add_row(name, spread(vio, 2), spread([float(d) for d in dead], 1), spread(loss, 4))
    console.print(table)


def spread(values: list[float], digits: int) -> str:
    """Mean and range."""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
