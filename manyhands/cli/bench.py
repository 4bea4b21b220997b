"""`manyhands bench`: how fast a model runs on this machine, and what share of the machine's limit that is."""

import sys
from typing import Annotated

import typer

from manyhands.cli.loudness import LOG, quiet
from manyhands.cli.options import IgnoreField
from manyhands.cli.progress import Loading
from manyhands.defaults import BENCH_NEW, BENCH_PROMPT


def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="A checkpoint, a run, or a hub name. Default: a random model of 113 M parameters."),
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(min=1, help=f"Tokens of the prompt. Default: {BENCH_PROMPT}, or what the model has room for."),
    ] = None,
    new: Annotated[
        int | None, typer.Option(min=2, help=f"Tokens to decode. Default: {BENCH_NEW}, or a quarter of it.")
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: all that are here.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Also decode so many sequences together: 16.")] = 1,
    remember: Annotated[
        bool | None,
        typer.Option(
            "--remember/--forget",
            help="Keep the speeds of `auto` for plan's estimates.  Default: if nothing else runs here.",
            show_default=False,
        ),
    ] = None,
    ignore_field: IgnoreField = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Prefill and decoding speed per expert backend, and the share of the read-bandwidth roof."""
    import json
    import os
    from dataclasses import asdict, replace
    from pathlib import Path

    import torch

    from manyhands.checkpoint.find import open_checkpoint
    from manyhands.checkpoint.model import from_source, only_decoder
    from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, RouterConfig
    from manyhands.errors import ConfigError, StorageError
    from manyhands.generate.speed import Speed, measure_speed, measure_together, read_per_token, speeds_of, warm_up
    from manyhands.kernels import backend_names, check_name
    from manyhands.kernels.native import missing
    from manyhands.models import Decoder, init_weights
    from manyhands.plan.recorded import record, why_not
    from manyhands.plan.remember import measured
    from manyhands.terminal import shown

    if model is None:
        config = ModelConfig(
            vocab_size=16384,
            hidden_size=512,
            max_position_embeddings=(prompt or BENCH_PROMPT) + (new or BENCH_NEW),
            attention=AttentionConfig(num_attention_heads=8, head_dim=64),
            moe=MoEConfig(router=RouterConfig(num_experts=64, num_experts_per_tok=8), moe_intermediate_size=256),
        )
        decoder = Decoder(config).eval()
        init_weights(decoder, seed=0)
    else:
        with Loading(model) as read:
            loaded = from_source(open_checkpoint(model, ignore_field or ()))
        decoder = only_decoder(loaded, "bench")
        read.said(loaded)
    room = decoder.config.longest_continued
    if new is None:
        new = max(2, min(BENCH_NEW, room // 4 if prompt is None else room - prompt))
    if prompt is None:
        prompt = max(1, min(BENCH_PROMPT, room - new))
    if prompt + new > decoder.config.max_position_embeddings:
        raise ConfigError(
            f"--prompt {prompt} and --new {new} do not fit max_position_embeddings = "
            f"{decoder.config.max_position_embeddings}"
        )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    machine = measured(quiet=quiet())
    here = machine.processor
    names = [check_name(name) for name in backend or (["auto", *backend_names()] if decoder.config.moe else ["auto"])]
    bytes_read = read_per_token(decoder)
    roof = here.bandwidth / bytes_read
    rows: list[Speed] = []
    for name in names:
        if sys.stderr.isatty():
            LOG.info("measuring %s …", name)
        if not rows:
            warm_up(decoder, name, prompt, new)
        row = measure_speed(decoder, name, prompt, new)
        if batch > 1:
            row = replace(
                row, batch=batch, together=measure_together(decoder, name, batch, prompt, max(1, new // 3), min(3, new))
            )
        rows.append(row)
    kept: str | None = None
    if remember is not False and names[0] == "auto":
        why = None if remember else why_not(machine, torch.get_num_threads(), load)
        title = Path(model).name if model is not None else "bench's random model"
        if why is None:
            try:
                record(speeds_of(decoder, title, machine, rows[0], prompt, new))
                kept = "remembered for the estimates of manyhands plan --machine here"
            except StorageError as error:
                kept = f"not remembered: {error}"
        else:
            kept = f"not remembered: {why} (--remember keeps them all the same)"
    dtype = str(decoder.embed_tokens.weight.dtype).removeprefix("torch.")
    if json_output:
        about = {"model": model, "dtype": dtype, "threads": torch.get_num_threads(), "prompt": prompt, "new": new}
        units = {"prefill": "tokens/s", "decode": "tokens/s", "read_bandwidth": "bytes/s"}
        found = [asdict(row) | {"share_of_roof": row.decode / roof} for row in rows]
        units |= {"together": "tokens/s"}
        figures = {"bytes_per_token": bytes_read, "read_bandwidth": here.bandwidth, "backends": found, "units": units}
        figures |= {"remembered": kept is not None and kept.startswith("remembered")}
        print(json.dumps(about | figures))
        return
    print(f"{shown(model or 'a random model')}, {dtype}, {torch.get_num_threads()} threads, one sequence")
    print(f"{bytes_read / 1e6:,.1f} MB of weights per decoded token at {here.bandwidth / 1e9:.1f} GB/s: ", end="")
    print(f"at most {roof:,.1f} tokens/s")
    many = f" {'decode ' + str(batch):>14}" if batch > 1 else ""
    print(f"  {'experts':12} {'prefill ' + str(prompt):>16} {'decode':>14} {'of the roof':>12}{many}")
    for row in rows:
        together = f" {row.together:>8,.1f} tok/s" if row.together is not None else ""
        speeds = f"{row.prefill:>10,.0f} tok/s {row.decode:>8,.1f} tok/s {row.decode / roof:>11.0%}{together}"
        print(f"  {row.backend:12} {speeds}")
    print("a token is decoded by:")
    for row in rows:
        print(f"  {row.backend:12} {row.program}")
    if kept:
        print(kept)
    if reason := missing():
        print(f"the native kernels are not here: {reason}")
