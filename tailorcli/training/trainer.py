"""transformers' Trainer as ``finetune`` uses it: it stops at a loss that is no number, and marks what it has saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from tailorcli.errors import OptionsError
from tailorcli.files import write_text_atomically
from tailorcli.models.running import in_dtype_of, in_use, telling_inputs
from tailorcli.terminal import Progress
from tailorcli.training.examples import IGNORED, Collate
from tailorcli.training.resuming import COMPLETE, last_state
from tailorcli.training.shards import local, summed

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs


class NotANumber(Exception):  # noqa: N818  # it never reaches a user
    """The loss of a step, its gradient, or what it has left of the weights is no number."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what, step)
        self.what, self.step = what, step


class AlreadyTrained(Exception):  # noqa: N818  # it never reaches a user
    """The state that a run goes on from is that of its last step: the Trainer would make one more."""


def unsound(network: Any) -> int:
    """Entries of all parameters that are no numbers, of all processes' shards together."""
    found = 0
    for parameter in network.parameters():
        wrong = local(parameter).isfinite().logical_not_().count_nonzero()
        found += int(summed(wrong, parameter))
    return found


class GuardedTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that raises NotANumber before a step that would spoil the weights."""

    model_accepts_loss_kwargs: bool
    _divides = False  # whether it is yet to be seen if the model divides its loss by the tokens of the whole batch

    @classmethod
    def of(cls, network: Any, arguments: Any, examples: Sequence[Inputs], padding: int) -> Self:
        """A Trainer of examples with labels, which are padded with ``padding``."""
        made = cls(network, arguments, train_dataset=examples, data_collator=Collate(padding))
        made._divides = arguments.gradient_accumulation_steps * arguments.world_size > 1
        made.remove_callback(PrinterCallback)
        return made

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **given: Any) -> Any:
        """Give transformers' loss. Raises NotANumber."""
        inputs = in_dtype_of(self.model, inputs)
        if self._divides:  # once, before the first loss of a batch that comes in parts
            self._divides = False
            if self.model_accepts_loss_kwargs and not self._heeds_count(model, inputs):
                self.model_accepts_loss_kwargs = False  # so that the Trainer divides the loss by the parts itself
        with telling_inputs(inputs):
            found = super().compute_loss(model, inputs, *args, **given)
        loss = found[0] if isinstance(found, tuple) else found
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NotANumber(f"the loss is {value}", self.state.global_step + 1)
        if model.training and not loss.requires_grad:
            raise OptionsError("nothing that is trained takes part in the loss", "see --trainable and --last-layers")
        return found

    def _heeds_count(self, model: Any, inputs: Any) -> bool:
        """Whether the model divides its loss by the tokens of the whole batch where it is told how many these are.

        The Trainer asks the signature alone, and takes a model that ignores their number for one that does.
        """
        count = max(1, int((inputs["labels"] != IGNORED).sum()))
        # No draws of dropout, which a run that is resumed would lack.
        with in_use(model), torch.no_grad(), self.compute_loss_context_manager(), telling_inputs(inputs):
            once, twice = (float(model(**inputs, num_items_in_batch=n).loss) for n in (count, 2 * count))
        return abs(2 * twice - once) <= 0.5 * abs(once)  # such a loss is halved, but for that of a router

    def _get_train_sampler(self, *given: Any) -> Any:
        """Batches of like lengths, where they are asked for, by the lengths that the examples have."""
        from transformers.trainer_pt_utils import LengthGroupedSampler

        asked = getattr(self.args, "train_sampling_strategy", None) or getattr(self.args, "group_by_length", False)
        if str(getattr(asked, "value", asked)) not in ("group_by_length", "True"):
            return super()._get_train_sampler(*given)
        lengths = [inputs.get("input_ids", inputs["labels"]).shape[1] for inputs in self.train_dataset.tokens]
        return LengthGroupedSampler(self.args.train_batch_size * self.args.gradient_accumulation_steps, lengths=lengths)

    def keep_last_good(self) -> tuple[int, Path] | None:
        """The step and folder of the last state with sound weights: of now, or what was saved earlier; None if none."""
        folder = Path(self.args.output_dir)
        if self.args.world_size == 1 and self.state.global_step and not unsound(self.model):
            self._save_checkpoint(self.model, None)
            self.callback_handler.on_save(self.args, self.state, self.control)
        found = last_state(folder)
        return None if found is None else (int(found.name.rpartition("-")[2]), found)


class Guard(TrainerCallback):  # type: ignore[misc]
    """Progress, the mark of a whole state, and a look at the gradients before each step."""

    def __init__(self, work: Path, progress: bool) -> None:
        self._work, self._shown = work, progress
        self._bar: Progress | None = None
        self.has_begun = False  # the first step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to show the steps. Raises AlreadyTrained where none is left, with the state taken up."""
        if state.global_step >= state.max_steps:
            raise AlreadyTrained
        self._bar = Progress("training", state.max_steps, "steps", shown=self._shown and args.process_index == 0)
        self._bar.start_at(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Raise NotANumber where the gradient of this step is none."""
        self.has_begun = True
        if args.fp16:
            return  # its scaler skips such steps by itself
        total = torch.zeros((), dtype=torch.float64, device=args.device)  # one number, so that a GPU waits but once
        for parameter in given["model"].parameters():
            if parameter.grad is not None:
                square = torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float64).square()
                total += summed(square, parameter.grad)
        norm = math.sqrt(value) if (value := float(total)) >= 0 else value
        if not math.isfinite(norm):
            raise NotANumber(f"the gradient is {norm}", state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Count the step. Raises NotANumber before weights that are none are saved."""
        last = state.global_step == state.max_steps
        # The last loss, too; and at each state, from which a run that goes on counts its mean anew.
        control.should_log |= last or control.should_save
        if (last or control.should_save) and (wrong := unsound(given["model"])):
            raise NotANumber(f"{wrong:,} weights are no numbers", state.global_step)
        if self._bar is not None:
            self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the loss beside the steps."""
        if self._bar is not None and logs and "loss" in logs:
            self._bar.note(f"loss {float(logs['loss']):.4g}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the state that was saved as whole, once all processes have written theirs."""
        if args.world_size > 1:
            torch.distributed.barrier()
        folder = self._work / f"checkpoint-{state.global_step}"
        if args.process_index == 0 and folder.is_dir():
            write_text_atomically(folder / COMPLETE, f"{state.global_step}\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End it."""
        self.close()

    def close(self) -> None:
        """Take the progress away."""
        if self._bar is not None:
            self._bar.close()


def guard_of(trainer: Any, work: Path, progress: bool) -> Guard:
    """Let ``trainer`` show its progress, mark each whole state in ``work``, and look at its gradients."""
    guard = Guard(work, progress)
    trainer.add_callback(guard)
    return guard
