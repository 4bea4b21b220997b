"""An example or two of each verb, under its --help: what is typed most."""

EXAMPLES: dict[str, str] = {
    "generate": """
        generate runs/quickstart --prompt "def " --temperature 0
        generate OLMoE --show-routing < question.txt""",
    "chat": """
        chat Qwen3-30B-A3B-int4 --system "Be brief."
        chat Qwen3-30B-A3B-int4 --memory 8GB""",
    "serve": """
        serve runs/quickstart --port 8080
        serve OLMoE-int4 --host 0.0.0.0 --api-key-file keys.txt""",
    "eval": """
        eval runs/quickstart
        eval OLMoE --data book.txt --json
        eval OLMoE --tasks hellaswag --limit 100""",
    "train": """
        train --preset quickstart
        train -c my.yaml optim.lr=1e-3 --out runs/second
        train --resume runs/second""",
    "tune": """
        tune OLMoE --data chats.jsonl
        tune OLMoE --data chats.jsonl --method esft""",
    "report": """
        report runs/first runs/second""",
    "compare": """
        compare runs/first runs/second""",
    "sweep": """
        sweep rates.yaml --parallel 2""",
    "presets": """
        presets --json""",
    "config": """
        config num_experts
        config model.moe.router""",
    "inspect": """
        inspect runs/quickstart --data stdlib
        inspect OLMoE --data de.txt --data en.txt --out languages.html""",
    "check": """
        check quickstart
        check ./OLMoE
        check tiny --layout 2x2""",
    "simulate": """
        simulate trace/ --budgets 25%,50%
        simulate trace/ --layout 2x4 --placement eplb""",
    "bench": """
        bench runs/quickstart
        bench OLMoE-int4 --batch 16""",
    "lab run": """
        lab run collapse --quick""",
    "lab claims": """
        lab claims --json""",
    "trace show": """
        trace show trace/ --verify""",
    "trace import": """
        trace import routing.npz trace/""",
    "trace export": """
        trace export trace/ routing.csv""",
    "convert": """
        convert runs/quickstart out --to mixtral
        convert OLMoE olmoe.gguf --type q8_0""",
    "quantize": """
        quantize OLMoE OLMoE-int4
        quantize OLMoE OLMoE-int8 --experts int8 --data book.txt""",
    "upcycle": """
        upcycle SmolLM2 sparse --experts 8 --top-k 2""",
    "prune": """
        prune OLMoE smaller --keep 75% --data book.txt --curve""",
    "models": """
        models mixtral-8x7b
        models --sort total""",
    "plan": """
        plan mixtral-8x7b --machine here
        plan deepseek-v3 --machine 8xh100 --context 32k --format fp8""",
    "choose": """
        choose --memory 16GB
        choose --machine 8xh100 --users 50 --context 32k""",
    "doctor": """
        doctor
        doctor --speeds""",
}
"""By verb, `lab run` and its like too: lines of what stands behind `manyhands`."""


def examples(verb: str) -> list[str]:
    """The command lines."""
    return [f"manyhands {line.strip()}" for line in EXAMPLES.get(verb, "").strip().splitlines()]
