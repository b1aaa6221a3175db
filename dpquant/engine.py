"""The library door: private training whose layers are quantized by a schedule that a hardware model drives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpquant import allocator, privacy, sensitivity
from dpquant.budget import planned_budget
from dpquant.clipping import PrivateOptimizer
from dpquant.distributed import ALONE, Processes
from dpquant.evidence import Evidence
from dpquant.goal import Goal
from dpquant.modelled import Epoch, ModelledRun, adding_unit
from dpquant.private_parts import check_parameters, private_parts
from dpquant.public_numbers import public_numbers
from dpquant.sampling import poisson_draw
from dpquant.spending import Spending, arithmetic
from dpquant.streams import fresh_root, stream, stream_seed
from emulation import layers
from emulation.errors import InputError
from hwmodels import cost, planner
from hwmodels.profile import Basis, HardwareProfile, load_profile
from hwmodels.workload import trace


class DPQuantEngine:
    """Trains privately with a changing subset of layers quantized, as far as a target speedup asks.

    Args:
        hardware: name or path of a hardware profile, or a profile.
        target_speedup: modelled speedup over full-precision private training that the whole run must meet, its
            analyses included: an epoch that does more leaves less to those after it; or
        fraction: share of the quantizable layers to quantize in every epoch, or of the run's epochs; or
        layers: names of those to quantize in every epoch, with ``scheduler="static"``.
        format: number format or preset of the quantized layers; of several, a ladder, each layer takes one.
        scheduler: ``full`` (nothing is quantized), ``static`` (one draw for the run), ``pls`` (a uniform draw per
            epoch), ``dpquant`` (a draw per epoch that prefers layers found insensitive), ``greedy`` (the layers that
            save most time), ``annealed`` (all layers in the first epochs, none in the last, as many in all as a fixed
            choice has), ``cooldown`` (the layers that save most time in the first epochs, none in the last) or
            ``delayed`` (none in the first epochs, all in the last).
        beta: how strongly the draw prefers insensitive layers: weights are softmax(-beta * sensitivity). Measured
            sensitivities are in units of the loss, of which a layer in FP4 typically costs some thousandths; those from
            released gradients are relative to the largest.
        analysis: where the ``dpquant`` scheduler has its sensitivities from; default: from released gradients, free.
        basis: ``peak`` or ``calibrated`` hardware model; default: calibrated where the profile has a calibration.
        accountant: ``prv`` or ``rdp``.
        accumulate: ``float32``, or ``hardware``: quantized GEMMs add as the profile's own matrix units do, bit for bit
            (slow).
        keep_freed_memory: on the CPU, have glibc keep freed memory for the next step (``dpquant.allocator``): faster,
            the same numbers; what the process once held it keeps. False leaves the C library alone.
        seed: root of every random stream: equal seeds give equal runs. It must stay secret for the guarantee to hold
            against whoever knows it. None: secret, from the operating system.
        root: the root itself, where a run is continued; instead of ``seed``.
        processes: those that share the run, from ``distributed.joined()``: all call the same methods in the same order.

    Raises:
        InputError: an argument is out of range, or a name is unknown.
    """

    def __init__(
        self,
        *,
        hardware: str | HardwareProfile = "b200",
        target_speedup: float | None = None,
        fraction: float | None = None,
        layers: Sequence[str] | None = None,
        format: str | Sequence[str] = "luq_fp4",
        scheduler: str = "dpquant",
        beta: float = 200.0,
        analysis: sensitivity.AnalysisSettings | None = None,
        basis: Basis | None = None,
        accountant: privacy.Accountant = "prv",
        accumulate: str = "float32",
        keep_freed_memory: bool = True,
        seed: int | None = None,
        root: int | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.goal = Goal(
            scheduler=scheduler,
            target_speedup=target_speedup,
            fraction=fraction,
            layers=None if layers is None else tuple(layers),
            beta=beta,
        )
        self.profile = hardware if isinstance(hardware, HardwareProfile) else load_profile(hardware)
        self.basis: Basis = cost.checked_basis(self.profile, basis)
        self._unit = adding_unit(self.profile, accumulate)
        self.formats = (format,) if isinstance(format, str) else tuple(dict.fromkeys(format))
        if not self.formats:
            raise InputError("format=[] holds no format", hint="such as 'nvfp4', or ['fp8', 'nvfp4']")
        self.analysis = analysis or sensitivity.AnalysisSettings()
        self.accountant = accountant
        self.keep_freed_memory = keep_freed_memory
        self.processes = processes
        root = root if root is not None else fresh_root() if seed is None else stream_seed(seed, "root")
        self._root = processes.broadcast(root)
        self.spending = Spending()
        self._same_arithmetic = True
        self._again: tuple[int, ...] = ()  # tells the streams of steps that are counted again from those before
        self._analysed = -1  # the last epoch that was
        self.step = self.epoch = 0
        self.sensitivities: dict[str, float] | None = None
        self._seconds: list[float] = []  # modelled, of every epoch's steps so far

    # --- before training

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: nn.Module,
        data_loader: DataLoader[Any],
        target_delta: float,
        epochs: int,
        max_grad_norm: float,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        sample_rate: float | None = None,
        expected_batch_size: int | None = None,
        clipping: str = "bookkeeping",
        max_physical_batch_size: int | None = None,
        cuda_graphs: bool = True,
    ) -> tuple[nn.Module, PrivateOptimizer, Callable[..., Tensor], DataLoader[Any]]:
        """Prepares a private run: refuses what cannot be reached, solves for the noise, wraps the loop's four parts.

        Args:
            module: the model; its Linear and Conv layers are replaced in place by quantized ones (same parameters).
            optimizer: any torch optimizer over the module's parameters.
            criterion: a loss with a ``reduction`` attribute; the one returned is to be used in the loop.
            data_loader: the training data; its batches are replaced by Poisson samples.
            target_delta: delta of the guarantee, below 1 / number of examples.
            epochs: number of epochs the budget is planned for.
            max_grad_norm: norm that each example's gradient is clipped to.
            target_epsilon: epsilon that training and all analyses together may spend; or
            noise_multiplier: standard deviation of the noise over ``max_grad_norm`` (0: no privacy, for tests).
            sample_rate: public probability of an example in a batch; default: batch size over number of examples.
            expected_batch_size: public divisor of the noisy sum; default: the loader's batch size.
            clipping: ``bookkeeping`` (one backward, exact) or ``hooks`` (per-example gradients materialised, slow).
            max_physical_batch_size: process larger batches, of steps and of analyses, in parts of at most this size.
            cuda_graphs: have :meth:`backward` replay CUDA graphs, where the module is on a GPU.

        Returns:
            (module, optimizer, criterion, loader) for an ordinary loop inside ``for epoch in engine.epochs()``.

        Raises:
            InputError: the target speedup or epsilon cannot be reached, the module has a layer that mixes examples, or
                an argument is out of range. Nothing has been spent.
        """
        if not (math.isfinite(max_grad_norm) and max_grad_norm > 0):
            raise InputError(f"max_grad_norm={max_grad_norm} must be above 0")
        if max_physical_batch_size is not None and max_physical_batch_size < 1:
            raise InputError(f"max_physical_batch_size={max_physical_batch_size} must be at least 1")
        check_parameters(module)
        numbers = public_numbers(
            data_loader, sample_rate=sample_rate, expected_batch_size=expected_batch_size, epochs=epochs
        )
        self.sample_rate, self.expected_batch_size = numbers.sample_rate, numbers.expected_batch_size
        self.epochs_planned, self.steps_per_epoch = epochs, numbers.steps_per_epoch
        self.dataset_size, self.delta = numbers.dataset_size, target_delta
        self.analyses_planned = sum(self._due(epoch) for epoch in range(epochs))
        self._plan_hardware(module, data_loader, clipping)
        self._budget = planned_budget(
            numbers,
            self.analysis,
            self.analyses_planned,
            noise_multiplier=noise_multiplier,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            accountant=self.accountant,
        )
        self.target_epsilon, self.noise_multiplier = target_epsilon, self._budget.noise_multiplier
        self.last_step, self.plan_ledger = numbers.steps, self._budget.ledger(self.analyses_planned)
        if self.keep_freed_memory and next(module.parameters()).device.type == "cpu":
            allocator.keep_freed_memory()
        self._module = layers.quantize_model(module, self.formats[0], unit=self._unit)
        self._examples = len(data_loader.dataset)  # type: ignore[arg-type]
        self._plan: Mapping[str, str] = {}
        self._parts = parts = private_parts(
            module=self._module,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=data_loader,
            budget=self._budget,
            sampling=lambda step: self._stream("sampling", step),
            steps=lambda: range(self.step, self._end()),
            inside=self._inside,
            max_grad_norm=max_grad_norm,
            clipping=clipping,
            max_physical_batch_size=max_physical_batch_size,
            cuda_graphs=cuda_graphs,
            before_noise=self._before_noise,
            on_batch=self._key_rounding,
            processes=self.processes,
        )
        self._evidence = Evidence(
            self.analysis,
            self.modelled.policies,
            self._module,
            noise_std=self.noise_multiplier * max_grad_norm / self.expected_batch_size,
            expected_batch_size=self.expected_batch_size,
        )
        if self.goal.scheduler == "dpquant" and self.analysis.estimator != "probe":
            parts.optimizer.attach_step_hook(self._evidence.observe)
        self._max_grad_norm, self._max_physical_batch_size = max_grad_norm, max_physical_batch_size
        self.processes.agree("what they train", self._examples, self.sample_rate, self.plan_ledger)
        self.processes.agree("the model they start from", tensors=parts.module.parameters())
        return parts.module, parts.optimizer, parts.criterion, parts.loader

    def backward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Forward, loss and backward of one batch, as ``criterion(module(inputs), targets).backward()`` is them.

        On a GPU with ``clipping="bookkeeping"`` they are CUDA graphs that are captured at a batch size's second use and
        replayed from then on (``make_private(cuda_graphs=False)``: never): a step of many small layers costs the host
        one launch in place of a thousand. The results agree with those of the usual calls within float32 rounding.

        Args:
            inputs: [B, ...], a batch of the loader's.
            targets: [B, ...].

        Returns:
            The module's outputs [B, ...] and the mean loss, both without gradient.
        """
        return self._parts.backward(inputs, targets)

    def _plan_hardware(self, module: nn.Module, loader: DataLoader[Any], clipping: str) -> None:
        """Models the workload and refuses a target that no plan can meet."""
        self.modelled = ModelledRun(
            workload=trace(module, loader.dataset[0][0].unsqueeze(0), self.expected_batch_size),
            profile=self.profile,
            formats=self.formats,
            basis=self.basis,
            clipping=clipping,
            analysis=self.analysis,
            analyses=self.analyses_planned,
            expected_batch_size=self.expected_batch_size,
            steps=self.epochs_planned * self.steps_per_epoch,
        )
        self.workload = self.modelled.workload
        self.reach = self.modelled.reach()
        self.goal.check(self.modelled, self.reach)

    # --- while training

    def epochs(self) -> Iterator[Epoch]:
        """The epochs that are left: each analyses if one is due, draws its layers, and turns quantization on.

        Quantization is on while the loader is iterated and off between: evaluate inside the loop, in full precision.
        Ends early, after the last affordable step, where a stopped run had to count steps twice.
        """
        while self.epoch < self.epochs_planned and self.step < self.last_step:
            started = time.perf_counter()
            analysed = self._due(self.epoch) and self._analysed != self.epoch  # a loop that was left may come again
            if analysed:
                self._analyse()
                self._analysed = self.epoch
            self.sensitivities = self.processes.broadcast(self._evidence.sensitivities())
            del self._seconds[self.epoch :]
            end = self._end()
            self._plan = plan = self._draw(end)
            estimate = self.estimate(plan)
            self._seconds.append((end - self.step) * estimate.step_s)
            self.processes.agree("the schedule", self.epoch, self.step, dict(plan), self.sensitivities)
            self.processes.agree("the model", tensors=self._module.parameters())
            yield Epoch(
                index=self.epoch,
                plan=plan,
                estimate=estimate,
                speedup=self.speedup(plan),
                sensitivities=self.sensitivities,
                analysed=analysed,
                analysis_wall_s=time.perf_counter() - started if analysed else 0.0,
            )
            self.epoch, self.step = self.epoch + 1, end

    def estimate(self, plan: Mapping[str, str], basis: Basis | None = None) -> cost.Estimate:
        """Modelled time, energy and memory of one step under ``plan``, analyses not included."""
        return self.modelled.estimate(plan, basis)

    def speedup(self, plan: Mapping[str, str], basis: Basis | None = None) -> float:
        """Modelled speedup of ``plan`` over full precision, the analyses' time spread over all steps."""
        return self.modelled.speedup(plan, basis)

    @property
    def format(self) -> str:
        """The number format of the quantized layers; several with a ``+`` between."""
        return "+".join(self.formats)

    @property
    def ledger(self) -> privacy.PrivacyLedger:
        """Everything spent so far, in order."""
        return self.spending.ledger

    def epsilon(self, delta: float | None = None) -> float:
        """Epsilon of everything spent so far, analyses included, at ``delta`` (default: the target's)."""
        return privacy.epsilon(self.ledger, self.delta if delta is None else delta, self.accountant)

    def _draw(self, end: int) -> planner.PrecisionPlan:
        return self.goal.plan(
            self.modelled,
            self.sensitivities,
            epoch=self.epoch,
            seed=stream_seed(self._root, "schedule"),
            steps=end,
            steps_done=self.step,
            seconds_done=math.fsum(self._seconds),
        )

    # --- stopping and going on

    def state(self, epochs_done: int) -> dict[str, Any]:
        """What a checkpoint needs after ``epochs_done`` epochs, as plain data. It holds the secret root seed."""
        return {
            "root": self._root,
            "epoch": epochs_done,
            "seconds": self._seconds[:epochs_done],
            **self._evidence.state(),
            "ledger": self.ledger.to_json_lines(),
            "last_step": self.last_step,
            "arithmetic": self._arithmetic(),
            "again": list(self._again),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Sets the engine to what :meth:`state` gave."""
        self._root, self.epoch, self._analysed = state["root"], state["epoch"], -1
        self._again = tuple(state.get("again", ()))
        self.step = self.epoch * self.steps_per_epoch
        self._evidence.load_state(state)
        self.sensitivities = self._evidence.probed
        self._seconds = list(state["seconds"])
        self.spending.ledger = privacy.PrivacyLedger.from_json_lines(state["ledger"])
        self._same_arithmetic = state.get("arithmetic") == self._arithmetic()
        self._end_at(state.get("last_step", self.last_step))

    def write_ahead(self, written: privacy.PrivacyLedger, append: Callable[[privacy.PrivacyEvent], object]) -> None:
        """Has every event durably recorded by ``append`` before its noise is drawn.

        Args:
            written: what the record holds already. Where it is ahead of the engine, a run was stopped between; the same
                steps are taken again with the same bits, and so are not counted twice. That needs arithmetic that
                repeats to the bit: on a GPU, with dropout, or on another number of processes or threads than the
                checkpoint was written by, repeated steps are counted again, and draw other batches and other noise. A
                checkpoint is then to be written before the first step.
            append: puts an event on record, of one step or of some that are about to be taken.
        """
        repeats = self._same_arithmetic and self._arithmetic() is not None
        if not repeats and written != self.ledger:  # the same noise on another sum would show the sums' difference
            self._again = (sum(event.steps for event in written.events),)
        self.spending.write_ahead(written, append, repeats_to_the_bit=repeats)
        if not repeats:
            due = sum(self._due(epoch) for epoch in range(self.epoch, self.epochs_planned))
            self._end_at(self.step + self._budget.affordable(self.ledger, self.last_step - self.step, due))

    # --- details

    def _due(self, epoch: int) -> bool:
        probes = self.goal.scheduler == "dpquant" and self.analysis.estimator != "released"
        return probes and epoch % self.analysis.interval == 0

    def _end(self) -> int:
        """The step that the epoch ends before."""
        return min((self.epoch + 1) * self.steps_per_epoch, self.last_step)

    def _arithmetic(self) -> str | None:
        return arithmetic(self._module, self.processes.size)

    def _end_at(self, last_step: int) -> None:
        """Ends the run there: what analyses are left count against the speedup of the steps that are left."""
        self.last_step = last_step
        analyses = sum(self._due(epoch) for epoch in range(-(-last_step // self.steps_per_epoch)))
        self.modelled = replace(self.modelled, steps=max(1, last_step), analyses=analyses)

    def analysis_event(self, times: int) -> privacy.PrivacyEvent:
        """What ``times`` analyses spend."""
        return self._budget.analyses(times)

    def _before_noise(self) -> torch.Generator:
        if self.step >= self.last_step:
            raise RuntimeError(f"all {self.step} planned steps are taken: a further one would exceed the budget")
        self.spending.spend(self._budget.training(1), upcoming=self._end() - self.step)
        generator = self._stream("noise", self.step, device=next(self._module.parameters()).device)
        self.step += 1
        return generator

    def _stream(self, purpose: str, position: int, device: torch.device | str = "cpu") -> torch.Generator:
        return stream(self._root, purpose, position, *self._again, device=device)

    def _inside(self, inside: bool) -> None:
        """Told by the loader when an iteration starts and ends."""
        if inside:
            self._parts.optimizer.forget()
        layers.set_plan(self._module, self._plan if inside else {})

    def _key_rounding(self, ids: Tensor) -> None:
        layers.set_rounding(self._module, seed=stream_seed(self._root, "rounding"), step=self.step, example_ids=ids)

    def _analyse(self) -> None:
        """One private analysis of every policy, on record before its noise is drawn."""
        event = self.analysis_event(1)
        chosen = poisson_draw(self._examples, event.sample_rate, self._stream("analysis-sampling", self.epoch))
        self.spending.spend(event)
        loader = self._parts.loader
        self._evidence.probe(
            self._parts.losses,
            chosen,
            lambda part: loader.collate_fn(loader.dataset.__getitems__(part.tolist())),  # type: ignore[attr-defined]
            self._stream("analysis-noise", self.epoch),
            max_grad_norm=self._max_grad_norm,
            max_physical_batch_size=self._max_physical_batch_size,
            processes=self.processes,
        )
