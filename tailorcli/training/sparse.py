"""Sparse fine-tuning on a Trainer of transformers or trl: SPIDER, Model-Dowser, half, L2, and plain full.

A method is a callback and two hooks of the optimiser: before its step the gradients are masked, or added to, and
after it weights are put back. There is no training loop here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainerCallback

from tailorcli.core import dowser, spider
from tailorcli.errors import OptionsError, OutputError
from tailorcli.files import PathLike, optional_path
from tailorcli.models.names import unwrapped
from tailorcli.training.choice import beside_own, choose, freeze_others, named_parameters
from tailorcli.training.importance import Importance
from tailorcli.training.optimisers import KEEPS_WITHOUT_GRADIENT, refuse_outside_steps
from tailorcli.training.settings import TuningOptions
from tailorcli.training.shards import as_shard, local, summed


class SparseTuning(TrainerCallback):  # type: ignore[misc]
    """A method of fine-tuning that keeps a model from forgetting, for a Trainer of your own.

    ``method`` is "dowser", "spider", "half", "l2" or "full". "dowser" needs the folder ``importance`` that ``tailorcli
    probe`` wrote of the model in its present state, and trains the ``update_ratio`` of each layer's entries that
    matter least. Embeddings and the towers of pictures and sound are frozen, but for what the globs ``trainable``
    name; ``last_layers`` trains so many blocks alone. ``accumulate`` is SPIDER's: "momentum" or "sum". ``strength``
    is L2's weight, ``round_steps`` the steps of a round of half, ``seed`` that of its draws.

    Raises OptionsError for values out of range.
    """

    def __init__(
        self,
        method: str,
        *,
        importance: PathLike | None = None,
        update_ratio: float = 0.1,
        trainable: Sequence[str] = (),
        last_layers: int | None = None,
        accumulate: str = "momentum",
        strength: float = 1e-3,
        round_steps: int = 1,
        seed: int = 0,
    ) -> None:
        self.options = TuningOptions(
            method=method,
            update_ratio=update_ratio,
            trainable=(trainable,) if isinstance(trainable, str) else tuple(trainable),
            last_layers=last_layers,
            accumulate=accumulate,
            strength=strength,
            round_steps=round_steps,
            seed=seed,
        )
        if (method == "dowser") != (importance is not None):
            if method == "dowser":
                raise OptionsError("dowser needs an importance", "make one: tailorcli probe BASE -o IMPORTANCE")
            raise OptionsError(f"method {method} takes no importance", "leave it out")
        self._importance = optional_path(importance)
        self.names: list[str] = []  # of the parameters that are trained
        self.unscored: dict[str, str] = {}  # parameters that dowser leaves frozen, each with the reason
        self._held: dict[str, Tensor] = {}  # the base's values, or the bits of the masks; whole until training begins
        self._general: dict[str, Tensor] = {}  # SPIDER's moments of the base's tensors
        self._sofar: dict[str, Tensor] = {}  # SPIDER's accumulated gradients
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._whole: dict[str, tuple[int, ...]] = {}  # shapes at ``attach``
        self._parameters: dict[str, Tensor] = {}
        self._saved: dict[str, Tensor] = {}
        self._decay: list[tuple[dict[str, Any], float]] = []
        self._hooks: list[Any] = []
        self._resting_norms: list[torch.nn.Module] = []
        self._is_of_base = False  # whether the importance is known to be of this very base
        self._step = 0

    def attach(self, trainer: Any) -> Self:
        """Freeze what is not trained, and take part in the training of ``trainer``, whose model is the base now.

        Call it before ``trainer.train()``, and one of them alone. Raises OptionsError, and ImportanceError where the
        scores are of another base.
        """
        if getattr(trainer, "is_deepspeed_enabled", False):
            raise OptionsError("sparse fine-tuning does not go with DeepSpeed", "use FSDP, or one device")
        if getattr(trainer, "model_init", None) is not None:
            what = (
                "this Trainer makes its model anew when it trains (model_init), after this has frozen the present one"
            )
            raise OptionsError(what, "give the Trainer the model itself")
        there = [each for each in _callbacks(trainer) if isinstance(each, SparseTuning)]
        if there and there != [self]:
            what = f"{there[0].options.method} is attached to this Trainer already, and both would work on each step"
            raise OptionsError(what, "load the model anew, and give it to a new Trainer")
        optim = getattr(getattr(trainer, "args", None), "optim", "")
        refuse_outside_steps(self.options.method, optim, getattr(trainer, "optimizer", None))
        for kept in (self._held, self._general, self._sofar, self._shapes, self.unscored):
            kept.clear()  # of a Trainer that it was attached to before
        network = trainer.model
        asked = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
        try:
            self._take(network)
        except BaseException:
            for parameter, wanted in asked:
                parameter.requires_grad_(wanted)
            raise
        if not there:
            trainer.add_callback(self)
        return self

    def _take(self, network: Any) -> None:
        """Freeze what is not trained of a network, and hold what the method needs of the rest. Raises TailorError."""
        chosen = choose(network, self.options.trainable, self.options.last_layers)
        self._refuse_adapters(network, chosen)
        self.names = freeze_others(network, chosen)
        if self.options.method == "dowser":
            self._take_masks(network)
        elif self.options.method in ("spider", "l2"):
            parameters = named_parameters(network)
            self._held = {name: parameters[name].detach().clone() for name in self.names}
        parameters = named_parameters(network)
        self._whole = {name: tuple(parameters[name].shape) for name in self.names}

    def _refuse_adapters(self, network: Any, names: Sequence[str]) -> None:
        """Raise OptionsError for a method that chooses among weights where it would train what an adapter adds."""
        if self.options.method in ("full", "l2"):
            return
        parameters, added = named_parameters(network), beside_own(network, copies=False)
        if found := next((name for name in names if name in added and parameters[name].requires_grad), None):
            what = f"{self.options.method} chooses among a model's own weights, and {found} is an adapter's"
            raise OptionsError(what, "take full or l2, or the model without its adapter")

    def _take_masks(self, network: Any) -> None:
        """The masks of all trained parameters as bits; those without scores are frozen."""
        assert self._importance is not None
        importance = Importance.open(self._importance)
        parameters = named_parameters(network)
        scored = [name for name in self.names if name in importance.digests]
        if not scored:
            raise OptionsError(
                f"{importance.path} has no scores of what is to be trained, such as {self.names[0]!r}",
                "see --trainable and --last-layers; or probe this base",
            )
        unscored = [name for name in self.names if name not in importance.digests]
        if unknown := [name for name in unscored if name not in importance.reasons]:  # a classifier's head, at random
            what = f"{importance.path} was made of a model without {unknown[0]!r}, which would stay as it is now"
            raise OptionsError(what, "save this model and probe that one; or freeze it yourself: requires_grad_(False)")
        self.unscored = {name: importance.reasons[name] for name in unscored}
        self.names = freeze_others(network, scored)
        for name in self.names:
            given = None if self._is_of_base else parameters[name]
            self._held[name] = importance.bits(name, given, self.options.update_ratio)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Hang the hooks on the optimiser, and cut what is held into this process's shards.

        Raises OptionsError where the Trainer has no optimiser of its own, one that moves weights outside of its steps,
        or one that makes NaN of masked gradients.
        """
        if given["optimizer"] is None or given["model"] is None:
            raise OptionsError("the Trainer gives no optimiser", "use transformers' own training loop")
        optimizer = getattr(given["optimizer"], "optimizer", given["optimizer"])
        refuse_outside_steps(self.options.method, "", optimizer)
        if self.options.method == "dowser" and divides_by_zero(optimizer):
            what = "in float16 Adam's epsilon is zero: every weight that dowser leaves alone would be NaN"
            raise OptionsError(what, "load the model in float32 or bfloat16")
        self._remove_hooks()
        self._rest_norms(given["model"])
        every = named_parameters(given["model"])
        self._parameters = {name: every[name] for name in self.names if name in every}
        whole = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        if whole != self._whole:
            what = "the Trainer's parameters are not those that were attached, in name and shape, as FSDP 1 cuts them"
            raise OptionsError(what, 'use FSDP 2: fsdp_config {"version": 2}')
        for name, parameter in self._parameters.items():
            if name in self._held and name not in self._shapes:
                self._prepare(name, parameter)
        if self.options.method == "spider" and state.global_step:
            self._load(self._state_file(args, state))
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def _prepare(self, name: str, parameter: Tensor) -> None:
        """Bring what is held of one parameter to its device and into its shard."""
        held, device = self._held[name], local(parameter).device
        if self.options.method == "dowser":
            mask = dowser.unpacked(held.to(device), tuple(parameter.shape))
            mine = as_shard(mask.to(torch.uint8), parameter).bool()
            self._held[name], self._shapes[name] = dowser.packed(mine), tuple(mine.shape)
            return
        if self.options.method == "spider":
            self._general[name] = spider.moments(held)
            self._sofar[name] = torch.zeros_like(local(parameter), dtype=torch.float32)
        mine = as_shard(held.to(device), parameter)
        self._held[name], self._shapes[name] = mine, tuple(mine.shape)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Note the number of the step that comes."""
        self._step = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Take the hooks off again."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        while self._resting_norms:
            self._resting_norms.pop().__dict__.pop("train", None)

    def _rest_norms(self, network: torch.nn.Module) -> None:
        """Batch norms without a trained parameter stay as they are in use: in training they would average anew.

        The Trainer calls ``train()`` before every step, which reaches them through their own method.
        """
        trained = set(self.names)
        for name, module in network.named_modules():
            if not isinstance(module, _BatchNorm):
                continue
            own = {unwrapped(f"{name}.{each}") for each, _ in module.named_parameters(recurse=False)}
            if not own & trained:
                module.eval()
                module.__dict__["train"] = partial(_as_it_is, module)
                self._resting_norms.append(module)

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """What the optimiser is to see."""
        method = self.options.method
        if is_skipped(optimizer):
            return
        scale = loss_scale(optimizer)
        if method == "half":
            for name in self._resting():
                self._parameters[name].grad = None  # no step, no decay and no momentum moves what has none
        if method == "dowser":
            self._mask(optimizer, scale)
        if method not in ("spider", "l2"):
            return
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            gradient = local(parameter.grad)
            if method == "l2":
                added = spider.l2_gradient(local(parameter), self._held[name], self.options.strength)
                gradient.add_(added.mul_(scale).to(gradient.dtype))
            else:
                plain = gradient if scale == 1.0 else gradient.float() / scale
                self._sofar[name] = spider.accumulated(self._sofar[name], plain, self.options.momentum)

    def _mask(self, optimizer: torch.optim.Optimizer, scale: float) -> None:
        """Mask the gradients; decay the entries that are trained here, and none in the optimiser.

        Gradients are still multiplied by ``scale``. An optimiser whose step is not known to leave entries without
        gradient alone gets its frozen ones back after.
        """
        known = type(optimizer) in KEEPS_WITHOUT_GRADIENT
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for group in optimizer.param_groups:
            decay = float(group.get("weight_decay") or 0.0) if known else 0.0
            decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None or parameter.grad is None:
                    continue
                mask = dowser.unpacked(self._held[name], self._shapes[name])
                values, gradient = local(parameter), local(parameter.grad)
                if decay and decoupled:
                    values.copy_(torch.where(mask, values * (1 - float(group["lr"]) * decay), values))
                elif decay:
                    gradient.add_(values.to(gradient.dtype), alpha=decay * scale)
                gradient.mul_(mask)
                if not known:
                    self._saved[name] = values.clone()
            if decay:
                self._decay.append((group, group["weight_decay"]))
                group["weight_decay"] = 0.0

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Put back what the step must not have moved."""
        if is_skipped(optimizer):
            return
        while self._decay:
            group, decay = self._decay.pop()
            group["weight_decay"] = decay
        for name, before in self._saved.items():
            values = local(self._parameters[name])
            values.copy_(torch.where(dowser.unpacked(self._held[name], self._shapes[name]), values, before))
        self._saved.clear()
        if self.options.method != "spider":
            return
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._pull_back(name, parameter)

    def _pull_back(self, name: str, parameter: Tensor) -> None:
        """SPIDER's mask of one tensor, and its weights between the base's and their own."""
        values, base, sofar = local(parameter), self._held[name], self._sofar[name]
        general = spider.importance(base, self._general[name])
        learnt = spider.importance(sofar, summed(spider.moments(sofar), parameter))
        weight, total = spider.selection(learnt, general)
        mask = spider.rescaled(weight, summed(total, parameter))
        values.copy_(spider.pulled_back(values, base, mask))

    def _resting(self) -> list[str]:
        """The parameters that half leaves alone in the present round."""
        generator = torch.Generator().manual_seed(
            self.options.seed * 1_000_003 + self._step // self.options.round_steps
        )
        resting = []
        for blocks in blocks_by_parent(self.names):
            drawn = spider.drawn_half(len(blocks), generator)
            resting += [name for block, trained in zip(blocks, drawn, strict=True) if not trained for name in block]
        return resting

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Put SPIDER's accumulated gradients beside the state of the optimiser."""
        from safetensors.torch import save_file

        if self.options.method != "spider":
            return
        file = self._state_file(args, state)
        if file.parent.is_dir():
            save_file({name: value.cpu().contiguous() for name, value in self._sofar.items()}, file)

    def on_push_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Put them there before a checkpoint is uploaded, which transformers does before it tells that it is saved."""
        self.on_save(args, state, control)

    @staticmethod
    def _state_file(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / f"spider-{args.process_index}.safetensors"

    def _load(self, file: Path) -> None:
        """Take up accumulated gradients that an earlier run left."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(file)
            for name, value in self._sofar.items():
                value.copy_(found[name])
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            what = f"SPIDER's accumulated gradients cannot be taken up from {file}: {error}"
            how = "start anew, or resume with as many processes from a checkpoint in the Trainer's own output_dir"
            raise OutputError(what, how) from error


