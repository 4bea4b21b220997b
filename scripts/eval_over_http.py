"""lm-eval offline and over HTTP: the same log-probabilities, the same accuracy, the same answers. By hand:

    pip install 'manyhands[eval]' 'lm-eval[api]' transformers
    manyhands serve MODEL --port 8000                           # in another terminal
    python scripts/eval_over_http.py http://127.0.0.1:8000 MODEL

Three tasks are made of a text (multiple choice, continuation, perplexity) and asked offline, over HTTP in
batches of ids, and over HTTP with the server's tokenizer and several requests at once. Exits 1 if anything differs.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import manyhands
from manyhands.checkpoint.model import load
from manyhands.generate.harness import language_model, run_tasks

TASKS = {
    "http_choice": """
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
target_delimiter: ''
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "http_answer": """
output_type: generate_until
doc_to_text: text
doc_to_target: target
generation_kwargs: {until: ["\\n\\n", "return"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "http_text": """
output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}
LOGPROB = 1e-4
"""Most that the log-probabilities of an answer may differ by; of a text, for each of its letters."""


def write_tasks(folder: Path, text: str, questions: int) -> None:
    """A YAML and a JSONL file for each."""
    lines = [line for line in text.splitlines() if len(line.strip()) > 30 and " " in line.strip()[8:20]]
    if len(lines) < 8:
        sys.exit("the text has too few lines of more than 30 letters")
    chance = random.Random(0)
    rows: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}
    for _ in range(questions):
        line, *others = chance.sample(lines, 4)
        at = line.index(" ", len(line) - len(line.lstrip()) + 8)
        choices = [line[at:], *(" " + other.strip()[-20:].strip() for other in others)]
        label = chance.randrange(4)
        choices[0], choices[label] = choices[label], choices[0]
        rows["http_choice"].append({"text": line[:at], "choices": choices, "label": label})
        rows["http_answer"].append({"text": line[:at], "target": line[at:]})
    for length in (40, 300, 1500, 5000):  # the last longer than a small model's context
        at = chance.randrange(max(1, len(text) - length))
        rows["http_text"].append({"text": text[at : at + length]})
    for task, settings in TASKS.items():
        data = folder / f"{task}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[task]))
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{task}.yaml").write_text(f"task: {task}\n{source}{settings}")


def found(figures: dict[str, Any]) -> dict[str, float]:
    """The figures without their standard errors."""
    return {name: round(float(x), 6) for name, x in figures.items() if "," in name and "_stderr" not in name}


def compare(here: dict[str, Any], there: dict[str, Any]) -> bool:
    """Print what differs; whether nothing does."""
    fine = True
    for task in TASKS:
        worst, others, count = 0.0, 0, 0
        for mine, other in zip(here["samples"][task], there["samples"][task], strict=True):
            letters = len(mine["doc"]["text"]) if task == "http_text" else 1
            for a, b in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
                count += 1
                if isinstance(a, str):
                    others += a != b
                elif isinstance(a, float):
                    worst = max(worst, abs(a - b) / letters)
                else:
                    worst, others = max(worst, abs(a[0] - b[0])), others + (bool(a[1]) != bool(b[1]))
        figures = [found(result["results"][task]) for result in (here, there)]
        same = worst <= LOGPROB and not others and (task == "http_text" or figures[0] == figures[1])
        fine &= same
        said = f"{count} answers: log p differs by {worst:.1e} at most, {others} otherwise"
        print(f"  {'equal ' if same else 'DIFFER'} {task}, {said}; {figures[0]}, {figures[1]}")
    return fine


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the running server, without /v1")
    parser.add_argument("model", help="what it serves")
    parser.add_argument("--name", help="what the server calls it; default: the first of /v1/models")
    parser.add_argument("--tokenizer", help="a directory that transformers reads; default: the model's")
    parser.add_argument("--text", type=Path, help="default: manyhands' own sources")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--concurrent", type=int, default=4)
    asked = parser.parse_args()

    import requests
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    name = asked.name or requests.get(f"{asked.url}/v1/models", timeout=30).json()["data"][0]["id"]
    sources = sorted((Path(manyhands.__file__).parent / "engine").glob("*.py"))
    text = asked.text.read_text() if asked.text else "\n".join(path.read_text() for path in sources)
    model, tokenizer = load(asked.model)
    context = model.config.max_position_embeddings
    ways = {
        "token ids, 8 a request": {"tokenizer_backend": "huggingface", "tokenizer": asked.tokenizer or asked.model},
        f"the server's tokenizer, {asked.concurrent} at once": {"tokenizer_backend": "remote"},
    }
    how = [{"batch_size": 8}, {"num_concurrent": asked.concurrent}]
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), text, asked.questions)
        # Over HTTP a token is made behind what is scored, and lm-eval keeps two places free for it. It adds no
        # beginning-of-text token unless it is told to, and with the server's tokenizer never.
        lm = language_model(model, tokenizer, max_length=context - 2, add_bos=False)
        here = run_tasks(lm, list(TASKS), task_dir=Path(folder))
        for (what, backend), settings in zip(ways.items(), how, strict=True):
            api = LocalCompletionsAPI(
                base_url=f"{asked.url}/v1/completions", model=name, max_length=context, **backend, **settings
            )
            there = run_tasks(api, list(TASKS), task_dir=Path(folder))
            print(f"{asked.model}, {what}:")
            fine &= compare(here, there)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
