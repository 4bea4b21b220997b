"""A small server that speaks as much HTTP as the page at `/` needs, for looking at the page without a model.

`python scripts/page_double.py [--port 8123] [--layers 26] [--experts 256] [--key K] [--models a b]`. The last message
chooses the answer: `code`, `hostile` (markup that must stay text), `break` (an error in mid-stream), `cut` (the
connection ends), `endless`, `think` (with reasoning), anything else a few sentences. `scripts/page_check.py` drives it.
"""

import argparse
import itertools
import json
import random
import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "manyhands" / "serve" / "page.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
POLICY += "connect-src 'self'; img-src 'self' data:"
PROSE = (
    "A mixture of experts keeps many small networks and asks only a few of them for each token. A router looks at the "
    "token and picks the ones that know most about it; their answers are weighed and added. So the model knows a lot, "
    "and still does little work for each word.\n\nNot every expert is asked equally often. Some learn punctuation, "
    "some names, some the ends of lines; you can see which by touching the words here."
)
CODE = "Here it is:\n\n```python\ndef top_k(scores, k):\n    return sorted(scores)[-k:]\n```\n\nThat is all."
HOSTILE = "<img src=x onerror=\"document.title='broken'\"> <script>document.title='broken'</script> **a** &amp;\n"
SPECIAL = {"code": CODE, "hostile": HOSTILE, "think": PROSE, "break": PROSE, "cut": PROSE}


class Double(ThreadingHTTPServer):
    """Holds the counts of its one made-up model; `received` keeps the bodies of the requests for answers."""

    daemon_threads = True

    def __init__(self, port: int, layers: int, experts: int, key: str, models: list[str], delay: float) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.layers, self.experts, self.key, self.models, self.delay = layers, experts, key, models, delay
        self.random = random.Random(0)
        self.received: list[dict[str, Any]] = []
        self.running = self.tokens = self.looks = 0
        self.taste = [[self.random.gammavariate(1.5, 0.7) for _ in range(experts)] for _ in range(layers)]
        for row in self.taste:
            row[self.random.randrange(experts)] = 0
        self.counts = [[int(20 * taste) for taste in row] for row in self.taste]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes a connection is no error; anything else is."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def route(self, text: str) -> dict[str, Any]:
        layers = {}
        for layer in range(self.layers):
            chance = random.Random(f"{layer} {text.strip()[-3:]}")  # like words, like experts
            ids = list(dict.fromkeys(chance.choices(range(self.experts), self.taste[layer], k=40)))[:8]
            weights = sorted((chance.expovariate(1) for _ in ids), reverse=True)
            layers[str(layer + 1)] = [[e, round(w / sum(weights), 4)] for e, w in zip(ids, weights, strict=True)]
            for expert in ids:
                self.counts[layer][expert] += 1
        self.tokens += 1
        return {"token": text, "layers": layers}

    def load(self) -> dict[str, Any]:
        self.looks += 1
        counts = {str(layer + 1): row for layer, row in enumerate(self.counts)}
        recent = {str(layer + 1): [count // 3 for count in row] for layer, row in enumerate(self.counts)}
        return {
            "model": self.models[0], "layers": list(range(1, self.layers + 1)), "num_experts": self.experts,
            "num_experts_per_tok": 8, "tokens": 4000 + self.tokens, "counts": counts,
            "recent": {"tokens": 900 + self.tokens, "counts": recent}, "running": self.running, "waiting": 0,
            "tokens_per_second": 31.4 * self.running, "cache_usage": 0.184,
        }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    server: Double
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the driver prints what matters."""

    def reply(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(body)

    def json(self, body: dict[str, Any], status: int = 200) -> None:
        self.reply(status, json.dumps(body).encode(), "application/json")

    def refused(self) -> bool:
        if not self.server.key or self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return False
        self.json({"error": {"message": "an API key is needed", "type": "authentication_error"}}, 401)
        return True

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/":
            self.reply(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.refused():
            return
        elif path == "/v1/models":
            self.json({"object": "list", "data": [{"id": name} for name in self.server.models]})
        elif path == "/v1/routing":
            self.json(self.server.load())
        elif path == "/tokenizer_info":
            self.json({"chat_template": None if "base" in self.server.models[0] else "…"})
        else:
            self.json({"error": {"message": f"nothing at {path}", "type": "invalid_request_error"}}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        self.server.received.append(body)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self.server.running += 1
        try:
            self.stream(body, body["messages"][-1]["content"] if "messages" in body else body["prompt"])
        except OSError:
            pass  # the reader went away: that is what Stop does
        finally:
            self.server.running -= 1

    def event(self, body: dict[str, Any] | str) -> None:
        data = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
        self.wfile.write(f"data: {data}\n\n".encode())

    def stream(self, body: dict[str, Any], asked: str) -> None:
        words = re.findall(r"\s*\S+|\s+", SPECIAL.get(asked, PROSE))
        said = [(word, False) for word in words]
        if asked == "think":
            said = [(word, True) for word in words[:12]] + said
        self.wfile.write(b": keepalive\n\n")
        if "messages" in body:
            self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]})
        for count, (word, thought) in enumerate(itertools.cycle(said) if asked == "endless" else said):
            if count == 5 and asked == "break":
                self.event({"error": {"message": "the engine stopped", "type": "server_error"}})
                return
            if count == 5 and asked == "cut":
                return
            delta = {"reasoning_content" if thought else "content": word}
            choice = {"index": 0, "delta": delta} if "messages" in body else {"index": 0, "text": word}
            chunk: dict[str, Any] = {"choices": [{**choice, "finish_reason": None}], "usage": None}
            if body.get("return_token_routing"):
                chunk["manyhands"] = {"routing": [self.server.route(word)]}
            self.event(chunk)
            time.sleep(self.server.delay)
        self.event({"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 40, "completion_tokens": len(said), "prompt_tokens_details": {"cached_tokens": 32}}
        self.event({"choices": [], "usage": usage})
        self.event("[DONE]")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--key", default="")
    parser.add_argument("--models", nargs="+", default=["tiny-moe"])
    parser.add_argument("--delay", type=float, default=0.03, help="seconds between two tokens")
    return parser.parse_args()


if __name__ == "__main__":
    Double(**vars(parse())).serve_forever()
