"""What limits mixture-of-experts models on a machine, said in sentences."""

from collections.abc import Mapping

from manyhands.format import show
from manyhands.plan.budget import expected_hits
from manyhands.plan.here import Here

SLOW_DISK = 1e9
LITTLE_MEMORY = 32e9
BUSY = 0.75
SLOW_BF16 = 1.5


def diagnose(here: Here, *, environment: Mapping[str, str], load: float | None, free: float | None) -> list[str]:
    """One sentence per limit, the ones that can be changed at once first. `load` is the load average of a minute."""
    found: list[str] = []
    if here.threads > here.cores:
        found.append(
            f"threads oversubscribed: torch uses {here.threads} threads on {here.cores} usable cores; "
            f"set OMP_NUM_THREADS={here.cores}"
        )
    elif here.threads < here.cores:
        why = " (OMP_NUM_THREADS is set)" if environment.get("OMP_NUM_THREADS") else ""
        found.append(f"only {here.threads} of {here.cores} usable cores were measured{why}: the machine can do more")
    if load is not None and load > BUSY * here.cores:
        found.append(f"busy: load average {load:.1f} on {here.cores} cores; figures measured now are too low")
    if free is not None and free < 0.5 * here.processor.memory:
        found.append(f"only {show(free, 'B')} of {show(here.processor.memory, 'B')} memory are free now")
    if here.machine.kind != "gpu":
        found.append(
            "no GPU that torch can use: decoding is limited by the memory's read bandwidth, prefill by the cores"
        )
        found += _instructions(here)
        fp32, bf16 = (here.processor.rates.get(name) for name in ("fp32", "bf16"))
        if fp32 and bf16 and fp32 > SLOW_BF16 * bf16:
            found.append(
                f"torch multiplies bf16 {fp32 / bf16:.0f} times slower than float32 here: run models in float32"
            )
    memory = here.machine.memory
    if memory < LITTLE_MEMORY:
        room = show(memory * 0.8 / (4.5 / 8), "parameters")
        found.append(
            f"little memory: {show(memory, 'B')} hold about {room} parameters at 4.5 bits; larger models need their "
            "experts on disk"
        )
    disk = here.processor.disk_random or here.processor.disk
    if disk is None:
        found.append("the disk could not be measured: too little space, or no direct reads")
    elif disk < SLOW_DISK:
        found.append(
            f"slow disk: {show(disk, 'B/s')}; experts on disk would be slow (an NVMe drive reads 3 to 14 GB/s)"
        )
    return found


def experts_from_disk(here: Here, share: float = 0.2) -> dict[str, float] | None:
    """What a model with `share` of its experts in memory would decode, per 10⁹ bytes of experts that a token uses.

    Tokens per second, as the disk alone allows; None if the disk was not measured.
    """
    disk = here.processor.disk_random or here.processor.disk
    if disk is None:
        return None
    hits = expected_hits(share)
    return {"bytes_per_second": disk, "share": share, "hit_rate": hits, "tokens_per_second": disk / (1 - hits) / 1e9}


def _instructions(here: Here) -> list[str]:
    has = set(here.features)
    if has & {"asimddp", "i8mm"} or not has:  # Arm, or unknown
        return []
    if not has & {"avx512f", "amx_bf16"}:
        return ["no AVX-512 and no AMX: AVX2 only, so bf16 is widened to float32 and prefill is slow"]
    if not has & {"amx_bf16"}:
        bf16 = "" if "avx512_bf16" in has else ", and no AVX-512 bf16 instructions"
        return [f"no AMX: prefill and training run on AVX-512{bf16}"]
    return []
