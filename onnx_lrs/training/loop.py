"""The training loop: batches in random order, AdamW on one cycle of the learning rate, the best state kept.

Every epoch draws its order and its augmentation from a seed of its own, so a run that goes on from a finished epoch
does what it would have done without the interruption.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from onnx_lrs.config import Training
from onnx_lrs.report.training import Ended, TrainedEpoch
from onnx_lrs.training.augment import layout_of, moved
from onnx_lrs.training.losses import Loss
from onnx_lrs.training.state import State
from onnx_lrs.training.student import Student

Feed = dict[str, NDArray[np.generic]]
Teacher = Callable[[Feed], Mapping[str, NDArray[np.generic]]]
WARM_UP = 0.25  # of the course, in which the learning rate rises
FIRST, LAST = 1 / 25, 1e-4  # of the highest learning rate
LEAST_SCALE = 1e-3  # of a constant in which steps are measured; biases may be zero
GAIN = 0.85  # of the time of a step that bfloat16 must leave to be taken
TRIALS = 3  # steps that are timed to see that


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call: what the model is fed with, the classes of its rows, and how many samples it holds."""

    feed: Feed
    labels: NDArray[np.int64] | None
    samples: int


class Kept(Sequence[Feed]):
    """Samples by place: in memory as long as there is room, beyond it read again each time.

    Parameters
    ----------
    read : callable
        Item number -> what the model is fed with.
    items : sequence of int
        The item at each place.
    room : int
        Bytes of memory.
    """

    def __init__(self, read: Callable[[int], Feed], items: Sequence[int], room: int) -> None:
        self._read, self._items, self._room = read, items, room
        self._kept: dict[int, Feed] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: Any) -> Any:
        if place in self._kept:
            return self._kept[place]
        feed = self._read(self._items[place])
        size = sum(value.nbytes for value in feed.values())
        if size <= self._room:
            self._room -= size
            self._kept[place] = feed
        return feed


@dataclasses.dataclass(frozen=True)
class Pool:
    """Samples: what the model is fed with for each, the classes of its rows where they are known.

    ``joined`` says whether samples of equal shapes may go through the model together.
    """

    feeds: Sequence[Feed]
    labels: Sequence[NDArray[np.int64]] | None
    joined: bool

    def __len__(self) -> int:
        return len(self.feeds)

    def batches(self, items: Sequence[int], most: int) -> Iterator[Batch]:
        """Yield some samples, in calls of at most ``most`` that the model takes."""
        groups: dict[object, list[int]] = {}
        for item in items:
            shapes = tuple(value.shape for value in self.feeds[item].values())
            groups.setdefault(shapes if self.joined else item, []).append(item)
        for group in groups.values():
            for start in range(0, len(group), most):
                yield self._batch(group[start : start + most])

    def _batch(self, items: Sequence[int]) -> Batch:
        alone = [self.feeds[item] for item in items]
        feed = alone[0] if len(alone) == 1 else {n: np.concatenate([one[n] for one in alone]) for n in alone[0]}
        labels = None if self.labels is None else np.concatenate([self.labels[item] for item in items])
        return Batch(feed, labels, len(items))


