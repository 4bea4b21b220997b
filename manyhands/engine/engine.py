"""The engine: requests come at any time, each with its own settings; every step makes one token for each that decodes.

    engine = Engine(model, tokenizer)
    for completion in engine.generate(["def main", "class Node"], SamplingConfig(max_new_tokens=50)):
        print(completion.text)

A request's tokens depend on the request alone: `sampling.seed`, `sampling.choice` and a token's position decide the
number it is drawn with, and its attention sees its own cache. Which requests run beside it changes no bit where weights
are int8 or int4, nor elsewhere with `exact`; else nothing but rounding. One that ends leaves at once, and its place is
another's.

V vocabulary.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from manyhands.config import SamplingConfig
from manyhands.engine.adjust import Adjuster, LogitsProcessor
from manyhands.engine.answer import Completion, Ran, Token
from manyhands.engine.batch import Batch, Row
from manyhands.engine.constraint import Constraint
from manyhands.engine.draw import Drawn, Wish, broken, draw_all, logprobs_of
from manyhands.engine.edited import Edited, Recorded
from manyhands.engine.memory import Memory
from manyhands.engine.prefix import Prefix
from manyhands.engine.recording import PassRecorder
from manyhands.engine.refuse import as_ids, check_causal, check_prompt
from manyhands.engine.request import FinishReason, Request
from manyhands.engine.runner import Forward, Routed, Runner, joined
from manyhands.engine.scheduler import Chunk, Plan, Scheduler
from manyhands.engine.speculate import MOST_DRAFTED
from manyhands.engine.state import State, state_of
from manyhands.engine.stream import TextStream
from manyhands.errors import DiskError, ManyhandsError, UserError
from manyhands.models import Decoder
from manyhands.moe.edit import Edits
from manyhands.text import Tokenizer
from manyhands.trace.recorder import Recorder

Prompt = str | Sequence[int]
"""Text, which gets the model's beginning-of-text token if it has one, or token ids as they are."""


