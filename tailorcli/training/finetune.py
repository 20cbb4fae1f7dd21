"""Fine-tune a base on new data with transformers' Trainer, by a method that lets it forget less.

While it runs, states lie in a folder beside the output, from which an interrupted run goes on. The output is written
from the last of them, in the base's own names, dtypes and shards.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.core.scores import count_kept
from tailorcli.data.records import Records, media_digest, read_records
from tailorcli.device import StageTimer, device_errors, kept_random_numbers, resolve_device
from tailorcli.distributed import launched
from tailorcli.errors import NumericalError, OptionsError, first_line, note
from tailorcli.files import PathLike, file_digest, write_text_atomically
from tailorcli.guard import OutputLock, Watch, path_text, protect
from tailorcli.models.calling import package_versions
from tailorcli.models.config import processor_folder, read_config, tokenizer_digest, writes_samples
from tailorcli.models.empty import check_shapes, empty_on_meta, most_tokens
from tailorcli.models.generation import media_token_ids
from tailorcli.models.loading import load_encoder, load_model
from tailorcli.models.names import aliases, expected_names, unwrapped
from tailorcli.models.running import check_ids
from tailorcli.models.skeleton import run_dtype
from tailorcli.options import matches
from tailorcli.system import peak_memory
from tailorcli.training.carded import Given, side_files_of
from tailorcli.training.choice import choose, named_parameters, trained_numel
from tailorcli.training.examples import Examples, encode_examples
from tailorcli.training.importance import Importance, ImportanceError
from tailorcli.training.optimisers import KEEPS_WITHOUT_GRADIENT, name_of, optimiser_bytes, refuse_outside_steps
from tailorcli.training.outcome import FinetunePlan, FinetuneReport, memory_of, write_outcome
from tailorcli.training.probe import open_plain
from tailorcli.training.resuming import (
    FACTS,
    FINAL,
    begin,
    check_output,
    clear,
    facts_of,
    forget_if_refused,
    is_finished,
    last_state,
    states_written,
    work_of,
)
from tailorcli.training.settings import OWN_ARGUMENTS, PUBLISHING, REFUSED_ARGUMENTS, FinetuneOptions

if TYPE_CHECKING:
    from tailorcli.training.sparse import SparseTuning


@dataclass(frozen=True)
class Job:
    """The inputs of a run, opened and checked."""

    base: Checkpoint
    config: dict[str, Any]
    records: Records
    data: Path
    importance: Importance | None
    options: FinetuneOptions
    arguments: dict[str, Any]  # more of TrainingArguments, from a file

    def identity(self) -> dict[str, Any]:
        """What decides the result, as JSON gives it back."""
        whole = {
            "versions": package_versions(),
            "base": self.base.fingerprint(),
            "tokenizer": tokenizer_digest(self.base.path, self.base.path),
            "data": self.records.digest,
            "media": media_digest(self.records) if self.records.has_media else None,
            "importance": None if self.importance is None else file_digest(self.importance.path / "importance.json"),
            "options": self.options.identity(),
            "training_args": self.arguments,
        }
        return dict(json.loads(json.dumps(whole, default=str)))


def finetune_model(
    base: PathLike,
    data: PathLike,
    output: PathLike,
    options: FinetuneOptions = FinetuneOptions(),
    importance: PathLike | None = None,
    training_args: PathLike | None = None,
    progress: bool = False,
    announce: Callable[[FinetunePlan], None] | None = None,
) -> FinetuneReport | None:
    """Fine-tune ``base`` on the records of ``data`` and write the checkpoint ``output``.

    ``data`` is a file, a folder of files, "-" for standard input, or a dataset of the Hub, NAME[:CONFIG][:SPLIT].
    ``importance`` is what ``probe_model`` wrote, for the method "dowser"; ``training_args`` a YAML file of further
    TrainingArguments; ``announce`` is told the plan before training. Under torchrun every process calls it, and all
    but the first get None. Raises TailorError.
    """
    started = perf_counter()
    require_accelerate()
    folder = Path(output)
    work = work_of(folder)
    with ExitStack() as stack:
        job = _open(base, data, options, importance, training_args, stack)
        asked, options, given = options, job.options, Given(data, importance, training_args)
        identity = job.identity()
        is_first = launched().first
        if is_first:
            protect([folder, work], [job.base.path, job.data, importance], "choose another folder for -o")
            stack.enter_context(OutputLock(work, folder=True))
            earlier = check_output(folder, work, identity, options.resume)
            if earlier is not None:
                clear(folder, work)  # what a run that was ended at its very end left
                return earlier
            stack.push(forget_if_refused(work))
            begin(work, identity)
        elif options.resume and is_finished(folder):
            return None
        timer = StageTimer()
        watch = Watch([*job.base.shards, job.data])
        facts = facts_of(work / FINAL)
        if facts is None:
            with timer.stage("load"):
                check_shapes(job.base, job.config, options)
                network = load_model(job.base, job.config, options)
                examples = _examples(job, network)
            with refused_arguments(job):
                arguments = training_arguments(job, work)
            plan = plan_of(job, network, examples, folder, arguments)
            if is_first and announce is not None:
                announce(plan)
            smaller = "a smaller --batch-size with more --gradient-accumulation, or --last-layers"
            with timer.stage("train"), device_errors(smaller):
                facts = train(job, network, examples, work, progress, started)
        if not is_first:
            return None
        watch.require_unchanged()
        with timer.stage("write"):
            side = side_files_of(job.base, asked, given, facts)
            report = write_outcome(job.base, job.config, options, work / FINAL, folder, identity, facts, side)
        stages = dict(timer.seconds)
        shutil.rmtree(work, ignore_errors=True)
        return report.timed(perf_counter() - started, stages)


def plan_finetune(
    base: PathLike,
    data: PathLike,
    output: PathLike,
    options: FinetuneOptions = FinetuneOptions(),
    importance: PathLike | None = None,
    training_args: PathLike | None = None,
) -> FinetunePlan:
    """What ``finetune_model`` would train, and its cost; checks all that can be checked. Raises TailorError."""
    require_accelerate()
    folder = Path(output)
    with ExitStack() as stack:
        job = _open(base, data, options, importance, training_args, stack)
        options = job.options
        work = work_of(folder)
        protect([folder, work], [job.base.path, job.data, importance], "choose another folder for -o")
        check_output(folder, work, job.identity(), options.resume)
        check_shapes(job.base, job.config, options)
        network = empty_on_meta(job.base, job.config, options)
        with refused_arguments(job):
            arguments = training_arguments(job, work)
        return plan_of(job, network, _examples(job, network), folder, arguments)


def require_accelerate() -> None:
    """Raise OptionsError where what transformers' Trainer needs is not installed."""
    if find_spec("accelerate") is None:
        raise OptionsError("fine-tuning needs accelerate, which the extra [train] brings", "pip install accelerate")


