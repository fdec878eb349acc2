"""The loop: wait for a batch, step, and now and then log, validate, save. There is one, whatever is trained.

A step is launched without waiting for the device; what the steps said is read on log steps and before a save only.
"""

import contextlib
import math
import time
from typing import NoReturn

from pipeline.batch import DIGEST_MODULUS, Batch, digest_batch
from shards.atomic import write_atomic
from shards.cli import say
from shards.errors import InputError
from train.config import loader_config
from train.curves import draw_curves
from train.job import Job
from train.metrics import Meter, MetricsLog, memory_mb
from train.nonfinite import REPORT, Recorder, all_finite, complain
from train.objective import OtherRankFailed, Output
from train.optim import learning_rate, momentum, update_average
from train.ranks import StopRequest, together
from train.rows import Row
from train.saving import CheckpointWriter, Shelf
from train.state import Progress, capture, gather_bad, order_digest, restore
from train.step import build_step, compiled_graphs, nothing_batch


def run(job: Job, stop: StopRequest) -> bool:
    """Train to the end, or until asked to stop; whether the end was reached. All ranks have to call it."""
    loop = Loop(job, stop)
    try:
        loop.train()
    finally:
        loop.close()
    if job.ranks.first:
        _conclude(job, loop.progress, loop.finished)
    return loop.finished


