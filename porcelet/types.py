"""The nouns that cross a package border. Plain frozen dataclasses of Python values: no tensors, no torch.

A request's way: `Request` → scheduler → `Batch` with its `Drawing`s → runner → sampler → `Draw` → scheduler → `Output`.
A training token's way: data or rollout → `Sample` → flat batch → loss. `Episode` is a rollout with its reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from porcelet.errors import InputError

Progress = Callable[[int, int], None]  # bytes done so far, bytes in all

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_SAMPLES = 128
CONSTRAINTS = ("json_schema", "regex", "choice", "lark")


@dataclass(frozen=True)
class Constraint:
    """What an answer must look like: a JSON schema, a regular expression, one of several texts, or a Lark grammar.

    A Lark grammar may consist of `parts`, each with a title for messages about it; it refers to them as @part_0,
    @part_1 and so on. Of the special tokens it may use those of `special`, as <[id]>. With a `trigger`, which is one of
    those, an answer is free up to the first such token, and the grammar holds from there on, the trigger included.
    """

    kind: str
    value: str | tuple[str, ...]
    parts: tuple[tuple[str, Constraint], ...] = ()
    special: tuple[int, ...] = ()
    trigger: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in CONSTRAINTS:
            raise InputError(f"constraint {self.kind!r} is not known; it must be one of {', '.join(CONSTRAINTS)}")
        if self.kind == "choice":
            if isinstance(self.value, str) or not self.value or "" in self.value:
                raise InputError("a choice is a tuple of texts, none of them empty")
        elif not isinstance(self.value, str) or not self.value:
            raise InputError(f"a {self.kind} is a text that is not empty; it is {str(self.value)[:80]!r}")
        if self.kind != "lark" and (self.parts or self.special):
            raise InputError(f"a {self.kind} has parts or special tokens; only a Lark grammar may")
        if any(part.parts or part.special for _, part in self.parts):
            raise InputError("a part of a Lark grammar has parts or special tokens; only the whole may")
        if self.trigger is not None and self.trigger not in self.special:
            raise InputError(f"the trigger {self.trigger} is not among the special tokens {self.special}")


@dataclass(frozen=True, kw_only=True)
class Reasoning:
    """How an answer's reasoning ends. The answer begins inside it.

    `end` are the token ids after which the answer proper comes. Once `budget` tokens are spent without them, the
    tokens of `closing` follow, forced: a graceful sentence, say, and `end` at last.
    """

    end: tuple[int, ...]
    budget: int | None = None
    closing: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.end:
            raise InputError("the reasoning's end is empty; give the token ids that close it")
        if self.budget is not None and self.budget < 0:
            raise InputError(f"the thinking budget is {self.budget}; it must be 0 or more")
        if self.budget is not None and self.closing[-len(self.end) :] != self.end:
            raise InputError("the closing words of a thinking budget must end with the reasoning's end")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Order: bias, penalties, temperature, min-p, top-k, top-p, then the draw.

    `temperature` 0 is greedy: the best token after bias and penalties. `top_k` 0, `top_p` 1 and `min_p` 0 are off;
    min-p keeps tokens of at least `min_p` times the best one's probability. `repetition_penalty` r divides positive
    logits of tokens in prompt or answer by r and multiplies negative ones (CTRL, section 4.1); then each token of the
    answer loses `frequency_penalty` as often as it was drawn and `presence_penalty` once. `logit_bias` holds
    (token, what is added to its logit) pairs.

    `seed` makes a request's draws reproducible whatever else shares its batch. `stop_token_ids` end the request and
    are not part of its text; so do the model's own end-of-sequence tokens unless `ignore_eos`, which benchmarks use to
    get answers of a given length. `stop` strings end the text before the first of them to be complete.
    `logprobs` n asks for the raw log-probability of each token and for the n best alternatives, `prompt_logprobs` n
    for those of the prompt's tokens. `n` samples share one prompt, which is computed once; with a `seed`, each draws
    from its own stream. A `constraint` holds for the whole answer, or for what comes after its `reasoning`.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    constraint: Constraint | None = None
    reasoning: Reasoning | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens < 2**31:
            raise InputError(f"max_tokens is {self.max_tokens}; it must lie in 1..2^31-1")
        if not 0 <= self.top_k < 2**31:
            raise InputError(f"top_k is {self.top_k}; it must lie in 0..2^31-1, 0 being off")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; it must lie in 0..2^63-1")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise InputError(f"{name} is {value}; it must lie in {low}..{high}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_TOP_LOGPROBS:
                raise InputError(f"{name} is {value}; it must lie in 0..{MAX_TOP_LOGPROBS}")
        if not 1 <= self.n <= MAX_SAMPLES:
            raise InputError(f"n is {self.n}; it must lie in 1..{MAX_SAMPLES}")
        if len(self.stop_token_ids) > MAX_BIASES:
            raise InputError(f"stop_token_ids has {len(self.stop_token_ids)} tokens; at most {MAX_BIASES} are allowed")
        _check_stops(self.stop)
        _check_biases(self.logit_bias)

    @property
    def penalizes(self) -> bool:
        """Whether a draw depends on the tokens before it by more than the model."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


