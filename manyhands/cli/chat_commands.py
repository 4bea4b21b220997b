"""The commands of `manyhands chat`, and what those do that ask the model nothing."""

from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.errors import UserError

if TYPE_CHECKING:
    from manyhands.generate import Conversation

COMMANDS = {
    "/regenerate": "another answer to the last question, in the place of the one there is",
    "/undo": "take the last question and its answer back",
    "/system": "TEXT: what the system says, from here on and for all before; alone: nothing",
    "/save": "FILE: write the conversation",
    "/load": "FILE: go on from a written conversation",
    "/show": "the model, how it is sampled, how full its context is",
    "/reset": "forget the conversation, but not the system's message",
    "/exit": "leave (also Ctrl-D)",
    "/help": "this",
}
ALIASES = {
    "/regen": "/regenerate",
    "/clear": "/reset",
    "/bye": "/exit",
    "/quit": "/exit",
    "/?": "/help",
    "/info": "/show",
}
"""What the same is called elsewhere (ollama, llama.cpp)."""
WANTING = ("/system", "/save", "/load")
HELP = """\
\"\"\"     begins and ends a text of several lines; a pasted text is one turn as it is
//…     says something that begins with a slash
Ctrl-C stops an answer."""


def act(conversation: "Conversation", word: str, behind: str) -> str:
    """Act on a command that asks nothing of the model; what to say of it."""
    from manyhands.generate.conversation_file import load_conversation, save_conversation

    if word in ("/save", "/load") and not behind:
        raise UserError(f"{word} takes the name of a file")
    path = Path(behind).expanduser()
    if word == "/save":
        save_conversation(path, conversation.messages)
        return f"{len(conversation.messages)} messages written to {path}"
    if word == "/load":
        conversation.take(load_conversation(path))
        return f"{len(conversation.messages)} messages from {path}"
    if word == "/system":
        conversation.system(behind or None)
        return "the system says that now" if behind else "the system says nothing now"
    if word == "/show":
        return _about(conversation)
    if word == "/reset":
        conversation.reset()
        return "forgotten"
    question = conversation.undo()
    return "there is nothing to take back" if question is None else f"taken back: {' '.join(question.split())[:60]}"


def _about(conversation: "Conversation") -> str:
    """What talks, and how."""
    from manyhands.checkpoint.about import about
    from manyhands.checkpoint.model import Model

    sampling = conversation.sampling.model_dump(exclude_defaults=True) | {
        "temperature": conversation.sampling.temperature
    }
    said = ", ".join(f"{name} {value}" for name, value in sorted(sampling.items()))
    turns = sum(message["role"] == "user" for message in conversation.messages)
    model = conversation.model
    assert isinstance(model, Model)
    context = model.config.longest_continued
    return f"{about(model)}; {said}; {turns} turns; context {context:,} tokens"