def _callbacks(trainer: Any) -> list[Any]:
    """What takes part in a Trainer's training so far."""
    return list(getattr(getattr(trainer, "callback_handler", None), "callbacks", ()))


def is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimiser will leave all as it is, since a gradient in float16 was none."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and float(found) != 0.0


def divides_by_zero(optimizer: torch.optim.Optimizer) -> bool:
    """Whether Adam divides by zero where a gradient is zero: its epsilon is none in the dtype of the weights.

    A fused one works in float32.
    """
    return type(optimizer) in KEEPS_WITHOUT_GRADIENT and any(
        "eps" in group and not group["fused"] and not torch.tensor(float(group["eps"]), dtype=parameter.dtype)
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def loss_scale(optimizer: torch.optim.Optimizer) -> float:
    """What the gradients are still multiplied by, which a fused optimiser takes out itself."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def _as_it_is(module: torch.nn.Module, _mode: bool = True) -> torch.nn.Module:
    """In place of a module's ``train``: it stays in the mode that it is in."""
    return module


def blocks_by_parent(names: Sequence[str]) -> list[list[list[str]]]:
    """Parameters by block (a module's weight with its bias), and the blocks by the module that they lie in.

    So a layer's attention, its feed-forward part and its norms are a group each, as in half fine-tuning's paper.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for name in names:
        block = name.removesuffix(".weight").removesuffix(".bias")
        groups.setdefault(block.rpartition(".")[0], {}).setdefault(block, []).append(name)
    return [list(blocks.values()) for blocks in groups.values()]
