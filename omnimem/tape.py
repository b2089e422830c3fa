"""Exact gradients through a stream of any length, in the device memory of one chunk (training.md §1).

    tape = Tape(Stream(backbone, cache), store=HostStore(device))
    tape.forward(prefix)
    for chunk in reader:
        tape.step(encoder.encode(chunk))
        loss, *_ = tape.ask(lambda: (cross_entropy(stream.answer_logits(…)),))
    tape.backward(weight=1 / targets)

The way there is inference itself: no graph, in place. Written down is only what leaves the memory at every step, so the
way back can undo step after step: put back what went, run the step once more, now under autograd and with its decision
replayed, and hand the gradient of the memory on to the step before. Every state of the stream is stored once, wherever
the `store` puts it; on the device are the memory, its gradient and one step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omnimem.backbones import ChunkInputs
from omnimem.forward import Stream
from omnimem.memory import Kept
from omnimem.memory.store import Store

Loss = Callable[[], tuple[Tensor, ...]]
"""A question asked now: its loss (one number), and what else is to be reported."""


@dataclass(frozen=True)
class Truncation:
    """Where gradients end, for those who want less than the exact one.

    Attributes
    ----------
    window : int or None
        Chunks before a question that its gradient reaches; the others are not run again. None: all.
    from_layer : int
        First layer that learns from chunks not directly followed by a question (18 in the paper's middle-layer cut).
    to_layer : int or None
        Layer from which on such chunks teach nothing; None: all do.
    """

    window: int | None = None
    from_layer: int = 0
    to_layer: int | None = None


@dataclass
class _Step:
    """One step of a stream and the questions asked after it."""

    text: bool
    record: Any  # handle of (random state, inputs, facts of the moment before, decisions) in the store
    again: Callable[[], ChunkInputs] | None = None
    asked: list[tuple[Loss, Any]] = field(default_factory=list)
    questioned: bool = False  # by somebody, and not only kept in step


class Tape:
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
    ) -> None:
        self.stream, self.cache = stream, stream.cache
        self.store, self.truncation = store or Store(), truncation or Truncation()
        self._call, self._backward = call, backward
        self._record, self._lockstep = record, lockstep
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

        def run() -> list[Kept | None]:
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
            self._steps[-1].asked.append((loss, _random_state(self.stream.backbone.device)))
            self._steps[-1].questioned = True
        return self._call(loss)

    @torch.no_grad()
    def idle(self, text: ChunkInputs, probes: bool) -> None:
        """What a process in lockstep does while another takes a chunk in (then with `probes`) or is asked something."""

        def nothing(passes: int = 1) -> tuple[Tensor, ...]:
            with self.cache.scratch():
                return tuple(self.stream.forward(text, text=True).sum() * 0 for _ in range(passes))

        # Weights are gathered in the order of the first passes, so a call has as many as that of the others.
        self._call(lambda: nothing(1 + len(self.cache.method.probes) if probes else 1))
        if self._record:
            self._steps[-1].asked.append((nothing, _random_state(self.stream.backbone.device)))

    # ---- backwards --------------------------------------------------------------------------------------

    def backward(self, weight: float = 1.0) -> None:
        """Add the gradient of `weight` times the sum of all losses to the parameters; the stream is undone by it."""
        device = self.stream.backbone.device
        with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            gradients: dict[Any, Tensor] = {}
            reach = 0
            while self._steps:
                step = self._steps.pop()
                for loss, random in reversed(step.asked):
                    _set_random_state(random)
                    gradients = _sum(gradients, self._learn(lambda loss=loss: self._call(loss)[0] * weight))
                if step.questioned:
                    reach = len(self._steps) + 1 if self.truncation.window is None else self.truncation.window
                random, inputs, before, decided = self.store.get(step.record)
                if self._steps:
                    self.store.prefetch(self._steps[-1].record)
                self.cache.rewind(before, decided)
                if reach == 0:
                    gradients = {}
                    if not self._lockstep:
                        continue
                reach = max(0, reach - 1)
                inputs = inputs if step.again is None else step.again()
                _set_random_state(random)
                gradients = self._again(step, inputs, decided, gradients)

    def _again(self, step: _Step, inputs: ChunkInputs, decided: list[Kept | None], gradients: dict) -> dict:
        """Run a step with its graph; from the gradient of the memory behind it to that of the memory before it."""
        layers = range(len(self.cache.layers))
        if not step.questioned:
            layers = layers[self.truncation.from_layer : self.truncation.to_layer]

        def behind() -> Tensor:
            def run() -> Tensor:
                last = self.stream.forward(inputs, text=step.text)
                if not step.text:
                    self.cache.compress(decided)
                flowing = self.cache.flowing
                # Only its gradient is wanted, which is `gradient` whatever type the number has.
                parts = [
                    (flowing[key] * gradient).sum().float()
                    for key, gradient in gradients.items()
                    if key[0] in layers and flowing[key].requires_grad
                ]
                if self._lockstep or not parts:
                    parts.append(last.sum().float() * 0)
                return torch.stack(parts).sum()

            self.cache.cut = layers.start
            try:
                return self._call(run)
            finally:
                self.cache.cut = 0

        return self._learn(behind)

    def _learn(self, run: Callable[[], Tensor]) -> dict[Any, Tensor]:
        """Differentiate what a function says about the memory, and put the memory back."""
        present = self.cache.state()
        leaves = {key: tensor.detach().requires_grad_() for key, tensor in self.cache.flowing.items()}
        self.cache.flowing = leaves
        self._backward(run())
        self.cache.restore(present)
        return {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}


def _sum(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> dict[Any, Tensor]:
    return {**one, **{key: tensor + one[key] if key in one else tensor for key, tensor in other.items()}}


def _random_state(device: torch.device) -> Any:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: Any) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
