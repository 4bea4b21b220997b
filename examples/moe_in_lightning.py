"""A MoELayer in a LightningModule: balance loss in `training_step`, loss-free bias after each optimiser step."""

import logging
import warnings

import lightning as pl
import torch

import manyhands as mh

BALANCE = mh.BalanceConfig(aux_loss_coef=0.01, aux_scope="micro")
D, E = 16, 8


class Experts(pl.LightningModule):
    """One layer that learns eight linear maps, one for each cluster of points."""

    def __init__(self):
        super().__init__()
        router = mh.RouterConfig(num_experts=E, num_experts_per_tok=2, score="sigmoid", bias=True)
        self.moe = mh.MoELayer(mh.MoEConfig(router=router, moe_intermediate_size=32), hidden_size=D)
        for parameter in self.moe.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.counts_E = torch.zeros(E, dtype=torch.int64)

    def training_step(self, batch, batch_idx):
        """The task's loss and the layer's. `y, routing = moe(x)`: nothing is kept in the layer."""
        x, target = batch
        y, routing = self.moe(x)
        balancing, terms = mh.balance_objective({0: routing}, BALANCE, num_sequences=1)
        self.counts_E += routing.expert_counts()  # summed over accumulated batches; over processes: all_reduce
        self.log("aux_loss", terms["aux_loss"])
        return torch.nn.functional.mse_loss(y, target) + balancing

    def optimizer_step(self, *args, **kwargs):
        """Once per optimiser step, after it: the loss-free bias moves towards balance."""
        super().optimizer_step(*args, **kwargs)
        mh.update_bias(self.moe.router.e_score_correction_bias, self.counts_E, rate=0.01)
        self.counts_E.zero_()

    def configure_optimizers(self):
        """Any optimiser: the bias is a buffer, and not its business."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def points(seed=0, count=4096):
    """Clusters that share a direction, which makes a router without balance collapse."""
    draw = torch.Generator().manual_seed(seed)
    centres, maps = 2 * torch.randn(8, D, generator=draw), torch.randn(8, D, D, generator=draw) / 4
    cluster = torch.randint(8, (count,), generator=draw)
    x = centres[cluster] + torch.randn(count, D, generator=draw) + 3.0
    return torch.utils.data.TensorDataset(x, torch.einsum("tij,tj->ti", maps[cluster], x))


def main(steps=150):
    """Train, and say what the router does."""
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model, data = Experts(), points()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", devices=1, **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=256))
    load = mh.LoadCounter.empty(E)
    with torch.no_grad():
        y, routing = model.moe(data.tensors[0])
    load.add(routing)
    loss = torch.nn.functional.mse_loss(y, data.tensors[1])
    summary = load.summary()
    bias = float(model.moe.router.e_score_correction_bias.abs().max())
    print(f"loss {loss:.3f}  MaxVio {summary.max_vio:.2f}  dead {summary.dead}  largest bias {bias:.3f}")


if __name__ == "__main__":
    main()