_RANGES = {
    "temperature": (0, 100),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),  # what keeps every product within float32
}


def _check_stops(stops: tuple[str, ...]) -> None:
    if isinstance(stops, str):
        raise InputError(f"stop is the string {stops[:80]!r}; give a tuple of strings")
    if len(stops) > MAX_STOPS:
        raise InputError(f"stop holds {len(stops)} strings; at most {MAX_STOPS} are allowed")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise InputError(f"stop holds a string of {len(stop)} characters; 1..{MAX_STOP_CHARACTERS} are allowed")
        if any("\ud800" <= character <= "\udfff" for character in stop):
            raise InputError(f"stop {stop[:80]!r} holds half of a surrogate pair, which no text contains")


def _check_biases(biases: tuple[tuple[int, float], ...]) -> None:
    if len(biases) > MAX_BIASES:
        raise InputError(f"logit_bias names {len(biases)} tokens; at most {MAX_BIASES} are allowed")
    if len({token for token, _ in biases}) < len(biases):
        raise InputError("logit_bias names a token twice; give each token one bias")
    for token, bias in biases:
        if not -100 <= bias <= 100:
            raise InputError(f"logit_bias of token {token} is {bias}; it must lie in -100..100")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to complete. `id` is unique among the requests in flight.

    Requests of a lower `priority` number go first. Tenants get equal shares of the tokens, and share no cached
    prefixes with each other. `adapter` names the weights' variant.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    tenant: str = ""
    priority: int = 0
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Drawing:
    """One token to be found from one row of logits. A function of these fields and the logits alone.

    `row` counts the batch's sampled rows; several drawings may share one. `index` is the token's number in its answer
    and picks the random number from `seed`'s stream. `history` are all known tokens if the draw is penalised for them,
    else empty. `mask` has bit t of byte t // 8 (low bits first) set where token t is allowed; None allows all. A
    `token` that is given is scored, not drawn.
    """

    row: int
    params: SamplingParams
    seed: int
    index: int
    history: tuple[int, ...] = ()
    mask: bytes | None = None
    token: int | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """One drawn token. `logprob` is under the distribution it was drawn from (greedy: after bias and penalties); 0 for
    a token that was given.

    Where the request asked for logprobs, `raw_logprob` is under the model's own and `top` are that one's n best.
    """

    token: int
    logprob: float
    raw_logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one step added to one request.

    `tokens` are new since the last output, the stop token excluded; `stop_token` is the one that ended the request,
    if one did. A token that may be part of a stop string comes when that is decided, and never if it was; `stop` is
    the string that ended the request, and `tail` are the bytes before it of the token it begins within.

    `logprobs` has an entry for each of `tokens` and a last one for the stop token: the log-probability under the
    distribution the token was drawn from (greedy: after bias and penalties, at temperature 1). `raw_logprobs`, under
    the model's own distribution, and `top_logprobs`, that one's best (token, log-probability) pairs, have the same
    entries if the request asked for them. Tokens cut off by a stop string have none.

    `finish_reason` is None while the request runs, else "stop", "length", "abort" or "error" (then `error` says why).
    `num_generated` counts all tokens drawn so far, the stop's and those held back included.

    `index` says which of a request's n samples this is; each of them ends. `num_cached_tokens` of the prompt were
    found in the prefix cache. `prompt_logprobs`, if asked for, come with the first output of sample 0: for each prompt
    token but the first its log-probability and the best (token, log-probability) pairs. Of `num_drafted` tokens that
    speculation guessed, `num_accepted` were right. The request has waited `queue_seconds` before it ran for the first
    time; two outputs that differ in nothing else are equal.
    """

    request_id: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    raw_logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    tail: bytes = b""
    stop_token: int | None = None
    stop: str | None = None
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_generated: int = 0
    error: str | None = None
    index: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = ()
    num_drafted: int = 0
    num_accepted: int = 0
    queue_seconds: float = field(default=0.0, compare=False)


def join_outputs(outputs: Sequence[Output]) -> Output:
    """Consecutive outputs of one sample as one."""
    return replace(
        outputs[-1],
        tokens=tuple(token for output in outputs for token in output.tokens),
        logprobs=tuple(logprob for output in outputs for logprob in output.logprobs),
        raw_logprobs=tuple(logprob for output in outputs for logprob in output.raw_logprobs),
        top_logprobs=tuple(top for output in outputs for top in output.top_logprobs),
        prompt_logprobs=next((output.prompt_logprobs for output in outputs if output.prompt_logprobs), ()),
    )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One engine step as the scheduler decided it: flat tokens, no padding.

    `offsets` [B+1] cut the flat lists into sequences; `lengths` [B] are cached tokens after the step; `tables`
    [B] are each sequence's pages in order. `expanded` [B] marks the sequences that MLA attends in its expanded form,
    which come last. `sampled_rows` are the flat rows whose logits the `draws` refer to. First of all the pages `copies`
    (from, to) are copied, in every layer.
    """

    request_ids: tuple[str, ...]
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    tables: tuple[tuple[int, ...], ...]
    expanded: tuple[bool, ...]
    sampled_rows: tuple[int, ...]
    draws: tuple[Drawing, ...]
    copies: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training sequence. Every list is empty or as long as `tokens`; entry t weighs the prediction OF token t.

    `weights` weigh cross-entropy; `advantages` weigh the policy gradient, with `old_logprobs` the log-probability
    each token had before the first update, `sampler_logprobs` the one it was drawn with (empty: the same) and
    `reference_logprobs` the one it has under a reference. Pre-training, SFT and GRPO differ only in these numbers. The
    first `num_prompt` tokens may be computed once for all samples that share them; a sample with advantages was drawn
    from there on, and counts as an answer even where the advantages are all zero.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()
    old_logprobs: tuple[float, ...] = ()
    sampler_logprobs: tuple[float, ...] = ()
    reference_logprobs: tuple[float, ...] = ()
    num_prompt: int = 0

    @property
    def num_drawn(self) -> int:
        """How many tokens the policy drew."""
        return len(self.tokens) - max(self.num_prompt, 1) if self.advantages else 0

    @property
    def teaches(self) -> bool:
        """Whether anything in it has a gradient."""
        return any(self.weights) or any(self.advantages) or bool(self.reference_logprobs)


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One rollout: what was asked, what was answered, with which log-probabilities, and what it earned.

    `tokens` end with the stop token if the answer is `finished`; otherwise it was cut off.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    reward: float
    finished: bool = True
