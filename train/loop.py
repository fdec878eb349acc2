"""The loop: wait for a batch, step, and now and then log, validate, save. There is one, whatever is trained.

A step is launched without waiting for the device; the loss is read on log steps and before a save only.
"""

import math
from typing import NoReturn

import torch

from pipeline.batch import DIGEST_MODULUS, Batch, digest_batch
from shards.atomic import write_atomic
from shards.cli import say
from shards.errors import InputError
from train.checkpoint import CheckpointWriter
from train.config import loader_config
from train.curves import draw_curves
from train.job import Job
from train.metrics import Meter, MetricsLog, Row, memory_mb
from train.objective import Contrastive, Output
from train.optim import learning_rate
from train.preempt import StopRequest
from train.ranks import together
from train.state import Progress, capture, gather_bad, order_digest, restore
from train.step import Step
from train.validate import validation_loss


def run(job: Job) -> bool:
    """Train to the end, or until asked to stop; whether the end was reached. All ranks have to call it."""
    with StopRequest().listening() as stop:
        loop = Loop(job, stop)
        try:
            loop.train()
        finally:
            loop.close()
        finished = loop.progress.step >= job.config.steps
        if job.ranks.first:
            _conclude(job, loop.progress, finished)
    return finished


class Loop:
    """One rank's way through the steps."""

    def __init__(self, job: Job, stop: StopRequest) -> None:
        self._job, self._config, self._ranks, self._stop = job, job.config, job.ranks, stop
        seed = job.config.seed if job.config.shuffle_reports else None
        objective = Contrastive(job.ranks, shuffle_seed=seed)
        self._step = Step(job.learner, objective, job.precision, job.ranks, clip=job.config.optim.clip)
        self.progress = self._begin()
        self._output: Output | None = None
        self._saved_step = self.progress.step
        self._meter = Meter()
        self._log: MetricsLog | None = None
        self._writer: CheckpointWriter | None = None
        if job.ranks.first:
            self._log = MetricsLog(job.folder, config=job.config, done=job.done)
            self._writer = CheckpointWriter(job.folder.checkpoints, keep=job.config.keep, best=job.folder.best)

    def train(self) -> None:
        """Step until the last one or a stop."""
        stopping = False
        while self.progress.step < self._config.steps and not stopping:
            stopping = self._one_step()

    def close(self) -> None:
        """Wait for the last checkpoint and close the files."""
        if self._log is not None:
            self._log.close()
        if self._writer is not None:
            self._writer.close()

    def _begin(self) -> Progress:
        """Weights and progress to start with; those of a fresh model survive the warm-up."""
        size = self._config.data.image_size
        self._step.warm_up(nothing_batch(size, self._job.manifest.tokenizer.context, self._job.precision.device))
        return restore(self._job.checkpoint, self._job.learner, self._ranks) if self._job.checkpoint else Progress()

    def _one_step(self) -> bool:
        """Train on one batch and do what is due after it; whether to stop."""
        config, progress = self._config, self.progress
        with self._meter.waiting():
            batch, failure = self._next_batch()
        asked, failed = self._ranks.sums([float(self._stop.asked), float(failure is not None)])
        if batch is None or failed:
            self._stop_short(failure)
        lr = learning_rate(config.optim, progress.step, config.steps)
        output = self._step(batch, lr)
        progress.step += 1
        progress.digest = (progress.digest + digest_batch(batch, self._job.world)) % DIGEST_MODULUS
        if self._log is not None:
            self._log.advance()
        self._output = output
        stopping = asked > 0 or progress.step == config.stop_at
        self._after_step(output, lr, stopping)
        return stopping

    def _next_batch(self) -> tuple[Batch | None, InputError | None]:
        """The next batch, or why there is none: a shard that is damaged, gone, or does not come."""
        try:
            return next(self._job.loader), None
        except InputError as error:
            return None, error

    def _stop_short(self, failure: InputError | None) -> NoReturn:
        """Save the steps done, then end all ranks with the line of the one whose loader failed. All have to call it."""
        if self._output is not None and self.progress.step != self._saved_step:
            self._read_loss(self._output)
            self._save(is_best=False)
        if self._writer is not None:
            self._writer.wait()

        def say_why() -> None:
            if failure is not None:
                raise InputError(f"{failure} (stopped after step {self.progress.step}, which is saved)")

        together(self._ranks, "train.main", say_why)
        raise AssertionError("unreachable")

    def _after_step(self, output: Output, lr: float, stopping: bool) -> None:
        step, config = self.progress.step, self._config
        last = step == config.steps
        validating = config.validate_every > 0 and (last or step % config.validate_every == 0)
        saving = last or stopping or step % config.save_every == 0
        logging = last or validating or step % config.log_every == 0
        if not (logging or saving):
            return
        loss = self._read_loss(output)
        row = self._row(output, loss, lr) if logging else {}
        with self._meter.paused():
            improved = validating and self._validate(row)
            if self._log is not None and logging:
                self._log.write(row)
            if saving or improved:
                self._save(is_best=improved)

    def _read_loss(self, output: Output) -> float:
        """The global batch's loss; the same on all ranks. Weights that gave no number are not worth keeping."""
        loss = self._ranks.sums([output.loss.item()])[0] / self._ranks.size
        if not math.isfinite(loss):
            step = self.progress.step
            raise InputError(f"the loss is {loss} at step {step}; lower --optim.lr, or go on from a checkpoint before")
        return loss

    def _row(self, output: Output, loss: float, lr: float) -> Row:
        step_ms, wait_ms = (value / self._ranks.size for value in self._ranks.sums(self._meter.read()))
        return {
            "step": self.progress.step,
            "loss": loss,
            "lr": lr,
            **{name: value.item() for name, value in output.metrics.items()},
            "images_per_s": round(self._config.batch_size / step_ms * 1e3, 1),
            "loader_wait_ms": round(wait_ms, 3),
            "step_ms": round(step_ms, 3),
            "memory_mb": round(memory_mb(self._job.precision.device), 1),
            "order_digest": order_digest(self.progress, self._ranks),
            "read_retries": int(self._ranks.sums([self._job.loader.stats().get("retries", 0)])[0]),
            "bad_samples": len(gather_bad(self._job.loader, self._ranks)),
        }

    def _validate(self, row: Row) -> bool:
        """Validate and note the loss; whether it is the lowest so far."""
        loader = loader_config(self._config, split="val", mode="eval")
        loss = validation_loss(self._job.learner.model, loader, self._job.precision, self._ranks)
        row["val_loss"] = loss
        if self.progress.best_loss is not None and loss >= self.progress.best_loss:
            return False
        self.progress.best_loss, self.progress.best_step = loss, self.progress.step
        return True

    def _save(self, *, is_best: bool) -> None:
        job = self._job
        bad = gather_bad(job.loader, self._ranks)
        payload = capture(job.config, job.fingerprint, self.progress, job.learner, bad, self._ranks)
        self._saved_step = self.progress.step
        if self._writer is not None:
            self._writer.write(payload, is_best=is_best)


def nothing_batch(image_size: int, context: int, device: torch.device) -> Batch:
    """Two black images with empty reports, for the warm-up."""
    tokens = torch.zeros(2, context, dtype=torch.int64)
    tokens[:, 0] = 1
    images = torch.zeros(2, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
    return Batch(
        images=images.to(device),
        tokens=tokens.to(device),
        labels=torch.zeros(2, 0, device=device),
        samples=torch.zeros(2, 2, dtype=torch.int64),
        position=0,
        text_length=1,
    )


def _conclude(job: Job, progress: Progress, finished: bool) -> None:
    """Leave curves at the end, or a mark that asks for the rest of the run."""
    if finished:
        draw_curves(job.folder.metrics, job.folder.curves)
        best = (
            ""
            if progress.best_loss is None
            else f"; best validation loss {progress.best_loss:.4f} at step {progress.best_step}"
        )
        say(f"trained {progress.step} steps{best}; run folder {job.folder.root}")
        return
    write_atomic(job.folder.requeue, f"{progress.step}\n".encode())
    say(
        f"stopped after step {progress.step} of {job.config.steps}; go on with --resume auto (see {job.folder.requeue})"
    )
