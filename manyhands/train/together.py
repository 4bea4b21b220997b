"""What several processes cannot train as one would: whatever looks at all tokens of a batch to say where each goes.

Of everything else one process gives the same: what ranks a token's experts alone, or within its sequence; every balance
term, whose sums are taken over all processes. Noise is drawn by each of them: the same in kind, not in bits.
"""

from manyhands.config import RunConfig
from manyhands.config.router import RouterConfig
from manyhands.errors import ConfigError


def check_together(run: RunConfig, size: int) -> None:
    """Raises `ConfigError` naming the field that `size` processes cannot train as one."""
    if size == 1:
        return
    moe = run.model.moe
    if moe is None:
        return
    router = moe.router
    at = "model.router" if run.model.kind == "encoder_decoder" else "model.moe.router"
    one = f"looks at all tokens of a batch, of which each of {size} processes has a part"
    if router.select in ("expert_choice", "base", "sinkhorn"):
        raise ConfigError(f"{at}.select = {router.select!r} {one}: train it on one, or take select = 'topk'")
    if why := _room(router, run, size):
        raise ConfigError(f"{at}.{why} {one}: train it on one, or take capacity_per = 'sequence'")
    if router.bias and run.balance.bias_update == "quantile":
        raise ConfigError(f"balance.bias_update = 'quantile' {one}: train it on one, or take 'sign'")


def _room(router: RouterConfig, run: RunConfig, size: int) -> str | None:
    """What of its capacity is shared by tokens on several processes."""
    if not (router.limited(True) or router.limited(False)) or router.capacity_per == "sequence":
        return None
    if router.capacity_per == "group" and run.model.kind != "encoder_decoder":
        sequences = run.train.micro_batch_size or run.train.batch_size // size
        if router.capacity_group and sequences * run.train.sequence_length % router.capacity_group == 0:
            return None
        return f"capacity_group = {router.capacity_group}"
    return f"capacity_per = {router.capacity_per!r}"