class Loop:
    """One rank's way through the steps."""

    def __init__(self, job: Job, stop: StopRequest) -> None:
        self._job, self._config, self._ranks, self._stop = job, job.config, job.ranks, stop
        self._step = build_step(job.config, job.learner, job.precision, job.ranks)
        self.progress = self._begin()
        self._recorder = Recorder(job.ranks, scaled=job.learner.scaler.is_enabled())
        self._loss = math.nan
        """The newest since the last row that is a number."""
        self._saved_step = self.progress.step
        self._meter = Meter()
        self._log: MetricsLog | None = None
        self._writer: CheckpointWriter | None = None
        if job.ranks.first:
            self._log = MetricsLog(job.folder, config=job.config, done=job.done)
            shelf = Shelf(job.folder.checkpoints, keep=job.config.keep, best=job.folder.best)
            self._writer = CheckpointWriter(
                shelf, retries=job.config.save_retries, warn=job.warn, check=job.check_lease, before=job.folder.metrics
            )

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do: all steps are done, or validation has not improved for too long."""
        patience = self._config.patience
        return self.progress.step >= self._config.steps or (
            patience is not None and self.progress.patience.bad >= patience
        )

    def train(self) -> None:
        """Step until the last one or a stop."""
        stopping = False
        while not (self.finished or stopping):
            stopping = self._one_step()

    def close(self) -> None:
        """Wait for the last checkpoint and close the files."""
        with contextlib.ExitStack() as both:
            if self._writer is not None:
                both.callback(self._writer.close)
            if self._log is not None:
                both.callback(self._log.close)

    def _begin(self) -> Progress:
        """Weights and progress to start with; those of a fresh model survive the warm-up."""
        job, manifest, size = self._job, self._job.manifest, self._config.data.image_size
        count, labels = 2 * self._config.accumulate, len(manifest.labels)
        self._step.warm_up(nothing_batch(count, size, manifest.tokenizer.context, labels, job.precision.device))
        if job.checkpoint is None:
            return Progress()
        payload, learner = job.checkpoint, job.learner
        progress = together(self._ranks, "train.main", lambda: restore(payload, learner, self._ranks))
        if job.on_other_films:
            progress.judge_anew()
        return progress

    def _one_step(self) -> bool:
        """Train on one batch and do what is due after it; whether to stop."""
        config, progress, learner = self._config, self.progress, self._job.learner
        batch, asked = self._next_batch()
        lr = learning_rate(config.optim, progress.step, config.steps, progress.plateau.cuts)
        output = self._step(batch, lr, momentum(config.optim, progress.step, config.steps))
        progress.step += 1
        progress.position += config.batch_size
        progress.digest = (progress.digest + digest_batch(batch, self._job.world)) % DIGEST_MODULUS
        self._recorder.note(progress.step, output, batch.samples)
        if learner.ema is not None and config.ema is not None:
            update_average(learner.ema, learner.model, config.ema, progress.step)
        if self._log is not None:
            self._log.advance()
        stopping = asked or progress.step == config.stop_at
        self._after_step(output, lr, stopping)
        return stopping

    def _next_batch(self) -> tuple[Batch, bool]:
        """The next batch, and whether any rank was asked to stop.

        Ends all ranks where one gets none: a shard is damaged, gone, or does not come.
        """
        batch, failure = None, None
        with self._meter.waiting():
            try:
                batch = next(self._job.loader)
            except InputError as error:
                failure = error
        asked, failed = self._ranks.sums([float(self._stop.asked), float(failure is not None)])
        if batch is None or failed:
            self._stop_short(failure)
        return batch, asked > 0

    def _stop_short(self, failure: InputError | None) -> NoReturn:
        """Save the steps done, then end all ranks with the line of the one that cannot read. All have to call it."""
        if self.progress.step != self._saved_step:
            self._look()
            self._save(is_best=False)
        if self._writer is not None:
            self._writer.wait()

        def say_why() -> None:
            if failure is not None:
                step = self.progress.step
                told = f"stopped after step {step}, which is saved" if step else "before the first step"
                raise InputError(f"{failure} ({told})")

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
        self._look()
        row = self._row(output, lr) if logging else {}
        self._loss = math.nan if logging else self._loss
        with self._meter.paused():
            improved = validating and self._validate(row)
            if self._log is not None and logging:
                self._log.write(row)
            if saving or improved or self.finished:
                self._save(is_best=improved)

    def _look(self) -> None:
        """Read what the steps since the last look said; stop for losses that are no numbers, or count them."""
        reading = self._recorder.read(loader_config(self._config, split="train", mode="train"))
        self.progress.skipped += reading.skipped
        self._loss = self._loss if reading.loss is None else reading.loss
        if reading.bad or self._recorder.hopeless:
            report = self._job.folder.root / REPORT if self._ranks.first else None
            together(self._ranks, "train.main", lambda: complain(reading, self._recorder, self._config, report))

    def _row(self, output: Output, lr: float) -> Row:
        scaler = self._job.learner.scaler
        step_ms, wait_ms = (value / self._ranks.size for value in self._ranks.sums(self._meter.read()))
        return {
            "step": self.progress.step,
            "loss": self._loss,
            "lr": lr,
            **{name: value for name, told in output.metrics.items() if math.isfinite(value := told.item())},
            "images_per_s": round(self._config.batch_size / step_ms * 1e3, 1),
            "loader_wait_ms": round(wait_ms, 3),
            "step_ms": round(step_ms, 3),
            "memory_mb": round(memory_mb(self._job.precision.device), 1),
            "order_digest": order_digest(self.progress, self._ranks),
            "read_retries": int(self._ranks.sums([self._job.loader.stats().get("retries", 0)])[0]),
            "bad_samples": len(gather_bad(self._job.loader, self._ranks)),
            "skipped_steps": self.progress.skipped,
            **({"films_since": self.progress.films_since} if self.progress.films_since else {}),
            **({"compiled_graphs": compiled_graphs()} if self._config.compile else {}),
            **({"loss_scale": scaler.get_scale()} if scaler.is_enabled() else {}),
            **(self._writer.figures() if self._writer is not None else {}),
        }

    def _validate(self, row: Row) -> bool:
        """Validate and note the loss; whether it is the lowest so far."""
        job, config, progress, began = self._job, self._config, self.progress, time.perf_counter()
        loader = loader_config(config, split="val", mode="eval")
        try:
            loss = self._step.objective.validate(job.learner.judged, loader, job.precision, self._ranks)
        except InputError as failure:
            self._stop_short(None if isinstance(failure, OtherRankFailed) else failure)
        row |= {"val_loss": loss, "validate_s": round(time.perf_counter() - began, 3)}
        progress.patience.note(loss, config.min_delta)
        if config.optim.schedule == "plateau":
            progress.plateau.note(loss, config.min_delta, config.optim)
        if not math.isfinite(loss) or (progress.best_loss is not None and loss >= progress.best_loss):
            return False
        progress.best_loss, progress.best_step = loss, progress.step
        return True

    def _save(self, *, is_best: bool) -> None:
        job = self._job
        together(self._ranks, "train.main", self._check_weights)
        bad = gather_bad(job.loader, self._ranks)
        payload = capture(job.config, job.fingerprint, self.progress, job.learner, bad, self._ranks)
        self._saved_step = self.progress.step

        def hand_over() -> None:
            if self._writer is not None:
                self._writer.write(payload, is_best=is_best)

        together(self._ranks, "train.main", hand_over)

    def _check_weights(self) -> None:
        """InputError where an update has overflowed: such weights must not push good ones off the shelf."""
        if not (all_finite(self._job.learner.model) and all_finite(self._job.learner.ema)):
            raise InputError(
                f"a weight is no number after step {self.progress.step}, which is not saved; lower --optim.lr, "
                "and go on from a checkpoint before"
            )


def _conclude(job: Job, progress: Progress, finished: bool) -> None:
    """Leave curves at the end, or a mark that asks for the rest of the run; and say how it went."""
    folder, steps = job.folder, job.config.steps
    if not finished:
        write_atomic(folder.requeue, f"{progress.step}\n".encode())
        say(f"stopped after step {progress.step} of {steps}; go on with --resume auto (see {folder.requeue})")
        return
    try:
        draw_curves(folder.metrics, folder.curves)
    except (OSError, ImportError) as error:  # a full disk, say: the run is whole without them
        job.warn(f"no curves ({type(error).__name__}); draw them by python -m train.curves {folder.root}")
    told = f"trained {progress.step} steps"
    if progress.step < steps:
        told += f", no lower validation loss in {job.config.patience} validations"
    if progress.best_loss is not None:
        told += f"; best validation loss {progress.best_loss:.4f} at step {progress.best_step}"
    say(f"{told}; run folder {folder.root}")