class Engine:
    """One model, many requests. Not for several threads."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        max_sequences: int = 64,
        max_batch_tokens: int | None = None,
        cache_tokens: int | None = None,
        cache_bytes: int | None = None,
        paged: bool | None = None,
        prefix_caching: bool = True,
        keep_routing: bool = False,
        exact: bool = False,
        speculate: int = 0,
        trace: Recorder | None = None,
    ) -> None:
        """`max_sequences` run at a time; the others wait.

        `max_batch_tokens` go through the model in one step, prompts in chunks if need be; None: no prompt is cut.
        `cache_tokens` or `cache_bytes` bounds the cache of all together, in blocks of 32 tokens; when they run out, the
        youngest request waits and is computed again; None: no bound but the context of each. `paged` keeps the caches
        in such blocks, else each in one piece; None: in blocks where native attention reads them, and where they are
        bounded in bytes. `prefix_caching`: where they are in blocks, a prompt that begins as an earlier one did (a full
        block at least) is not computed again as far as that; the blocks of those that have ended are given to others
        when no other is free, and of an unbounded cache as many are kept as one context needs. `keep_routing` keeps
        every token's experts and their weights with the blocks, so that who asks for `routing` too need not compute
        again what others have; then the completion's scores and logits are NaN. `exact`: float weights
        too are multiplied in one order for any number of rows. `speculate`: up to so many tokens are guessed while one
        request runs alone, what followed when its last tokens stood in it before, and run with the next; a step makes
        as many tokens as were guessed right, and one. None of this changes what a request says, but for
        rounding; and not even that with `exact` or int8 or int4 weights, where all of the model is native. `trace` is
        given every pass (`recorder_for` makes one); whoever made it closes it.

        Raises `UserError` for a model that cannot generate, for less than one block, and for `speculate` below 0 or
        above 64.
        """
        check_causal(model.config)
        if not 0 <= speculate <= MOST_DRAFTED:
            raise UserError(f"speculate is {speculate}; it is from 0 to {MOST_DRAFTED} tokens")
        self.speculate = speculate
        self.model, self.tokenizer, self.runner = model, tokenizer, Runner(model, exact)
        budget = getattr(model, "budget", None)
        if budget is not None and cache_bytes is None and cache_tokens is None and paged is not False:
            cache_bytes = budget.cache_bytes
        self.memory = Memory(model, max_sequences, cache_tokens, cache_bytes, paged, prefix_caching, keep_routing)
        self.scheduler = Scheduler(self.memory.blocks, max_sequences, max_batch_tokens)
        self._count, self._max_sequences = 0, max_sequences
        self._apart: set[Request] = set()  # one of them wanted an expert that could not be read
        self._recording = None if trace is None else PassRecorder(trace)
        self.ran: Ran | None = None
        """The last step; None if it had nothing to run."""

    @property
    def cache_bytes_per_token(self) -> int:
        """What a token takes in the cache, in all layers; with `keep_routing`, with that."""
        return self.memory.bytes_per_token

    @property
    def busy(self) -> bool:
        """Whether any request has not ended."""
        return self.scheduler.busy

    def add(
        self,
        prompt: Prompt,
        sampling: SamplingConfig | None = None,
        *,
        routing: bool = False,
        prefix: Prefix | None = None,
        constraint: Constraint | None = None,
        cache_salt: str = "",
        priority: int = 0,
        edit: Edits | Recorded | None = None,
        logits_processor: Sequence[LogitsProcessor] = (),
    ) -> Request:
        """Queue a prompt. An empty one starts from the end-of-text token, which stands between documents.

        It ends at any of `tokenizer.eos_token_ids` and `sampling.stop_token_ids`; without a tokenizer there is no text.
        A `constraint` says before each token which may come; it is this request's alone. Each `logits_processor`, as
        transformers has them, is given the request's ids [1, n] and scores [1, V], between penalties and temperature.
        `routing` keeps the routing of every token for `completion`. With a `prefix` what an earlier request with it has
        computed is not computed again, and what this one computes is kept in it; one request has it at a time. What
        other requests with the same `cache_salt` have computed is used in any case, but for what `routing` still needs
        to see. A lower `priority` is served earlier: each level is as if the prompt had come 256 steps later.
        `edit` gives layers a routing to follow, or changes it (`manyhands.moe.edit`): a mask or a swap is for all of
        the request's tokens; of a replay, say the `routings` of an earlier completion, row p is for the token at
        position p. Behind its end, or with `Recorded` where the tokens part, the routers decide.

        Raises `UserError` for a prompt that is not in the vocabulary, leaves no room in the context or in the cache,
        for a priority that is not from -100 to 100, and for an `edit` together with a `prefix`; `ConfigError` for an
        `edit` that a layer cannot follow.
        """
        sampling = SamplingConfig() if sampling is None else sampling
        tokenizer, context = self.tokenizer, self.model.config.longest_continued
        if tokenizer is None and (sampling.stop or isinstance(prompt, str)):
            what = "a prompt is text" if isinstance(prompt, str) else "stop strings are text"
            raise UserError(f"{what}: generating with {'it' if isinstance(prompt, str) else 'them'} needs a tokenizer")
        if isinstance(prompt, str):
            assert tokenizer is not None
            prompt = tokenizer.encode(prompt, add_special_tokens=True)
        ids = check_prompt(self.model.config, as_ids(prompt), tokenizer, sampling)
        length = min(len(ids) + sampling.max_new_tokens, context)
        request = Request(self._count, ids, sampling, length, self.scheduler.blocks.new_table())
        edited = Edited(edit, self.model) if edit else None
        if edited is not None:
            if prefix is not None:
                raise UserError("a prefix was computed without edits: give an edit without it")
            cache_salt = f"{edited.name or f'replay {request.id}'}\0{cache_salt}"
        request.salt, request.priority = cache_salt, priority
        kept = self.memory.kept is not None
        asks_all = (routing and not kept) or request.scores_prompt
        request.most_shared = 0 if asks_all else length
        self.scheduler.add(request)
        self._count += 1
        eos = tokenizer.eos_token_ids if tokenizer and not sampling.ignore_eos else frozenset()
        ends = eos | frozenset(sampling.stop_token_ids)
        request.kept = State(
            adjuster=Adjuster(sampling, ids, ends, constraint, tuple(logits_processor)),
            ends=ends,
            stream=TextStream(tokenizer.stream_decoder(), sampling.stop) if tokenizer else None,
            prefix=prefix,
            edited=edited,
            keeps_routing=routing and not kept,
            reads_routing=routing and kept,
            prompt_logprobs=[None] * len(ids) if request.scores_prompt else [],
        )
        if prefix is not None:  # now, so that what is shared counts as computed when the step is planned
            self._look_at_weights()
            self.memory.resume(request, prefix, self.runner)
        return request

    def step(self) -> list[Token]:
        """Run one forward pass: a new token for each request that decodes, and prompts that have waited.

        With `speculate` there may be several new tokens of the one request that runs, in their order.
        Nothing while only a part of a prompt was run, and for a request of no new tokens. A request whose logits are
        not finite, or to which nothing is allowed, ends with the reason "error" and what its `error` says; no other
        does; so does one whose experts cannot be read from disk. A pass that was cut short (Ctrl-C) leaves every
        request as it was; its caches are computed again.
        """
        plan, self.ran = self._plan(), None
        if not plan.chunks:
            return []
        batch = Batch([self._row(chunk) for chunk in plan.chunks])
        if draft := self._draft(plan):
            ids, request = batch.ids + draft, plan.chunks[0].request
            edits = state_of(request).edits(request, ids)
            batch = Batch([Row(ids, batch.rows[0].cache, every=True, edits=edits)])
        try:
            forward = self.runner.run(batch)
        except DiskError as error:
            self._put_back(plan)
            self._unread(plan, error)
            return []
        except BaseException:  # Ctrl-C, say: the layers may hold different lengths
            self._put_back(plan)
            raise
        reads = None if self.runner.store is None else self.runner.store.take()
        self.ran = Ran(forward.routed, [chunk.request for chunk in plan.chunks], batch.starts, reads)
        if self._recording is not None:
            self._recording.ran(batch.rows, self.ran.requests, forward.routed)
        if draft:
            return self._accept(plan.chunks[0].request, batch.ids, forward)
        self.memory.keep_routing(plan.chunks, forward.routed)
        for chunk, row, start in zip(plan.chunks, batch.rows, batch.starts, strict=True):
            self.scheduler.advance(chunk)
            routings = partial(forward.routed.rows, slice(start, start + chunk.count))
            state_of(chunk.request).ran(row.ids, routings)
        drawing: list[int] = []
        for r, chunk in enumerate(plan.chunks):
            request, draws = chunk.request, batch.rows[r].draws
            if request.scores_prompt:
                self._score(request, batch.rows[r].position - chunk.count, forward.logits[batch.logits[r]])
            if draws and request.num_tokens < request.max_length:
                drawing.append(r)
            elif draws:  # of no new tokens
                self._end(request, "length")
        requests = [plan.chunks[r].request for r in drawing]
        drawn = self._draw(forward.logits, [batch.logits[r].stop - 1 for r in drawing], requests)
        tokens = [
            self._push(request, made, forward.routed, batch.last[r])
            for r, request, made in zip(drawing, requests, drawn, strict=True)
        ]
        return [token for token in tokens if token is not None]

    def abort(self, request: Request) -> None:
        """End it now, wherever it is; one that has ended stays as it is."""
        self._end(request, "abort")

    def completion(self, request: Request) -> Completion:
        """What was made of a request so far."""
        state = state_of(request)
        self.memory.read_routing(request)
        return Completion(
            "".join(state.text),
            list(request.token_ids),
            request.finish_reason,
            joined(state.routings),
            state.stop,
            None if request.sampling.logprobs is None else list(state.logprobs),
            list(state.prompt_logprobs) if request.scores_prompt else None,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        routing: bool = False,
        edit: Edits | Recorded | None = None,
    ) -> list[Completion]:
        """Continue prompts, all together; the completions in their order. `sampling` is one for all, or each its own;
        `edit` is for all.

        Raises what `add` and `step` do.
        """
        requests = self.add_all(prompts, sampling, routing=routing, edit=edit)
        for _ in self._tokens(requests):
            pass
        return [self.completion(request) for request in requests]

    def stream(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig | Sequence[SamplingConfig] | None = None
    ) -> Iterator[tuple[int, Token]]:
        """The same, token by token as they are made, each with the number of its prompt.

        Raises, on the call, what `add` does. Closing the iterator ends what has not ended. Tokens that other requests
        get meanwhile are in their `completion`.
        """
        return self._tokens(self.add_all(prompts, sampling))

    def add_all(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        routing: bool = False,
        prefix: Prefix | None = None,
        edit: Edits | Recorded | None = None,
    ) -> list[Request]:
        """`add` for each, or for none if one of them is refused."""
        if isinstance(prompts, str):
            raise UserError("prompts are a list: give [prompt] for one")
        each = sampling if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and {len(each)} sampling settings: give one for all, or as many")
        requests: list[Request] = []
        try:
            for prompt, how in zip(prompts, each, strict=True):
                requests.append(self.add(prompt, how, routing=routing, prefix=prefix, edit=edit))
        except BaseException:
            self._abort_all(requests)
            raise
        return requests

    def _tokens(self, requests: list[Request]) -> Iterator[tuple[int, Token]]:
        number = {request.id: i for i, request in enumerate(requests)}
        try:
            while any(request.finish_reason is None for request in requests):
                for token in self.step():
                    if token.request.id in number:
                        yield number[token.request.id], token
                check_errors(requests)
        finally:
            self._abort_all(requests)

    def _abort_all(self, requests: list[Request]) -> None:
        for request in requests:
            self.abort(request)

    def _plan(self) -> Plan:
        """The next step. Where nothing fits any more, what conversations keep for their next turns goes."""
        scheduler, memory = self.scheduler, self.memory
        if self._apart:
            self._apart = {request for request in self._apart if request.finish_reason is None}
        scheduler.max_sequences = 1 if self._apart else self._max_sequences
        if scheduler.waiting and len(scheduler.running) < scheduler.max_sequences:
            scheduler.caching = memory.caching(self.runner)
            if scheduler.caching:
                self._look_at_weights()
        plan = scheduler.schedule()
        if not plan.chunks and self.busy:
            for request in scheduler.waiting:
                request.num_computed = 0
                state_of(request).forget(request)
            memory.forget_prefixes(scheduler.running)
            again = scheduler.schedule()
            plan = Plan(again.chunks, plan.preempted + again.preempted)
        for request in plan.preempted:
            state_of(request).forget(request)
        return plan

    def _put_back(self, plan: Plan) -> None:
        for chunk in plan.chunks:
            self.scheduler.put_back(chunk.request)
            state_of(chunk.request).forget(chunk.request)

    def _unread(self, plan: Plan, error: DiskError) -> None:
        """An expert could not be read. Whoever ran alone wanted it; of several, each runs alone until it has ended."""
        if len(plan.chunks) > 1:
            self._apart = {chunk.request for chunk in plan.chunks}
            return
        request = plan.chunks[0].request
        request.error = str(error)
        self._end(request, "error")

    def _look_at_weights(self) -> None:
        """What other weights have computed is not used any more."""
        if self.memory.changed():
            self.scheduler.epoch += 1
            self.memory.forget_prefixes(self.scheduler.running)

    def _end(self, request: Request, reason: FinishReason) -> None:
        self.memory.read_routing(request)
        state_of(request).leave()
        self.scheduler.end(request, reason)
        self.memory.rest()

    def _row(self, chunk: Chunk) -> Row:
        request = chunk.request
        cache = state_of(request).begin(request, self.memory.new_cache(request, self.runner))
        every = request.scores_prompt and request.num_computed < len(request.prompt_ids)
        ids = request.next_ids(chunk.count)
        return Row(ids, cache, chunk.draws, every, state_of(request).edits(request, ids))

    def _draft(self, plan: Plan) -> list[int]:
        """A guess at what comes behind the one token that runs, if only one does; there are blocks for it."""
        request = plan.chunks[0].request
        if not self.speculate or len(self.scheduler.running) > 1 or request.num_waiting > 1:
            return []
        room = min(self.speculate, plan.left, request.max_length - request.num_tokens - 1)
        lookup = state_of(request).lookup
        lookup.read(request.ids(lookup.length, request.num_tokens - lookup.length))
        draft = lookup.draft(room)
        while draft and not request.table.reserve(request.num_tokens + len(draft)):
            draft.pop()
        return draft

    def _accept(self, request: Request, ids: list[int], forward: Forward) -> list[Token]:
        """Step by step what single passes would have made, as long as the token that ran next is the one drawn."""
        state, tokens = state_of(request), list[Token]()
        self.memory.keep_routing([Chunk(request, len(ids))], forward.routed)
        try:
            for i, token_id in enumerate(ids):
                self.scheduler.advance(Chunk(request, 1))
                state.ran([token_id], partial(forward.routed.rows, slice(i, i + 1)))
                token = self._push(request, self._draw(forward.logits, [i], [request])[0], forward.routed, i)
                if token is not None:
                    tokens.append(token)
                if token is None or token.finish_reason or [token.token_id] != ids[i + 1 : i + 2]:
                    break
        finally:
            state.reject(request)
        return tokens

    def _score(self, request: Request, first: int, logits_CV: Tensor) -> None:
        """Logits of the tokens from `first` on: what each made of the prompt's next."""
        found, prompt = state_of(request).prompt_logprobs, request.prompt_ids
        targets = prompt[first + 1 : first + 1 + len(logits_CV)]
        count = request.sampling.prompt_logprobs
        if targets and count is not None:
            found[first + 1 : first + 1 + len(targets)] = logprobs_of(logits_CV[: len(targets)], targets, count)

    def _draw(self, logits_RV: Tensor, at: list[int], requests: list[Request]) -> list[Drawn]:
        """A token for each, from its row of the logits, with its own settings."""
        if len(at) < len(logits_RV):
            logits_RV = logits_RV[at]
        return draw_all(logits_RV, [Wish(r.sampling, r.num_tokens, state_of(r).adjuster) for r in requests])

    def _push(self, request: Request, drawn: Drawn, routed: Routed, at: int) -> Token | None:
        if drawn.error is not None:
            request.error = drawn.error
            self._end(request, "error")
            return None
        try:
            text, reason = state_of(request).push(request, drawn)
        except Exception as error:  # of its constraint: somebody else's code
            request.error = broken(error)
            self._end(request, "error")
            return None
        if reason is not None:
            self._end(request, reason)
        return Token(request, drawn.token_id, text, reason, drawn.logprob, routed, at)


def check_errors(requests: Sequence[Request]) -> None:
    """Raises `ManyhandsError` with what went wrong with the first of them that ended so."""
    for request in requests:
        if request.error is not None:
            raise ManyhandsError(request.error)
