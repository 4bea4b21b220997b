"""`manyhands bench`: how fast a model runs on this machine, and what share of the machine's limit that is."""

import sys
from typing import Annotated

import typer

from manyhands.cli.options import IgnoreField
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
    ignore_field: IgnoreField = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Prefill and decoding speed per expert backend, and the share of the read-bandwidth roof."""
    import json
    from dataclasses import asdict

    import torch

    from manyhands.checkpoint.find import open_checkpoint
    from manyhands.checkpoint.model import from_source, only_decoder
    from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, RouterConfig
    from manyhands.errors import ConfigError
    from manyhands.generate.speed import Speed, measure_speed, read_per_token, warm_up
    from manyhands.kernels import backend_names, check_name
    from manyhands.kernels.native import missing
    from manyhands.models import Decoder, init_weights
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
        decoder = only_decoder(from_source(open_checkpoint(model, ignore_field or ())), "bench")
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
    here = measured(quiet=json_output).processor
    names = [check_name(name) for name in backend or (["auto", *backend_names()] if decoder.config.moe else ["auto"])]
    bytes_read = read_per_token(decoder)
    roof = here.bandwidth / bytes_read
    rows: list[Speed] = []
    for name in names:
        if sys.stderr.isatty() and not json_output:
            print(f"measuring {name} …", file=sys.stderr, flush=True)
        if not rows:
            warm_up(decoder, name, prompt, new)
        rows.append(measure_speed(decoder, name, prompt, new))
    dtype = str(decoder.embed_tokens.weight.dtype).removeprefix("torch.")
    if json_output:
        about = {"model": model, "dtype": dtype, "threads": torch.get_num_threads(), "prompt": prompt, "new": new}
        units = {"prefill": "tokens/s", "decode": "tokens/s", "read_bandwidth": "bytes/s"}
        found = [asdict(row) | {"share_of_roof": row.decode / roof} for row in rows]
        figures = {"bytes_per_token": bytes_read, "read_bandwidth": here.bandwidth, "backends": found, "units": units}
        print(json.dumps(about | figures))
        return
    print(f"{shown(model or 'a random model')}, {dtype}, {torch.get_num_threads()} threads, one sequence")
    print(f"{bytes_read / 1e6:,.1f} MB of weights per decoded token at {here.bandwidth / 1e9:.1f} GB/s: ", end="")
    print(f"at most {roof:,.1f} tokens/s")
    print(f"  {'experts':12} {'prefill ' + str(prompt):>16} {'decode':>14} {'of the roof':>12}")
    for row in rows:
        print(f"  {row.backend:12} {row.prefill:>10,.0f} tok/s {row.decode:>8,.1f} tok/s {row.decode / roof:>11.0%}")
    print("a token is decoded by:")
    for row in rows:
        print(f"  {row.backend:12} {row.program}")
    if reason := missing():
        print(f"the native kernels are not here: {reason}")
