"""`inspect --ablate`: experts ranked by what their absence costs."""

import json
from dataclasses import asdict

from manyhands.errors import DataError

SHOWN = 20


def rank(
    subject: str,
    data: list[str],
    max_tokens: int,
    length: int | None,
    text_field: str,
    seed: int,
    ignore: tuple[str, ...],
    json_output: bool,
) -> None:
    """Measure and print; with `json_output` every expert."""
    import torch

    from manyhands.checkpoint.model import load, only_decoder
    from manyhands.cli.progress import Loading, bar
    from manyhands.generate.evaluate import trained_length
    from manyhands.inspect.ablate import ablate
    from manyhands.inspect.watch import check_inspectable
    from manyhands.terminal import shown
    from manyhands.text import encode_documents, read_documents

    with Loading(subject) as read:
        loaded, tokenizer = load(subject, ignore_fields=ignore)
    model = only_decoder(loaded, "inspect")
    check_inspectable(model)
    read.said(model)
    ids = encode_documents(read_documents(data, text_field), tokenizer)[:max_tokens]
    S = min(length or trained_length(subject) or 512, model.config.max_position_embeddings)
    if len(ids) < 2 * (S + 1):
        raise DataError(f"--data has {len(ids):,} tokens: two texts of {S + 1} are needed; give a --sequence-length")
    texts = torch.tensor(ids[: len(ids) // (S + 1) * (S + 1)].astype("int64")).view(-1, S + 1)
    experts = sum(mlp.router.config.num_experts for mlp in model.sparse_layers().values())
    with bar(f"without each of {experts:,} experts") as update:
        found = ablate(model, texts, seed=seed, progress=lambda done: update(done, experts + 1))
    if json_output:
        print(json.dumps({"model": subject, "data": data, "sequence_length": S, "texts": len(texts), **asdict(found)}))
        return
    print(f"{shown(subject)}: loss {found.loss:.4f} on {found.tokens:,} tokens in {len(texts):,} texts")
    print("expert    rise of the loss (95 % over texts)       share of tokens")
    experts_shown = found.experts[:SHOWN]
    for a in experts_shown:
        name = f"{a.layer}.{a.expert}"
        print(f"{name:>7}   {a.increase:+.5f}  ({a.low:+.5f} to {a.high:+.5f})   {a.share:7.2%}")
    nothing = sum(a.low <= 0.0 <= a.high for a in found.experts)
    if len(found.experts) > SHOWN:
        print(f"… and {len(found.experts) - SHOWN:,} more (--json has all)")
    print(f"{nothing:,} of {len(found.experts):,} cost nothing that this text can show")
