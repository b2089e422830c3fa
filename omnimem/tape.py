"""Exact gradients through a stream of any length, in the device memory of one chunk.

    tape = Tape(Stream(backbone, cache), store=HostStore(device))
    tape.forward(prefix)
    for chunk in reader:
        tape.step(encoder.encode(chunk))
        loss, *_ = tape.ask(lambda: (cross_entropy(stream.answer_logits(…)),))
    tape.backward(weight=1 / targets)

The forward pass is that of inference: no graph, eviction in place. It logs what each step evicts. The backward pass
walks the steps in reverse: it restores what was evicted, recomputes the step with a graph and the logged decisions, and
passes the gradient of the memory on to the step before.

Keys, values and features are stored once: in the memory or, once evicted, in the `store`. What a chunk brings and no
layer retains is not stored at all, unless a selection gradient lets the next step look at it (`omnimem.memory.margin`).

On the device are the memory, one step with its graph, and the gradient of the memory in float32, whatever the dtype
of the model: sums over thousands of steps and questions lose small summands in bfloat16. For a model in bfloat16 that
gradient takes twice the bytes of the memory's keys and values (with a selection gradient, of its features too).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omnimem.backbones import ChunkInputs
from omnimem.forward import Stream
from omnimem.memory import Eviction, MemoryState
from omnimem.memory.cache import Gradients
from omnimem.memory.store import Store

Loss = Callable[[], tuple[Tensor, ...]]
"""A question asked now: its loss (one number), and what else is to be reported."""


@dataclass(frozen=True)
class Truncation:
    """Truncated backpropagation through time.

    Attributes
    ----------
    window : int or None
        W: the gradient of a question reaches the W steps (chunks, and the text before the media) that precede it and
        treats the memory before them as a constant, whatever else is asked; None: it reaches the first step. As in
        TBPTT with k1 = 1 and k2 = W, gradients of questions after different steps end at different steps and are
        propagated separately: with a question after every chunk, each step is recomputed W times. Steps that no
        question reaches are not recomputed.
    from_layer : int
        First layer that learns from chunks not directly followed by a question (18 in the paper's middle-layer cut).
    to_layer : int or None
        Layer from which on such chunks teach nothing; None: all do.
    """

    window: int | None = None
    detach_below_layer: int = 0
    detach_from_layer: int | None = None


@dataclass
class _Question:
    """A question asked after a step, or the empty pass by which this process matches one of another process.

    Attributes
    ----------
    loss : callable
        Its loss.
    random : tuple
        Random state before it.
    step : bool
        Whether the empty pass matches a step rather than a question of another process.
    real : bool
        False for an empty pass.
    """

    loss: Loss
    random: Any
    step: bool = False
    real: bool = True


@dataclass
class _Step:
    """One step of a stream and the questions asked after it."""

    text: bool
    record: Any  # handle of (random state, inputs, facts of the moment before, decisions) in the store
    again: Callable[[], ChunkInputs] | None = None
    asked: list[_Question] = field(default_factory=list)


class ChunkwiseBPTT:
    """A stream that is run forwards without a graph and backwards with one.

    Parameters
    ----------
    stream : Stream
        With an empty memory.
    store : Store, optional
        Where records wait for the way back; on the device when left out.
    truncation : Truncation, optional
        Where gradients end.
    call : callable, optional
        Runs a function that runs the model (DeepSpeed's engine).
    backward : callable, optional
        Differentiates one number.
    record : bool
        Whether there is a way back; without it the stream is just run.
    lockstep : bool
        Whether processes share weights, so that each has to run, and to differentiate whole, what any other does
        (see `idle`).
    any_process : callable, optional
        Whether something holds in any of the processes in lockstep.
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

    # ---- forwards ---------------------------------------------------------------------------------------

    def forward(self, inputs: ChunkInputs) -> None:
        """Append text around the media; nothing is compressed."""
        self._take(inputs, text=True)

    def step(self, inputs: ChunkInputs, again: Callable[[], ChunkInputs] | None = None) -> None:
        """Take a chunk in and bring every layer back to its budget.

        `again` makes the same inputs once more, on the way back and with a graph: for encoders that learn.
        """
        if len(inputs) > 0:
            self._take(inputs, text=False, again=again)

    @torch.no_grad()
    def _take(self, inputs: ChunkInputs, text: bool, again: Callable[[], ChunkInputs] | None = None) -> None:
        before, random = self.cache.state().facts, _random_state(self.stream.backbone.device)

        def run() -> list[Eviction | None]:
            if not text:
                return self.stream.step(inputs, rewindable=self._record)
            self.stream.forward(inputs, text=True)
            return [None] * len(self.cache.layers)

        decided = self._call(run)
        if self._record:
            record = self.store.put((random, None if again else inputs, before, decided))
            self._steps.append(_Step(text, record, again))

    @torch.no_grad()
    def ask(self, loss: Loss) -> tuple[Tensor, ...]:
        """Values of a loss taken now; on the way back it is taken again, with its graph."""
        if self._record:
            self._steps[-1].asked.append(_Question(loss, _random_state(self.stream.backbone.device)))
        return self._call(loss)

    @torch.no_grad()
    def empty_pass(self, text: ChunkInputs, probes: bool) -> None:
        """What a process in lockstep does while another takes a chunk in (then with `probes`) or is asked something."""

        def nothing(passes: int = 1) -> tuple[Tensor, ...]:
            with self.cache.scratch():
                return tuple(self.stream.forward(text, text=True).sum() * 0 for _ in range(passes))

        # Weights are gathered in the order of the first passes, so a call has as many as that of the others.
        self._call(lambda: nothing(1 + len(self.cache.method.probes) if probes else 1))
        if self._record:
            random = _random_state(self.stream.backbone.device)
            self._steps[-1].asked.append(_Question(nothing, random, step=probes, real=False))

    # ---- backwards --------------------------------------------------------------------------------------

    def backward(self, weight: float = 1.0) -> None:
        """Add the gradient of `weight` times the sum of all losses to the parameters; the stream is undone by it.

        On the device are one step with its graph, the memory, and the gradient of the memory: one where nothing is
        truncated, with a `Truncation.window` as many as there are steps at which gradients in flight end (at most the
        window's).
        """
        device = self.stream.backbone.device
        # By the step where they end, because only gradients that end together may be summed.
        gradients: dict[int, Gradients] = {}
        with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            while self._steps:
                step = self._steps.pop()
                number = len(self._steps)
                last = 0 if self.truncation.window is None else max(0, number + 1 - self.truncation.window)
                for question in reversed(step.asked):
                    found = self._differentiate(question, weight)
                    if question.real:
                        gradients[last] = _sum(gradients.get(last, {}), found)
                random, inputs, before, decided = self.store.get(step.record)
                if self._steps:
                    self.store.prefetch(self._steps[-1].record)
                self.cache.rewind(before, decided)
                for end in self._passes(sorted(gradients)):
                    _set_random_state(random, device)
                    carried = {} if end is None else gradients.pop(end)
                    again = inputs if step.again is None else step.again()
                    carried = self._again(step, again, before, decided, carried)
                    if end is not None and end < number:
                        gradients[end] = carried

    def _differentiate(self, question: _Question, weight: float) -> Gradients:
        """Gradient of a question's loss with respect to the memory; an empty pass is repeated while others have one."""
        found: Gradients = {}
        for _ in self._passes([]) if question.step else (None,):
            _set_random_state(question.random, self.stream.backbone.device)
            found = self._learn(lambda: self._call(question.loss)[0] * weight)
        return found

    def _passes(self, ends: list[int]) -> Iterator[int | None]:
        """Where the gradients of each pass through a step end; None for an empty pass that matches other processes."""
        waiting = iter(ends)
        end = next(waiting, None)
        while self._any_process(end is not None):
            yield end
            end = next(waiting, None)

    def _again(
        self,
        step: _Step,
        inputs: ChunkInputs,
        before: MemoryState,
        decided: list[Eviction | None],
        gradients: Gradients,
    ) -> Gradients:
        """Recompute a step with its graph: from the gradient of the memory after it to that of the memory before it."""
        layers = range(len(self.cache.layers))
        if not any(question.real for question in step.asked):
            layers = layers[self.truncation.detach_below_layer : self.truncation.detach_from_layer]
        gradients = {key: gradients.pop(key) for key in list(gradients) if key[0] in layers}

        def run() -> Tensor:
            last = self.stream.forward(inputs, text=step.text)
            if not step.text:
                self.cache.compress(decided)
            # Only its gradient is wanted, which is that of the memory whatever type the number has.
            brought = self.cache.brought(gradients, decided, before)
            parts = [(one * gradient).sum().float() for one, gradient in brought if one.requires_grad]
            if self._lockstep or not parts:
                parts.append(last.sum().float() * 0)
            return torch.stack(parts).sum()

        self.cache.cut = layers.start
        try:
            found = self._learn(lambda: self._call(run))
        finally:
            self.cache.cut = 0
        return _sum(self.cache.unchanged(gradients, decided, before), found)

    def _learn(self, run: Callable[[], Tensor]) -> Gradients:
        """Differentiate a function of the memory and put the memory back.

        What one pass adds to the gradient of a state is summed by autograd in the dtype of the model. Sums over
        passes, which can be thousands, are float32 at least.
        """
        present = self.cache.state()
        leaves = {key: tensor.detach().requires_grad_() for key, tensor in self.cache.differentiable_state.items()}
        self.cache.differentiable_state = leaves
        self._backward(run())
        self.cache.restore(present)
        return {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}


def _sum(total: Gradients, found: Gradients) -> Gradients:
    """Add gradients to a sum in float32 at least, in place; both are used up."""
    for key in list(found):
        gradient = found.pop(key)
        if key in total:
            total[key] += gradient
        else:
            total[key] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return total


def _random_state(device: torch.device) -> Any:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: Any, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
