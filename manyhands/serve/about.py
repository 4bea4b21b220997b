"""What is asked about a model rather than of it: its name, its experts' load, its tokenizer."""

from collections.abc import Mapping
from typing import Any

from manyhands.engine.counters import Load
from manyhands.serve.chat_request import prompt_ids
from manyhands.serve.errors import wrong
from manyhands.serve.models import Entry, Models
from manyhands.serve.protocol import ChatBody, DetokenizeBody, TokenizeBody, parse
from manyhands.serve.served import Served, aside


def model_object(entry: Entry, models: Models) -> dict[str, Any]:
    """One of `/v1/models`."""
    found = {"id": entry.name, "object": "model", "created": models.created, "owned_by": "manyhands"}
    return found if entry.served is None else {**found, "max_model_len": entry.served.room}


def routing(served: Served) -> dict[str, Any]:
    """`/v1/routing`: tokens that went to each expert, since the start and of late."""
    counters, service = served.service.counters, served.service
    moe, recent = served.config.moe, counters.recent
    blocks = service.engine.scheduler.blocks
    return {
        "model": served.name,
        "layers": [] if moe is None else sorted(counters.total.experts),
        "num_experts": 0 if moe is None else moe.router.num_experts,
        "num_experts_per_tok": 0 if moe is None else moe.router.num_experts_per_tok,
        **_load(counters.total),
        "recent": _load(recent),
        "running": service.num_running,
        "waiting": service.num_waiting,
        "tokens_per_second": recent.rate,
        "cache_usage": blocks.num_used / blocks.num_blocks,
    }


def _load(load: Load) -> dict[str, Any]:
    counts = {str(layer): counts_E.tolist() for layer, counts_E in sorted(load.experts.items())}
    return {"tokens": load.tokens, "counts": counts}


async def tokenize(served: Served, body: Mapping[str, Any]) -> dict[str, Any]:
    """`/tokenize`, vLLM's form. Raises `ApiError`."""
    request = parse(TokenizeBody, body)
    text = request.prompt if request.prompt is not None else request.content
    if request.messages is not None:
        ids = await prompt_ids(served, parse(ChatBody, body))
    elif text is None:
        raise wrong("prompt", "this field is required")
    else:
        special = {"add_special_tokens": request.add_special_tokens, "parse_special": True}
        ids = await aside(served.tokenizer.encode, text, **special)
    found: dict[str, Any] = {"count": len(ids), "max_model_len": served.room, "tokens": ids}
    if request.return_token_strs:
        found["token_strs"] = [served.tokenizer.inner.id_to_token(token) for token in ids]
    return found


async def detokenize(served: Served, body: Mapping[str, Any]) -> dict[str, Any]:
    """`/detokenize`. Raises `ApiError`."""
    ids = parse(DetokenizeBody, body).tokens
    if ids and max(ids) >= served.config.vocab_size:
        raise wrong("tokens", f"token id {max(ids)} is not in the vocabulary of {served.config.vocab_size}")
    return {"prompt": await aside(served.tokenizer.decode, ids)}


def tokenizer_info(served: Served) -> dict[str, Any]:
    """`/tokenizer_info`: what lm-eval's remote tokenizer asks for."""
    tokenizer, named = served.tokenizer, served.tokenizer.files.named_tokens
    end = tokenizer.eos_token
    if end is None and tokenizer.eos_token_id is not None:
        end = tokenizer.inner.id_to_token(tokenizer.eos_token_id)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "bos_token": tokenizer.bos_token,
        "pad_token": named.get("pad_token") or end,
        "unk_token": named.get("unk_token"),
        "chat_template": tokenizer.chat_template,
        "model_max_length": served.room,
        "vocab_size": tokenizer.vocab_size,
    }