class Trainer:
    """Brings a student near its teacher.

    Parameters
    ----------
    student : Student
    teacher : callable
        Feed -> what the loss compares, by name.
    loss : Loss
    pools : (Pool, Pool)
        What is trained on, and what selects.
    training : Training
        How.
    seed : int
        Of orders and augmentation.
    """

    def __init__(
        self, student: Student, teacher: Teacher, loss: Loss, pools: tuple[Pool, Pool], training: Training, seed: int
    ) -> None:
        self.student, self._teacher, self._loss, self._training, self._seed = student, teacher, loss, training, seed
        self._pool, self._select = pools
        self._device = torch.device(training.device)
        self.ended: Ended = "epochs"
        student.to(self._device)
        self._optimiser = torch.optim.AdamW(
            _groups(student, training.weight_decay), lr=training.learning_rate, betas=(0.9, 0.99)
        )
        self._half = False

    @property
    def autocast(self) -> bool:
        """Whether steps are taken in bfloat16."""
        return self._half

    def run(self, state: State | None, keep: Callable[[State], None], tell: Callable[[TrainedEpoch], None]) -> State:
        """Train to the end of the course, until the time is over, or until nothing gets better.

        Parameters
        ----------
        state : State, optional
            Where an earlier run stood.
        keep, tell : callable
            Are given the state and the figures behind each epoch.

        Returns
        -------
        State
            The last one, of which ``best`` holds. A KeyboardInterrupt and a loss that is not finite end the run behind
            the last whole epoch.
        """
        state = state or self._first_state()
        self.take(state)
        begun = time.monotonic() - state.elapsed
        try:
            while not (over := self._over(state)):
                state = self._epoch(state, begun)
                keep(state)
                tell(state.history[-1])
        except KeyboardInterrupt:
            over = "interrupted"
        except FloatingPointError:
            over = "diverged"
        self.ended = over
        return state

    def _first_state(self) -> State:
        how = self._training.autocast
        half = how == "on" or (how == "auto" and self._half_is_faster())
        values = self.student.values
        selected, agreement = self.held_out()
        start = TrainedEpoch(0, None, selected, 0.0, agreement)
        return State((start,), values, {}, 0, values, 0.0, half)

    def take(self, state: State) -> None:
        """Put weights and moments where they were."""
        self._half = state.half
        for key, leaf in self._leaves():
            with torch.no_grad():
                leaf.copy_(torch.from_numpy(state.values[key]))
            if key in state.moments:
                first, second = (torch.from_numpy(np.array(m)).to(self._device) for m in state.moments[key])
                self._optimiser.state[leaf] = {
                    "step": torch.tensor(float(state.steps)),
                    "exp_avg": first,
                    "exp_avg_sq": second,
                }

    def _leaves(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, key in self.student.keys.items():
            yield name, self.student.leaves[key]

    def _over(self, state: State) -> Ended | None:
        """Return why no epoch follows, None if one does."""
        done = state.history[-1].number
        if done >= self._training.epochs:
            return "epochs"
        if self._share(state.steps, state.elapsed) >= 1.0:
            return "time"
        return "no gain" if done - state.best_epoch.number >= self._training.patience else None

    def _share(self, steps: int, elapsed: float) -> float:
        """Return how much of the course is over: of its steps or of its time, whichever is more."""
        of_steps = steps / (self._training.epochs * self._steps_an_epoch)
        minutes = self._training.minutes
        return of_steps if minutes is None else max(of_steps, elapsed / (60 * minutes))

    @property
    def _steps_an_epoch(self) -> int:
        return -(-len(self._pool) // self._training.train_batch)

    def _epoch(self, state: State, begun: float) -> State:
        number, start = state.history[-1].number + 1, time.monotonic()
        order = np.random.default_rng([self._seed, number]).permutation(len(self._pool))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        steps, total = state.steps, 0.0
        for items in np.array_split(order, self._steps_an_epoch):
            share = self._share(steps, time.monotonic() - begun)
            if share >= 1.0:
                break
            for group in self._optimiser.param_groups:
                group["lr"] = self._training.learning_rate * group["scale"] * one_cycle(share)
            total += self._step(items, generator)
            steps += 1
        selected, agreement = self.held_out()
        if not math.isfinite(total + selected):
            raise FloatingPointError(f"the loss of epoch {number} is not finite")
        now = time.monotonic()
        epoch = TrainedEpoch(number, total / max(steps - state.steps, 1), selected, now - start, agreement)
        values = self.student.values
        best = values if selected < state.best_epoch.selected else state.best
        return State((*state.history, epoch), values, self._moments(), steps, best, now - begun, state.half)

    def _moments(self) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        found = {}
        for name, leaf in self._leaves():
            if leaf in self._optimiser.state:
                kept = self._optimiser.state[leaf]
                found[name] = (_copied(kept["exp_avg"]), _copied(kept["exp_avg_sq"]))
        return found

    def _step(self, items: NDArray[np.int64], generator: torch.Generator) -> float:
        """Take one step, its samples together where the model takes them so. Return the loss."""
        self._optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for batch in self._pool.batches(items.tolist(), len(items)):
            inputs = self._augmented(batch.feed, generator)
            wanted = self._wanted({name: value.numpy() for name, value in zip(batch.feed, inputs, strict=True)})
            loss = self._loss(self._outputs(inputs, self._half), wanted, self._classes(batch.labels))
            loss = loss * (batch.samples / len(items))
            loss.backward()
            total += float(loss.detach())
        self._optimiser.step()
        return total

    def _augmented(self, feed: Feed, generator: torch.Generator) -> list[torch.Tensor]:
        inputs = []
        for tensor in tensors(feed):
            layout = layout_of(tuple(tensor.shape))
            if self._training.augment and layout is not None and tensor.is_floating_point():
                tensor = moved(tensor, layout, generator).contiguous()
            inputs.append(tensor)
        return inputs

    def _wanted(self, feed: Feed) -> dict[str, torch.Tensor]:
        return {
            name: torch.from_numpy(np.asarray(value)).to(self._device) for name, value in self._teacher(feed).items()
        }

    def _outputs(self, inputs: Sequence[torch.Tensor], half: bool) -> dict[str, torch.Tensor]:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            found: dict[str, torch.Tensor] = self.student(
                *(tensor.to(self._device) for tensor in inputs), rounded=self._training.fake_quant
            )
        return found

    def _classes(self, labels: NDArray[np.int64] | None) -> torch.Tensor | None:
        return None if labels is None else torch.from_numpy(labels).to(self._device)

    def held_out(self) -> tuple[float, float | None]:
        """Return the loss on the samples that select, as they are, and how many of them get the original's class.

        The second is a share, None where no output has classes. Weights are rounded where steps round them.
        """
        total, same, rows = 0.0, 0, 0
        ranked = next((goal.name for goal in self._loss.goals if goal.classes), None)
        with torch.no_grad():
            for batch in self._select.batches(range(len(self._select)), self._training.train_batch):
                found, wanted = self._outputs(tensors(batch.feed), half=False), self._wanted(batch.feed)
                total += batch.samples * float(self._loss(found, wanted, self._classes(batch.labels)))
                if ranked is not None:
                    same += int((found[ranked].argmax(1) == wanted[ranked].argmax(1)).sum())
                    rows += len(wanted[ranked])
        return total / len(self._select), None if ranked is None else same / rows

    def _half_is_faster(self) -> bool:
        """Time a few steps both ways; the weights stay as they are."""
        first = range(min(len(self._pool), self._training.train_batch))
        batch = next(self._pool.batches(first, self._training.train_batch))
        inputs, wanted = tensors(batch.feed), self._wanted(batch.feed)
        took = {True: math.inf, False: math.inf}
        for _ in range(TRIALS):
            for half in took:
                begun = time.perf_counter()
                self._loss(self._outputs(inputs, half), wanted, self._classes(batch.labels)).backward()
                if self._device.type == "cuda":
                    torch.cuda.synchronize()
                took[half] = min(took[half], time.perf_counter() - begun)
        self._optimiser.zero_grad(set_to_none=True)
        return took[True] < GAIN * took[False]


def tensors(feed: Feed) -> list[torch.Tensor]:
    """Return a feed in the order of the model's inputs."""
    return [torch.from_numpy(np.require(values, requirements=["C", "W"])) for values in feed.values()]


def _copied(values: torch.Tensor) -> NDArray[np.float32]:
    return np.array(values.detach().cpu().numpy(), np.float32)  # the optimiser goes on in the tensor's own memory


def one_cycle(share: float) -> float:
    """Return the learning rate at a share of the course, of the highest (Smith, Topin: arXiv 1708.07120)."""
    if share < WARM_UP:
        return FIRST + (1 - FIRST) * (1 - math.cos(math.pi * share / WARM_UP)) / 2
    return LAST + (1 - LAST) * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))) / 2


def _groups(student: Student, decay: float) -> list[dict[str, object]]:
    """Return one group a constant: steps in units of its root mean square, weight decay unless it is a bias.

    Factors of one product differ in size by orders of magnitude, and so do layers; with steps in these units one
    learning rate suits them all (Adafactor, section 8: Shazeer and Stern 2018, arXiv 1804.04235).
    """
    groups: list[dict[str, object]] = []
    for leaf in student.leaves.parameters():
        size = float(leaf.detach()[leaf.detach() != 0].square().mean().sqrt()) if bool(leaf.detach().any()) else 0.0
        scale = max(size, LEAST_SCALE)
        groups.append({"params": [leaf], "weight_decay": decay / scale if leaf.ndim > 1 else 0.0, "scale": scale})
    return groups
