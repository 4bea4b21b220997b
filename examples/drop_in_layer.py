"""An MoE layer in place of a feed-forward network: fit eight tasks at once, balanced and not, and look at the load."""

import torch

import manyhands as mh


def train(balance: mh.BalanceConfig) -> tuple[float, mh.LoadCounter]:
    """Eight clusters of points, each with its own linear map; 8 experts, 2 per token. The last loss and load."""
    torch.manual_seed(0)
    centres, maps = 2 * torch.randn(8, 16), torch.randn(8, 16, 16) / 4
    router = mh.RouterConfig(num_experts=8, num_experts_per_tok=2)
    moe = mh.MoELayer(mh.MoEConfig(router=router, moe_intermediate_size=32), hidden_size=16)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2)
    for _ in range(500):
        cluster = torch.randint(8, (256,))
        x = centres[cluster] + torch.randn(256, 16) + 3.0  # what tokens share makes routers collapse
        target = torch.einsum("tij,tj->ti", maps[cluster], x)
        y, routing = moe(x)
        balancing, _ = mh.balance_objective({0: routing}, balance, num_sequences=1)
        loss = torch.nn.functional.mse_loss(y, target)
        optimizer.zero_grad()
        (loss + balancing).backward()
        optimizer.step()
    load = mh.LoadCounter.empty(8)
    load.add(routing)
    return loss.item(), load


def main() -> None:
    """Print both."""
    for name, coefficient in (("no balancing", 0.0), ("f·P loss 0.1", 0.1)):
        loss, load = train(mh.BalanceConfig(aux_loss_coef=coefficient, aux_scope="micro"))
        summary = load.summary()
        shares = " ".join(f"{share:.2f}" for share in summary.load)
        print(f"{name:13} loss {loss:.4f}  MaxVio {summary.max_vio:.2f}  dead {summary.dead}  load {shares}")


if __name__ == "__main__":
    main()