def _open(
    base: PathLike,
    data: PathLike,
    options: FinetuneOptions,
    importance: PathLike | None,
    training_args: PathLike | None,
    stack: ExitStack,
) -> Job:
    """Open all that goes in. Raises TailorError."""
    if (options.method == "dowser") != (importance is not None):
        if options.method == "dowser":
            raise OptionsError("method dowser needs --importance", "make it: tailorcli probe BASE -o IMPORTANCE")
        raise OptionsError(f"--importance is for method dowser, not {options.method}", "leave it out")
    resolve_device(options.device)
    stored = stack.enter_context(open_plain(base))
    opened = None if importance is None else Importance.open(importance)
    if opened is not None and opened.fingerprint != stored.fingerprint():
        raise ImportanceError(
            f"{opened.path} was made of another base than {stored.path}", "probe this one: tailorcli probe BASE -o NEW"
        )
    arguments = {} if training_args is None else read_arguments(Path(training_args))
    records = read_records(data, columns=options.columns)
    config = read_config(stored.path)
    options = _in_trainable_dtype(stored, config, options, arguments)
    return Job(stored, config, records, Path(data), opened, options, arguments)


def _in_trainable_dtype(
    stored: Checkpoint, config: Mapping[str, Any], options: FinetuneOptions, arguments: Mapping[str, Any]
) -> FinetuneOptions:
    """The options with a dtype in which an optimiser can work. Raises OptionsError for one in which it cannot.

    Adam divides by its epsilon, 1e-8, where a gradient is zero; in float16 that is zero, too.
    """
    import torch

    said = config.get("dtype") or config.get("torch_dtype")
    dtype = run_dtype(stored, SimpleNamespace(dtype=getattr(torch, str(said), None)), options)
    if dtype == torch.float16 and not {"adam_epsilon", "optim"} & arguments.keys():
        if options.dtype != "auto":
            what = "in float16 Adam's epsilon is zero: the first weight without a gradient would be NaN"
            raise OptionsError(what, "pass --dtype float32, or bfloat16")
        note(f"{stored.path} is stored in float16, in which Adam fails: trained in float32, written in float16")
        return replace(options, dtype="float32")
    if dtype == torch.bfloat16:
        note("trained in bfloat16, which drops steps of less than 1/256 of a weight: --dtype float32 keeps them")
    return options


