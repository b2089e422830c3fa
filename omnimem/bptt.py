"""Exact gradients through a stream of any length, in bounded device memory: backpropagation through time.

    stream = Stream(backbone, cache)
    bptt = ChunkwiseBPTT(stream, store=HostStore(device))
    bptt.forward(prefix)
    for chunk in reader:
        bptt.step(encoder.encode(chunk))
        loss, *_ = bptt.add_loss(lambda: (cross_entropy(*stream.answer_logits(…), reduction="sum"),))
    bptt.backward(weight=1 / num_answer_tokens)

The forward pass is the inference path (no autograd graph, in-place eviction). It logs the evicted tokens that were
stored before the step. The
backward pass walks the steps in reverse: it restores the evicted tokens, recomputes the step with a graph and the
logged evictions, and passes the gradient of the cache on to the previous step.

Keys, values and features are stored once: in the cache or, once evicted, in the offload store. Tokens that a layer
evicts in the step that appended them are recomputed, not stored, unless the straight-through gradient uses them in the
next step (`omnimem.memory.margin`).

On the device are the cache, one step with its graph, and the gradient of the cache in float32, whatever the dtype of
the model: sums over thousands of steps and questions lose small summands in bfloat16. For a model in bfloat16 that
gradient takes twice the bytes of the cache's keys and values (with a selection gradient, of its features too).
Where the cache encodes its keys and values (`omnimem.memory.codec`), a step is recomputed from decoded ones: the
forward pass and the records are smaller, the backward pass is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omnimem.backbones import ChunkInputs
from omnimem.forward import Stream
from omnimem.memory import CacheSnapshot, Eviction
from omnimem.memory.cache import Gradients
from omnimem.memory.offload_store import Store

Loss = Callable[[], tuple[Tensor, ...]]
"""Runs a question on the present cache: its loss (one number), and further numbers to report."""


@dataclass(frozen=True)
class Truncation:
    """Truncated backpropagation through time.

    Attributes
    ----------
    window : int or None
        W: the gradient of a question flows through the last W steps (chunks, and the text before the media); the older
        cache is detached. None: through all steps. As in TBPTT with k1 = 1 and k2 = W, questions asked after different
        steps need separate backward passes: with a question after every chunk, each step is recomputed W times. Steps
        that no gradient reaches are not recomputed.
    detach_below_layer : int
        First layer that gets gradients from chunks not directly followed by a question (release: 18, the middle of
        36).
    detach_from_layer : int or None
        First layer above it that gets none from such chunks; None: no upper limit.
    """

    window: int | None = None
    detach_below_layer: int = 0
    detach_from_layer: int | None = None


class _Record(NamedTuple):
    """What the backward pass needs of a step; kept in the offload store."""

    rng_state: Any
    inputs: ChunkInputs | None
    before: CacheSnapshot
    evictions: list[Eviction | None]


@dataclass
class _Pass:
    """A question asked after a step, or the empty pass by which this process matches one of another process.

    Attributes
    ----------
    loss : callable
        Its loss.
    rng_state : tuple
        Random state before it.
    empty : bool
        Whether it matches a pass of another process.
    repeated : bool
        Whether it matches a step of another process; it then runs once for each recomputation of that step.
    """

    loss: Loss
    rng_state: Any
    empty: bool = False
    repeated: bool = False


@dataclass
class _Step:
    """One step of a stream and the passes after it."""

    text: bool
    record: Any  # handle of a _Record in the store
    encode_again: Callable[[], ChunkInputs] | None = None
    passes: list[_Pass] = field(default_factory=list)

    @property
    def has_question(self) -> bool:
        return any(not one.empty for one in self.passes)


class ChunkwiseBPTT:
    """A stream that runs forward without a graph and backward step by step.

    Parameters
    ----------
    stream : Stream
        With an empty cache.
    store : Store, optional
        Where records are kept for the backward pass; on the device when left out.
    truncation : Truncation, optional
        Where gradients end.
    call : callable, optional
        Wraps every call of the model (DeepSpeed: ``engine(function)``).
    backward : callable, optional
        Differentiates one number.
    record : bool
        Whether there is a backward pass; without it the stream only runs forward.
    lockstep : bool
        Whether processes share weights, so that each has to run and differentiate the model as often as any other (see
        `empty_pass`).
    any_process : callable, optional
        Whether a condition holds in any of the processes in lockstep.
    """

    def __init__(
        self,
        stream: Stream,
        store: Store | None = None,
        truncation: Truncation | None = None,
        call: Callable[[Callable[[], Any]], Any] = lambda function: function(),
        backward: Callable[[Tensor], Any] = Tensor.backward,
        record: bool = True,
        lockstep: bool = False,
        any_process: Callable[[bool], bool] = lambda here: here,
    ) -> None:
        self.stream, self.cache = stream, stream.cache
        self.store, self.truncation = store or Store(), truncation or Truncation()
        self._call, self._backward = call, backward
        self._record, self._lockstep, self._any_process = record, lockstep, any_process
        self.cache.lockstep = lockstep
        self._steps: list[_Step] = []

    @property
    def _device(self) -> torch.device:
        return self.stream.backbone.device

    # ---- forward ----------------------------------------------------------------------------------------

    def forward(self, inputs: ChunkInputs) -> None:
        """Append text around the media; nothing is evicted."""
        self._run_step(inputs, text=True)

    def step(self, inputs: ChunkInputs, encode_again: Callable[[], ChunkInputs] | None = None) -> None:
        """Append a chunk and reduce every layer to its budget.

        `encode_again` recomputes the inputs in the backward pass with a graph, for encoders that are trained; without
        it they are stored.
        """
        if len(inputs) > 0:
            self._run_step(inputs, text=False, encode_again=encode_again)

    @torch.no_grad()
    def _run_step(self, inputs: ChunkInputs, text: bool, encode_again: Callable[[], ChunkInputs] | None = None) -> None:
        before, random = self.cache.snapshot().without_tokens, _rng_state(self._device)
        evictions = self._call(lambda: self._stream_step(inputs, text))
        if self._record:
            record = self.store.put(_Record(random, None if encode_again else inputs, before, evictions))
            self._steps.append(_Step(text, record, encode_again))

    def _stream_step(self, inputs: ChunkInputs, text: bool) -> list[Eviction | None]:
        if not text:
            return self.stream.step(inputs, log_evicted=self._record)
        self.stream.forward(inputs, text=True)
        return [None] * len(self.cache.layers)

    @torch.no_grad()
    def add_loss(self, loss: Loss) -> tuple[Tensor, ...]:
        """Compute a loss on the present cache; the backward pass computes it again, with its graph."""
        if self._record:
            self._steps[-1].passes.append(_Pass(loss, _rng_state(self._device)))
        return self._call(loss)

    @torch.no_grad()
    def empty_pass(self, text: ChunkInputs, matches_step: bool) -> None:
        """Run the model without effect while another process in lockstep runs a step or a question."""
        # Weights are gathered in the order of the first passes: all processes need equally many passes per call.
        count = 1 + len(self.cache.method.probes) if matches_step else 1
        self._call(lambda: self._without_effect(text, count))
        if self._record:
            once = _Pass(
                lambda: self._without_effect(text, 1), _rng_state(self._device), empty=True, repeated=matches_step
            )
            self._steps[-1].passes.append(once)

    def _without_effect(self, text: ChunkInputs, count: int) -> tuple[Tensor, ...]:
        with self.cache.scratch():
            return tuple(self.stream.forward(text, text=True).sum() * 0 for _ in range(count))

    # ---- backward ---------------------------------------------------------------------------------------

    def backward(self, weight: float = 1.0) -> None:
        """Add the gradient of `weight` times the sum of all losses to the parameters; this empties the cache.

        On the device are one step with its graph, the cache, and gradients of the cache. Without truncation there is
        one; with a `Truncation.window` of W steps there are up to W, because the gradients of questions asked after
        different steps end at different steps and may not be summed.
        """
        # Keyed by the earliest step they reach: only gradients with the same end may be summed.
        gradients: dict[int, Gradients] = {}
        with torch.enable_grad(), torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            while self._steps:
                self._step_backward(self._steps.pop(), len(self._steps), gradients, weight)

    def _step_backward(self, step: _Step, number: int, gradients: dict[int, Gradients], weight: float) -> None:
        """Undo step `number`: from the `gradients` of the cache after it to those before it, in place."""
        window = self.truncation.window
        last = 0 if window is None else max(0, number + 1 - window)
        for one in reversed(step.passes):
            found = self._differentiate(one, weight)
            if not one.empty:
                gradients[last] = _sum(gradients.get(last, {}), found)
        record: _Record = self.store.fetch(step.record)
        if self._steps:
            self.store.prefetch(self._steps[-1].record)
        self.cache.undo(record.before, record.evictions)
        for end in self._recomputations(sorted(gradients)):
            _set_rng_state(record.rng_state, self._device)
            incoming = {} if end is None else gradients.pop(end)
            outgoing = self._recompute(step, record, incoming)
            if end is not None and end < number:
                gradients[end] = outgoing

    def _differentiate(self, one: _Pass, weight: float) -> Gradients:
        """Gradient of a question's loss with respect to the cache."""
        found: Gradients = {}
        for _ in self._recomputations([]) if one.repeated else (None,):
            _set_rng_state(one.rng_state, self._device)
            found = self._gradients(lambda: self._call(one.loss)[0] * weight)
        return found

    def _recomputations(self, ends: list[int]) -> Iterator[int | None]:
        """Step at which the gradients of each recomputation end; None for an empty one that matches other processes."""
        waiting = iter(ends)
        end = next(waiting, None)
        while self._any_process(end is not None):
            yield end
            end = next(waiting, None)

    def _recompute(self, step: _Step, record: _Record, gradients: Gradients) -> Gradients:
        """Recompute a step with its graph: from the gradient of the cache after it to that of the cache before it."""
        layers = range(len(self.cache.layers))
        if not step.has_question:
            layers = layers[self.truncation.detach_below_layer : self.truncation.detach_from_layer]
        gradients = {key: gradients.pop(key) for key in list(gradients) if key[0] in layers}
        inputs = record.inputs if step.encode_again is None else step.encode_again()
        assert inputs is not None
        self.cache.detach_below = layers.start
        try:
            found = self._gradients(lambda: self._call(lambda: self._weighted_step(step, record, inputs, gradients)))
        finally:
            self.cache.detach_below = 0
        return _sum(self.cache.carried_gradients(gradients, record.evictions, record.before), found)

    def _weighted_step(self, step: _Step, record: _Record, inputs: ChunkInputs, gradients: Gradients) -> Tensor:
        """Run a step and return a number: the outputs of the step, weighted by their `gradients`."""
        hidden = self.stream.forward(inputs, text=step.text)
        if not step.text:
            self.cache.compress(record.evictions)
        outputs = self.cache.step_outputs(gradients, record.evictions, record.before)
        # Only its gradient is used, so the number itself may be rounded to float32.
        parts = [(tensor * gradient).sum().float() for tensor, gradient in outputs if tensor.requires_grad]
        if self._lockstep or not parts:
            parts.append(hidden.sum().float() * 0)
        return torch.stack(parts).sum()

    def _gradients(self, run: Callable[[], Tensor]) -> Gradients:
        """Differentiate a function of the cache with respect to the cache, and restore the cache.

        What one pass adds to the gradient of a token is summed by autograd in the dtype of the model. Sums over passes,
        which can be thousands, are in float32 at least.
        """
        present = self.cache.snapshot()
        leaves = {key: tensor.detach().requires_grad_() for key, tensor in self.cache.differentiable_state.items()}
        self.cache.differentiable_state = leaves
        self._backward(run())
        self.cache.restore(present)
        return {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}


def _sum(total: Gradients, found: Gradients) -> Gradients:
    """Add gradients to a sum in float32 at least, in place; both are emptied."""
    for key in list(found):
        gradient = found.pop(key)
        if key in total:
            total[key] += gradient
        else:
            total[key] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return total


def _rng_state(device: torch.device) -> Any:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_rng_state(state: Any, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
