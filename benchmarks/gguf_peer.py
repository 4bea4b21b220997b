"""llama.cpp, run by a Python that has it (`pip install xllamacpp`): greedy continuations, with every log-probability.

`python benchmarks/gguf_peer.py REQUEST.json ANSWER.json`; the request is {"gguf", "prompts": [[id]], "steps", "vocab",
"texts", "banned": [id]}, and the answer {"ids": [[id]], "logprobs": [[[V]]], "tokens": [[id]], "version"}.
"""

import json
import sys
import urllib.request

import xllamacpp


def main() -> None:
    """One request, one answer."""
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    server = started(request["gguf"])
    ids, logprobs = [], []
    for prompt in request["prompts"]:
        answer = post(
            server,
            "/completion",
            {
                "prompt": prompt, "n_predict": request["steps"], "temperature": 0.0, "n_probs": request["vocab"],
                "cache_prompt": False, "return_tokens": True, "ignore_eos": True, "samplers": ["top_k"], "top_k": 1,
                "logit_bias": [[token_id, False] for token_id in request["banned"]],
            },
        )  # fmt: skip
        steps = answer["completion_probabilities"]
        ids.append([step["id"] for step in steps])
        rows = []
        for step in steps:
            row = [None] * request["vocab"]
            for entry in step["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
            rows.append(row)
        logprobs.append(rows)
    tokens = [
        post(server, "/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]
        for text in request["texts"]
    ]
    with open(sys.argv[2], "w", encoding="utf-8") as file:  # llama.cpp writes to the standard output
        json.dump({"ids": ids, "logprobs": logprobs, "tokens": tokens, "version": xllamacpp.BUILD_INFO}, file)


def started(path: str) -> xllamacpp.Server:
    """Everything in float32 that is not the weights: keys and values, no flash attention."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def post(server: xllamacpp.Server, path: str, body: object) -> dict:
    """JSON in, JSON out."""
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


if __name__ == "__main__":
    main()