def read_arguments(file: Path) -> dict[str, Any]:
    """Further TrainingArguments from a YAML file. Raises OptionsError for what cannot be read or is not known."""
    import transformers
    import yaml

    hint = "write names and values, such as lr_scheduler_type: cosine"
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise OptionsError(f"cannot read --training-args {file}: {first_line(error)}", hint) from error
    if not isinstance(value, dict):
        raise OptionsError(f"{file} holds a {type(value).__name__}, expected names and values", hint)
    known = {each.name for each in fields(transformers.TrainingArguments) if each.init}
    for name in value:
        if name in OWN_ARGUMENTS:
            raise OptionsError(f"{file} sets {name}", f"pass {OWN_ARGUMENTS[name]} instead")
        if name in REFUSED_ARGUMENTS or str(name).startswith(PUBLISHING):
            reason = REFUSED_ARGUMENTS.get(name, "finetune uploads nothing")
            raise OptionsError(f"{file} sets {name}: {reason}", "leave it out")
        if name not in known:
            raise OptionsError(f"{file} sets {name!r}, which transformers' TrainingArguments does not have", hint)
    return value


def _examples(job: Job, network: Any) -> Examples:
    """The records of the data as examples of the model. Raises DataError, and OptionsError for one without a loss."""
    if "MaskedLM" in type(network).__name__:
        what = f"{job.base.path} is a {type(network).__name__}, whose labels would be what it is shown"
        raise OptionsError(what, "train a model that predicts the next token, or an encoder-decoder")
    _check_smoothing(job, network)
    has_media = job.records.has_media
    if not has_media and network.get_output_embeddings() is None and not writes_samples(job.config):
        what = f"{job.base.path} is a {type(network).__name__}, which has no output layer over its vocabulary"
        raise OptionsError(what, "train classifiers and encoders alone with transformers; patch takes what comes of it")
    folder = processor_folder(job.base.path, job.base.path, has_media)
    encoder = load_encoder(folder, job.base.path, has_media, job.options)
    length = min(job.options.seq_len, most_tokens(job.base, job.config, job.options))
    examples = encode_examples(job.records, encoder, length, media_token_ids(network))
    check_ids(examples.tokens, network)
    return examples


