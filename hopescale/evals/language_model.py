"""A model of ours as lm-eval asks it: likelihoods of texts, and texts that go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hopescale.common.errors import ConfigError
from hopescale.evals.distribute import Tell, distribute, group_by_length, silent
from hopescale.evals.scoring import Scored, score, write
from hopescale.infer.load import LoadedModel
from hopescale.infer.sampling import Sampling
from hopescale.parallel.control import Control

BATCH_TOKENS = 4096
"""Tokens read at once, all rows together; bounds the memory of logits."""
LATER_TOKENS = 32
"""Tokens by which texts may differ in length that are gone on with together."""
CONTEXT_HINT = "attention reads as many as in training (train.seq_len), unless told to read more"
Pair = tuple[Any, list[int], list[int]]
"""What was asked, and the tokens of a context and of its continuation."""
SAMPLING = ("temperature", "top_k", "top_p")


class EvaluatedModel(TemplateLM):
    """A checkpoint or an export behind lm-eval's interface.

    Every rank is given all requests, and answers its share of them: to lm-eval it is one process, and its numbers do
    not depend on the number of ranks.

    Args:
        loaded: Holds a tokenizer.
        control: Control by which ranks meet.
        context: Tokens that are read at most before a token that is predicted; None is all there are.
        report: Listener for a line after every tenth of the work.
        tell: Listener for how many texts of this rank are done, and how many there are.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        control: Control,
        context: int | None,
        report: Callable[[str], None],
        tell: Tell = silent,
    ):
        super().__init__()
        self.model, self.text, self.control = loaded.model, loaded.tokenizer, control
        self.context, self.report, self.tell = context, report, tell

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which stands before every text."""
        return self.text.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Turn a text into ids that begin with end of text, unless `add_special_tokens` is False."""
        return [self.eot_token_id] * (add_special_tokens is not False) + self.text.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode both as one text; where a single piece covers the place between them, each for itself."""
        before, after = super()._encode_pair(context, continuation)
        return before, after or self.tok_encode(continuation, add_special_tokens=False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Scored]:
        """Score continuations, each given its context."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs: Any) -> list[Scored]:
        """Score continuations in tokens, given contexts in tokens of which the first are left out if need be."""
        pairs = [(context, after) for _, context, after in requests]
        if self.context is not None:
            longest = max((len(after) for _, after in pairs), default=0)
            if longest > self.context:
                message = f"a continuation has {longest} tokens, but only {self.context} are read at once"
                raise ConfigError(message, f"{CONTEXT_HINT}: --context {longest}")
            pairs = [(context[-(self.context + 1 - len(after)) :], after) for context, after in pairs]

        def work(batch: list[int]) -> list[Scored]:
            chosen = [pairs[number] for number in batch]
            texts, counts = [context + after for context, after in chosen], [len(after) for _, after in chosen]
            return score(self.model, texts, counts)

        batches = group_by_length([len(context) + len(after) for context, after in pairs], tokens=BATCH_TOKENS)
        return distribute(self.control, batches, work, self._tenths("scored"))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Score whole texts, from the end-of-text token before them on; in windows of `context` if there is one."""
        windows: list[Pair] = []
        counts = []
        for request in requests:
            tokens = self.text.encode(request.args[0])
            parts = get_rolling_token_windows(
                token_list=tokens,
                prefix_token=self.eot_token_id,
                max_seq_len=self.context or max(1, len(tokens)),
                context_len=1,
            )
            found = [(None, *make_disjoint_window(part)) for part in parts]
            counts.append(len(found))
            windows += found
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Go on with texts until one of their stop sequences, the end of text or their longest length."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers = [""] * len(requests)
        for numbers in groups.values():
            texts = self._continued([requests[number].args[0] for number in numbers], requests[numbers[0]].args[1])
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
        return answers

    def _continued(self, texts: list[str], options: dict[str, Any]) -> list[str]:
        """Go on with texts that ask for it in the same way."""
        options = dict(normalize_gen_kwargs(options, default_max_gen_toks=256))
        until = handle_stop_sequences(options.pop("until", None), eos=None)
        max_tokens, chooses = options.pop("max_gen_toks"), options.pop("do_sample", False)
        settings = {name: options.pop(name) for name in SAMPLING if name in options}
        if options:
            hint = f"known are until, max_gen_toks, do_sample, {', '.join(SAMPLING)}"
            raise ConfigError(f"a task's generation_kwargs ask for {', '.join(options)}, which is not known", hint)
        tokens = [self._cut_off(self.tok_encode(text), max_tokens) for text in texts]
        sampling, tokenizer = Sampling(**settings) if chooses else Sampling(), self.text

        def ended(row: list[int]) -> bool:
            text = tokenizer.decode(row)
            return row[-1] == tokenizer.eos_id or any(stop in text for stop in until if stop)

        def work(batch: list[int]) -> list[list[int]]:
            rows = [tokens[number] for number in batch]
            settings = {"max_tokens": max_tokens, "sampling": sampling, "seed": batch[0], "ended": ended}
            return write(self.model, rows, **settings)

        batches = group_by_length([len(row) for row in tokens], tokens=BATCH_TOKENS, spread=LATER_TOKENS)
        rows_written = distribute(self.control, batches, work, self._tenths("written"))
        return [postprocess_generated_text(tokenizer.decode(row), until, None) for row in rows_written]

    def _tenths(self, what: str) -> Callable[[int, int], None]:
        """Return a function that is told how much is done, and reports each tenth."""
        reported, share = 0, "" if self.control.num_ranks == 1 else " by this rank"

        def tell(done: int, total: int) -> None:
            nonlocal reported
            self.tell(done, total)
            if (tenth := 10 * done // total) > reported:
                reported = tenth
                self.report(f"{what} {done:,} of {total:,} texts{share}")

        return tell

    def _cut_off(self, tokens: list[int], max_tokens: int) -> list[int]:
        """Leave out the first tokens of a text that would be forgotten by its last."""
        if self.context is None:
            return tokens
        if max_tokens >= self.context:
            message = f"a task writes {max_tokens} tokens, but only {self.context} are read at once"
            raise ConfigError(message, f"{CONTEXT_HINT} (--context), or let the task write fewer (max_gen_toks)")
        return tokens[-(self.context - max_tokens) :]
