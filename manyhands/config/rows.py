"""What a model is tuned on: rows, and what of them is learnt."""

from typing import Annotated, Literal

from pydantic import Field

from manyhands.config.base import Strict


class RowsConfig(Strict):
    """What is learnt of the rows of `data.sources` (docs/tuning.md); without this section they are plain text.
    `train.sequence_length` is the longest row, and the room into which rows are packed; `train.batch_size` counts such
    sequences."""

    columns: Literal["auto", "text", "messages", "prompt-completion", "preference"] = "auto"
    """Which form rows have; auto: the one whose columns are there."""
    turns: Literal["every", "last"] = "every"
    """Of a conversation: every turn of the assistant, or the last alone, for templates that change earlier ones."""
    packing: bool = True
    """Several rows in one sequence, which do not see each other; false: each is a sequence, padded."""
    chat_template: str | None = None
    """A file with a template, or `plain`, which needs no token of its own; None: the model's."""
    dpo_beta: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    """Learn preferences, rows of chosen and rejected answers, by DPO (arXiv 2305.18290) with this β; 0.1 there."""
    append_stop: bool = False
    """Put the end of text behind a last turn that the template leaves open (GLM)."""
