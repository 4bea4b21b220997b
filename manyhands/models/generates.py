"""`model.generate` on a decoder, under the names that transformers has for it.

B rows, S tokens of the longest prompt, N new tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

if TYPE_CHECKING:
    from manyhands.generate.tensors import Streamer
    from manyhands.models.decoder import Decoder


class Generates:
    """For `Decoder`. The work is the engine's, which lies above the models: what it needs is imported when asked."""

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        min_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        num_return_sequences: int = 1,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None,
        stopping_criteria: Sequence[Callable[[Tensor, None], Any]] | None = None,
        streamer: "Streamer | None" = None,
        **others: Any,
    ) -> Tensor:
        """Continue token ids [B, S]: [B, S + N] int64, the ids given and up to `max_new_tokens` (20) more, as
        transformers does it. For texts, and for requests that come and go, there are `mh.generate` and `mh.Engine`.

        A row ends with a token of `eos_token_id` (one or several; `()`: none), which stays, and is then filled up with
        `pad_token_id`. The mask is 0 for padding, which is on the left. Without `do_sample` the most probable token is
        taken; with it `torch.manual_seed` decides. What is not given is what the publisher's generation_config.json
        says, where the model was read from files, else what transformers takes: a temperature of 1 and the best 50.

        Processors are `(input_ids [1, n], scores [1, V]) -> scores`, stopping criteria `(input_ids [1, n], None) ->
        bool`, called for each row by itself, without its padding. A streamer is given the ids, then [B] at a time, and
        raises what it raises, as processors and criteria do.

        Raises `UserError` for ids, a mask or an argument that is wrong, and for one that transformers has and this has
        not (`num_beams`), since it would be ignored; `ConfigError` for a setting out of range; `ManyhandsError` if the
        logits are not finite.
        """
        from manyhands.generate.tensors import generate_ids

        chosen = {
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "min_new_tokens": min_new_tokens,
        }
        return generate_ids(
            cast("Decoder", self),
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            num_return_sequences=num_return_sequences,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            sampling=chosen,
            others=others,
        )