def _check_smoothing(job: Job, network: Any) -> None:
    """The Trainer's label smoothing shifts the labels of some classes alone. Raises OptionsError for another one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = type(network).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if job.arguments.get("label_smoothing_factor") and not (known or network.config.is_encoder_decoder):
        what = f"label_smoothing_factor would train {type(network).__name__} on the token that it is shown"
        raise OptionsError(what, "leave it out of --training-args")


def plan_of(job: Job, network: Any, examples: Examples, output: Path, arguments: Any) -> FinetunePlan:
    """What is trained and what it takes, of a network that may be without memory. Raises OptionsError."""
    options = job.options
    names = choose(network, trainable_in(job, network), options.last_layers)
    if job.importance is not None:
        names = [name for name in names if name in job.importance.digests]
        if not names:
            what = f"{job.importance.path} has no scores of what is to be trained"
            raise OptionsError(what, "see --trainable and --last-layers")
    numel = trained_numel(network, names)
    trained, parameters = numel, named_parameters(network)
    if options.method == "dowser":
        trained = sum(count_kept(options.update_ratio, parameters[name].numel()) for name in names)
    if not trained:
        raise OptionsError(f"--update-ratio {options.update_ratio:g} leaves no entry to train", "the paper's is 0.1")
    entries = sum(parameter.numel() for parameter in network.parameters())
    refuse_outside_steps(options.method, arguments.optim)
    dtype = run_dtype(job.base, network.config, options)
    size = dtype.itemsize
    with refused_arguments(job):
        optimiser, held = optimiser_bytes(arguments, network, [parameters[name].shape for name in names], dtype)
    batches = _batches(len(examples.inputs), options, drop_last=bool(job.arguments.get("dataloader_drop_last")))
    steps = options.steps or math.ceil(options.epochs * batches)
    return FinetunePlan(
        output=path_text(output),
        method=options.method,
        parameters=len(names),
        entries=trained,
        of_entries=entries,
        examples=len(examples.inputs),
        tokens=examples.num_tokens,
        learnt_tokens=examples.learnt,
        steps=steps,
        memory=memory_of(
            options.method, entries * size, numel, size, held, puts_back=optimiser not in KEEPS_WITHOUT_GRADIENT
        ),
        write_bytes=job.base.nbytes,
        uncounted="" if held is not None else name_of(arguments.optim),
    )


def _batches(examples: int, options: FinetuneOptions, *, drop_last: bool) -> int:
    """Steps of an epoch. Raises OptionsError for data that fill no batch, where such are dropped."""
    each = options.batch_size * launched().size
    if drop_last and examples < each:
        what = f"{examples} records fill no batch of {each}, and dataloader_drop_last drops such"
        raise OptionsError(what, "pass a smaller --batch-size, or leave it out of --training-args")
    batches = examples // each if drop_last else -(-examples // each)
    return -(-batches // options.gradient_accumulation)


def trainable_in(job: Job, network: Any) -> tuple[str, ...]:
    """The globs of --trainable by the names of the loaded model, where they are of the checkpoint's or of a tied table.

    A report has the checkpoint's names, which multimodal models change when they are loaded. Raises OptionsError for a
    part of what is trained as a whole.
    """
    own, tied = named_parameters(network), aliases(network)
    known = {unwrapped(name): unwrapped(of) for name, of in tied.items()}
    pieces: dict[str, list[str]] = {}  # checkpoint tensors that become one parameter
    if job.options.trainable:
        for stored, name in expected_names(network, job.base.tensors).items():
            known[stored] = unwrapped(tied.get(name, name))
            pieces.setdefault(unwrapped(name), []).append(stored)
    found: list[str] = []
    for glob in job.options.trainable:
        others = [known[name] for name in known if fnmatchcase(name, glob) and known[name] in own]
        found += [glob] if any(fnmatchcase(name, glob) for name in own) or not others else others
    for name in dict.fromkeys(found):
        whole = pieces.get(name, [])
        left = [each for each in whole if not matches(each, job.options.trainable, ())]
        if len(whole) > 1 and left and not matches(name, job.options.trainable, ()):
            what = f"--trainable names a part of {name}, which is trained as a whole; {left[0]} is in it, too"
            raise OptionsError(what, f"name the whole: --trainable '{name}'")
    return tuple(dict.fromkeys(found))


def train(job: Job, network: Any, examples: Examples, work: Path, progress: bool, started: float) -> dict[str, Any]:
    """Train, save the model into ``work``/final, and give the facts about it; ``started`` is when the run began.

    Raises NumericalError where the loss or the gradients are no numbers; the last good state is kept.
    """
    import torch

    from tailorcli.models.calling import quiet_transformers
    from tailorcli.training.trainer import AlreadyTrained, GuardedTrainer, NotANumber, guard_of

    padding = getattr(network.config.get_text_config(), "pad_token_id", None)
    used = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with quiet_transformers(), kept_random_numbers(used):  # a Trainer seeds all of them
        with refused_arguments(job):
            arguments = training_arguments(job, work)
            padding = padding if isinstance(padding, int) and padding >= 0 else 0
            trainer = GuardedTrainer.of(network, arguments, examples.inputs, padding)
        tuning = _tuning(job, trainable_in(job, network)).attach(trainer)
        guard = guard_of(trainer, work, progress)
        state = last_state(work)
        try:
            with states_written(work), refused_arguments(job, lambda: guard.has_begun):
                with suppress(AlreadyTrained):
                    trainer.train(resume_from_checkpoint=None if state is None else str(state))
                trainer.save_model(str(work / FINAL))
        except NotANumber as error:
            kept = trainer.keep_last_good()
            where = f"the last good state, of step {kept[0]}, is {kept[1]}" if kept else "no state was saved before it"
            slower = "start anew with a lower --learning-rate"
            slower += "" if job.options.dtype == "float32" else " or --dtype float32"
            how = f"remove {work} and {slower}" if kept else slower
            raise NumericalError(f"{error.what} in step {error.step}: {where}", how) from None
        finally:
            guard.close()
    cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    log = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    facts = {
        "base": path_text(job.base.path),
        "method": job.options.method,
        "trained": tuning.names,
        "unscored": tuning.unscored,
        "examples": len(examples.inputs),
        "tokens": examples.num_tokens,
        "learnt_tokens": examples.learnt,
        "steps": trainer.state.global_step,
        "losses": log,
        "seconds": perf_counter() - started,
        "peak_memory_bytes": peak_memory(),
        "peak_cuda_bytes": cuda,
    }
    if launched().first:
        write_text_atomically(work / FINAL / FACTS, json.dumps(facts, indent=1) + "\n")
    return facts


def training_arguments(job: Job, work: Path) -> Any:
    """The TrainingArguments of a run, which may refuse what they are given."""
    from transformers import TrainingArguments

    made = TrainingArguments(**_arguments(job, work))
    if made.n_gpu > 1:  # of one process: the Trainer would split each batch over all devices, unlike the plan
        made._n_gpu = 1
    return made


@contextmanager
def refused_arguments(job: Job, has_begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Raise OptionsError where transformers refuses what --training-args says, which it does late in part.

    What goes wrong after training ``has_begun`` is no matter of arguments, nor is anything where there are none.
    """
    import torch

    try:
        yield
    except (TypeError, ValueError, ImportError, AttributeError, KeyError, RuntimeError) as error:
        if not job.arguments or has_begun() or isinstance(error, torch.OutOfMemoryError):
            raise
        what = f"transformers refuses these TrainingArguments: {first_line(error)}"
        raise OptionsError(what, "see --training-args") from error


def _tuning(job: Job, trainable: Sequence[str]) -> SparseTuning:
    from tailorcli.training.sparse import SparseTuning

    options = job.options
    made = SparseTuning(
        options.method,
        importance=None if job.importance is None else job.importance.path,
        update_ratio=options.update_ratio,
        trainable=trainable,
        last_layers=options.last_layers,
        accumulate=options.accumulate,
        strength=options.strength,
        round_steps=options.round_steps,
        seed=options.seed,
    )
    made._is_of_base = True  # by the base's fingerprint, which _open has compared
    return made


def _arguments(job: Job, work: Path) -> dict[str, Any]:
    """All of TrainingArguments that are set."""
    import torch

    cpu = job.options.device == "cpu" or not torch.cuda.is_available()
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 10, "logging_first_step": True}
    saving = {"save_strategy": "steps", "save_total_limit": 2}
    made = {"optim": "adamw_torch", "remove_unused_columns": False, "dataloader_pin_memory": not cpu, "use_cpu": cpu}
    own = {"output_dir": str(work), "logging_nan_inf_filter": False}
    return quiet | saving | made | job.arguments | job.options.trainer_arguments() | own
