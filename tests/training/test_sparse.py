"""Sparse fine-tuning on Trainers of transformers and trl: what is frozen stays the base's, bit for bit."""

import gc
from concurrent.futures import Future
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import bits, make_model, make_tokenizer, shares_moved
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from tailorcli.core import spider
from tailorcli.core.dowser import least_important
from tailorcli.errors import OptionsError
from tailorcli.training import SparseTuning
from tailorcli.training.choice import choose, in_tower
from tailorcli.training.importance import Importance, ImportanceError
from tailorcli.training.probe import probe_model
from tailorcli.training.settings import ProbeOptions
from tailorcli.training.sparse import blocks_by_parent

PROBE = ProbeOptions(num_samples=8, rademacher=2, seq_len=16)
ROWS = [{"input_ids": (row := [(3 * n + 7 * i) % 90 + 2 for i in range(12)]), "labels": row} for n in range(24)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse") / "base"
    make_model(layers=3).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def importance(base):
    probe_model(base, base.parent / "importance", PROBE)
    return base.parent / "importance"


def load(base, dtype=torch.float32):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(base, dtype=dtype)


def arguments(folder, **more):
    given = {"max_steps": 6, "learning_rate": 1e-2, "weight_decay": 0.1, "per_device_train_batch_size": 4}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    return TrainingArguments(folder, **{"save_strategy": "no"} | given | quiet | more)


def train(base, folder, tuning, dtype=torch.float32, **more):
    """A run on a plain Trainer; the parameters before and after."""
    model = load(base, dtype)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = Trainer(model, arguments(folder, **more), train_dataset=ROWS)
    tuning.attach(trainer)
    trainer.train()
    return before, {name: value.detach() for name, value in model.named_parameters()}


STATE = "spider-0.safetensors"
FROZEN = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dowser_moves_nothing_but_what_matters_least(base, importance, tmp_path, dtype, optim):
    """Weight decay is on, and Adafactor decays and scales in its own way."""
    tuning = SparseTuning("dowser", importance=importance, update_ratio=0.2)
    rate = 3.0 if optim == "sgd" else 1e-2
    before, after = train(base, tmp_path, tuning, dtype, optim=optim, learning_rate=rate)
    scores = Importance.open(importance)
    for name in before:
        if name not in scores.digests:
            assert bits(before[name]) == bits(after[name]), name
            continue
        mask = least_important(scores.read(name), 0.2)
        assert bits(before[name][~mask]) == bits(after[name][~mask]), name
        assert (before[name] != after[name])[mask].float().mean() > 0.5, name
    assert set(tuning.unscored) == {n for n in before if "norm" in n}


def test_masked_decay_is_what_the_optimiser_does_to_the_trained_entries(base, importance, tmp_path):
    """With every entry trained dowser is full fine-tuning of the same layers, decay included."""
    for optim in ("adamw_torch", "sgd"):
        everything = SparseTuning("dowser", importance=importance, update_ratio=1.0)
        _, sparse = train(base, tmp_path, everything, optim=optim)
        _, full = train(base, tmp_path, SparseTuning("full", trainable=["*_proj.weight"]), optim=optim)
        assert all(bits(sparse[name]) == bits(full[name]) for name in full)


def hooked(model, tuning, kind, **how):
    """An optimiser in whose steps a tuning takes part, without a Trainer."""
    tuning.attach(SimpleNamespace(model=model, add_callback=lambda _: None))
    optimizer = kind([parameter for parameter in model.parameters() if parameter.requires_grad], **how)
    begun = SimpleNamespace(global_step=0)
    tuning.on_train_begin(SimpleNamespace(), begun, None, optimizer=optimizer, model=model)
    return optimizer


def stepped(model, optimizer, seed, scale=1.0, skipped=False):
    """Drawn gradients of what is trained, with which the optimiser takes a step; it has them times ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    given = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            given[name] = torch.randn(parameter.shape, generator=generator)
            parameter.grad = given[name] * scale
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(skipped))
    optimizer.step()
    return given


KNOWS_DECOUPLED = "decoupled_weight_decay" in signature(torch.optim.Adam).parameters


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        (torch.optim.SGD, {}, lambda w, g: w - 0.1 * (g + 0.5 * w)),
        pytest.param(
            *(torch.optim.Adam, {"decoupled_weight_decay": True}, lambda w, g: (1 - 0.1 * 0.5) * w - 0.1 * g.sign()),
            marks=pytest.mark.skipif(not KNOWS_DECOUPLED, reason="of later versions of torch"),
        ),
    ],
    ids=["coupled", "decoupled"],
)
def test_decay_does_not_depend_on_the_scale_of_the_gradients(base, importance, kind, more, expected):
    """One step of rate 0.1 and decay 0.5, by hand; Adam's first step is the rate in the gradient's direction."""
    model = load(base)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    tuning = SparseTuning("dowser", importance=importance, update_ratio=0.2)
    optimizer = hooked(model, tuning, kind, lr=0.1, weight_decay=0.5, fused=True, **more)
    gradients = stepped(model, optimizer, 0, scale=1024.0)
    assert gradients
    after = dict(model.named_parameters())
    for name, gradient in gradients.items():
        mask = least_important(Importance.open(importance).read(name), 0.2)
        wanted = torch.where(mask, expected(before[name].double(), gradient.double()), before[name].double())
        torch.testing.assert_close(after[name].detach().double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "more", "momentum"),
    [("spider", {}, 0.85), ("spider", {"accumulate": "sum"}, 1.0), ("l2", {"strength": 0.5}, None)],
)
def test_a_scale_that_changes_and_a_step_that_is_skipped(base, method, more, momentum):
    model, tuning = load(base), SparseTuning(method, **more)
    start = {name: value.detach().clone().double() for name, value in model.named_parameters()}
    optimizer = hooked(model, tuning, torch.optim.SGD, lr=0.1, fused=True)
    first, second = (stepped(model, optimizer, seed, scale).copy() for seed, scale in ((0, 1024.0), (1, 64.0)))
    after = {name: value.detach().clone() for name, value in model.named_parameters()}
    sofar = {name: value.clone() for name, value in tuning._sofar.items()}
    stepped(model, optimizer, 2, skipped=True)
    assert all(bits(after[name]) == bits(value.detach()) for name, value in model.named_parameters())
    assert all(bits(sofar[name]) == bits(value) for name, value in tuning._sofar.items())
    for name in first:
        g, h = first[name].double(), second[name].double()
        if method == "spider":
            torch.testing.assert_close(sofar[name].double(), momentum * g + h, rtol=1e-5, atol=1e-6)
        else:  # the pull is 2 * 0.5 * (W - W_base), which is nothing in the first step
            once = start[name] - 0.1 * g
            wanted = once - 0.1 * (h + once - start[name])
            torch.testing.assert_close(after[name].double(), wanted, rtol=1e-5, atol=1e-6)


def test_spider_on_a_trainer_is_algorithm_1(base, tmp_path):
    """Five steps of plain gradient descent, by hand with the same equations in float64."""
    more = {"max_steps": 5, "optim": "sgd", "weight_decay": 0.0, "learning_rate": 0.5, "max_grad_norm": 0.0}
    more |= {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    _, after = train(base, tmp_path, SparseTuning("spider", last_layers=1), **more)
    model = load(base)
    names = choose(model, last_layers=1)
    parameters = dict(model.named_parameters())
    start = {name: parameters[name].detach().clone().double() for name in names}
    sofar = dict.fromkeys(names, 0.0)
    for step in range(5):
        model.zero_grad()
        batch = torch.tensor([row["input_ids"] for row in ROWS[4 * step : 4 * step + 4]])
        logits = model(input_ids=batch).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        for name in names:
            weight, gradient = parameters[name].detach().double(), parameters[name].grad.double()
            sofar[name] = 0.85 * sofar[name] + gradient
            learnt, general = (spider.importance(t, spider.moments(t)).double() for t in (sofar[name], start[name]))
            mask = torch.where(learnt > general, learnt / (learnt + general), 0.0)
            mask = (mask / mask[mask != 0].mean()).clamp(max=1.0)
            moved = (weight - 0.5 * gradient) * mask + start[name] * (1 - mask)
            with torch.no_grad():
                parameters[name].copy_(moved)
    for name, value in parameters.items():
        assert torch.allclose(after[name], value, rtol=1e-4, atol=1e-6), name
    found = shares_moved({n: v.float() for n, v in start.items()}, {n: after[n] for n in names})
    assert 0.2 < found["model.layers.2.mlp.up_proj.weight"] < 0.8


def test_half_moves_half_of_the_blocks_in_a_round(base, tmp_path):
    before, after = train(base, tmp_path, SparseTuning("half", round_steps=100))
    moved = {name for name, share in shares_moved(before, after).items() if share}
    groups = blocks_by_parent([name for name in before if name not in FROZEN])
    assert len(groups) == 10  # attention, feed-forward and norms of three layers, and the last norm
    for group in groups:
        trained = [set(block) <= moved for block in group]
        assert sum(trained) in (len(group) // 2, (len(group) + 1) // 2)
        assert all(set(block) <= moved or not set(block) & moved for block in group)


def test_half_draws_anew_in_every_round(base, tmp_path):
    before, after = train(base, tmp_path, SparseTuning("half"), max_steps=12)
    moved = {name for name, share in shares_moved(before, after).items() if share}
    assert moved == set(before) - set(FROZEN)


def test_half_draws_by_its_seed(base):
    found = []
    for seed in (0, 0, 1, 2):
        model = load(base)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        stepped(model, hooked(model, SparseTuning("half", seed=seed), torch.optim.SGD, lr=0.1, fused=True), 0)
        found.append({name for name, value in model.named_parameters() if not torch.equal(value, before[name])})
    assert found[0] == found[1]
    assert found[1] != found[2] != found[3]


def test_l2_stays_nearer_to_the_base_than_full(base, tmp_path):
    far = {}
    for method in ("full", "l2"):
        before, after = train(base, tmp_path, SparseTuning(method, strength=1.0), optim="sgd", max_grad_norm=0.0)
        far[method] = sum(float((after[name].detach() - before[name]).square().sum()) for name in before)
        assert all(bits(before[name]) == bits(after[name]) for name in FROZEN)
    assert 0 < far["l2"] < 0.98 * far["full"]


@pytest.mark.parametrize("method", ["spider", "half", "dowser"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(base, importance, tmp_path, method):
    given = {"importance": importance} if method == "dowser" else {}
    _, whole = train(base, tmp_path / "whole", SparseTuning(method, **given))
    saving = {"save_strategy": "steps", "save_steps": 3}
    train(base, tmp_path / "cut", SparseTuning(method, **given), **saving)
    model = load(base)
    trainer = Trainer(model, arguments(tmp_path / "cut", **saving), train_dataset=ROWS)
    SparseTuning(method, **given).attach(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert all(bits(whole[name]) == bits(value.detach()) for name, value in model.named_parameters())


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_a_checkpoint_that_is_uploaded_has_spiders_state(base, tmp_path, monkeypatch, strategy):
    uploaded = {}

    class Hub:
        def create_repo(self, name, **_):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, folder_path, path_in_repo="", **_):
            uploaded[path_in_repo] = load_file(Path(folder_path) / STATE) if path_in_repo else None
            (done := Future()).set_result(None)
            return done

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    saving = {"save_strategy": "steps", "save_steps": 3, "push_to_hub": True, "hub_strategy": strategy}
    model = load(base)
    trainer = Trainer(model, arguments(tmp_path / "run", **saving), train_dataset=ROWS)
    SparseTuning("spider").attach(trainer)
    trainer.train()
    place = "last-checkpoint" if strategy == "checkpoint" else "checkpoint-6"
    kept = load_file(tmp_path / "run" / "checkpoint-6" / STATE)
    assert uploaded[place].keys() == kept.keys() != set()
    assert all(bits(uploaded[place][name]) == bits(kept[name]) for name in kept)


def test_an_importance_of_another_base_is_refused(base, importance, tmp_path):
    model = make_model(layers=3, seed=5)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=ROWS)
    model.lm_head.requires_grad_(False)
    with pytest.raises(ImportanceError, match="another base"):
        SparseTuning("dowser", importance=importance).attach(trainer)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["lm_head.weight"]  # as it was: with another method the norms are trained
    assert any("norm" in name for name in SparseTuning("full").attach(trainer).names)


@pytest.mark.parametrize("method", ["spider", "dowser", "l2"])
def test_one_tuning_on_two_trainers_in_turn_is_two_tunings(base, importance, tmp_path, method):
    tuning = SparseTuning(method, importance=importance if method == "dowser" else None)
    runs = [train(base, tmp_path, tuning)[1] for _ in range(2)]
    assert all(bits(runs[0][name]) == bits(runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("method", ["spider", "l2"])
def test_a_second_tuning_on_one_trainer_is_refused(base, tmp_path, method):
    """As of a notebook's cell that is run twice: both would pull the weights back in every step."""
    trainer = Trainer(load(base), arguments(tmp_path), train_dataset=ROWS)
    tuning = SparseTuning(method).attach(trainer)
    with pytest.raises(OptionsError, match=f"{method} is attached to this Trainer already"):
        SparseTuning(method).attach(trainer)
    tuning.attach(trainer)
    trainer.train()
    _, once = train(base, tmp_path, SparseTuning(method))
    assert all(bits(once[name]) == bits(value.detach()) for name, value in trainer.model.named_parameters())


def test_a_masked_gradient_that_would_be_nan_in_float16_is_refused(tmp_path):
    """Adam's epsilon is zero there, but not in a fused one, which works in float32."""
    make_model(layers=1).half().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    probe_model(tmp_path / "base", tmp_path / "importance", PROBE)
    given = (tmp_path / "base", tmp_path / "run", SparseTuning("dowser", importance=tmp_path / "importance"))
    with pytest.raises(OptionsError, match="epsilon is zero"):
        train(*given, torch.float16, optim="adamw_torch")
    before, after = train(*given, torch.float16, optim="adamw_torch_fused")
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert 0 < shares_moved(before, after)["model.layers.0.mlp.up_proj.weight"] < 0.101


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "lomo", "schedule_free_adamw"])
def test_optimisers_that_move_weights_outside_of_their_steps_are_refused(base, importance, tmp_path, optim):
    trainer = Trainer(load(base), arguments(tmp_path, optim=optim), train_dataset=ROWS)
    with pytest.raises(OptionsError, match=f"optim {optim} moves weights"):
        SparseTuning("dowser", importance=importance).attach(trainer)
    SparseTuning("full").attach(trainer)


@pytest.mark.parametrize(("more", "said"), [({"is_deepspeed_enabled": True}, "DeepSpeed"), ({"model_init": 1}, "anew")])
def test_trainers_that_hold_other_weights_are_refused(more, said):
    with pytest.raises(OptionsError, match=said):
        SparseTuning("full").attach(SimpleNamespace(model=make_model(), **more))


def test_a_head_that_the_probed_base_lacks_is_not_left_at_random(base, importance, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=ROWS)
    with pytest.raises(OptionsError, match=r"a model without 'score\.weight'"):
        SparseTuning("dowser", importance=importance).attach(trainer)
    model.score.requires_grad_(False)
    assert "score.weight" not in SparseTuning("dowser", importance=importance).attach(trainer).unscored


def train_by_spider(trainer):
    SparseTuning("spider").attach(trainer)
    trainer.train()


class ScheduleFree(torch.optim.SGD):
    """As schedulefree's are: other weights in training than in use."""

    def train(self): ...

    def eval(self): ...


class Lomo(torch.optim.SGD):
    """As lomo_optim's are: backward steps."""

    def fused_backward(self, loss, lr): ...


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (ScheduleFree, "object"),
        (ScheduleFree, "class"),
        (Lomo, "object"),
        (Lomo, "class"),
        (LayerWiseDummyOptimizer, "object"),
    ],
)
def test_an_optimiser_that_moves_weights_outside_of_its_steps_is_seen_itself(base, tmp_path, kind, how):
    """Handed to the Trainer ready, or made by it when training begins."""
    network = load(base)
    given = {"optimizers": (kind(network.parameters(), lr=0.1), None)}
    if how == "class":
        given = {"optimizer_cls_and_kwargs": (kind, {"lr": 0.1})}
    trainer = Trainer(network, arguments(tmp_path), train_dataset=ROWS, **given)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    with pytest.raises(OptionsError, match=f"optim {kind.__name__} moves weights outside of its steps"):
        train_by_spider(trainer)
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())


ADAPTER = {"r": 4, "target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}


def adapted(base, folder, **more):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    network = peft.get_peft_model(load(base), peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTER | more))
    return Trainer(network, arguments(folder, weight_decay=0.0), train_dataset=ROWS)


@pytest.mark.parametrize("method", ["spider", "half", "dowser"])
def test_a_method_that_chooses_among_weights_refuses_adapters(base, importance, tmp_path, method):
    given = {"importance": importance} if method == "dowser" else {}
    with pytest.raises(OptionsError, match=f"{method} chooses among a model's own weights, and base_model.*lora_A"):
        SparseTuning(method, **given).attach(adapted(base, tmp_path))


def test_what_peft_has_copied_is_trained_as_it_was_asked_to(base, tmp_path):
    """A table of embeddings, which else is frozen; SPIDER's mask is over the copy, and its base what that began as."""
    copy = "base_model.model.model.embed_tokens.modules_to_save.default.weight"
    trainer = adapted(base, tmp_path)
    tuning = SparseTuning("full").attach(trainer)
    kinds = {name.split(".")[-3] for name in tuning.names}
    assert kinds == {"lora_A", "lora_B", "modules_to_save"}
    assert any("lm_head.lora_B" in name for name in tuning.names)
    trainer = adapted(base, tmp_path)
    tuning = SparseTuning("spider", trainable=("*modules_to_save*",)).attach(trainer)
    assert tuning.names == [copy]
    trainer.train()
    after, before = dict(trainer.model.named_parameters()), load(base).model.embed_tokens.weight
    assert 0.05 < float((after[copy] != before).double().mean()) < 0.9
    assert torch.equal(after[copy.replace("modules_to_save.default", "original_module")], before)


def test_l2_holds_an_adapter_to_where_it_began(base, tmp_path):
    far = []
    for strength in (0.0, 10.0):
        trainer = adapted(base, tmp_path)
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        tuning = SparseTuning("l2", strength=strength).attach(trainer)
        trainer.train()
        after = dict(trainer.model.named_parameters())
        far.append(sum(float((after[name].detach() - before[name]).square().sum()) for name in tuning.names))
        assert all(torch.equal(after[name], before[name]) for name in before.keys() - set(tuning.names))
    assert 0 < far[1] < far[0] / 2


def test_options_out_of_range_are_refused(importance):
    for given in (
        {"method": "dowser"},
        {"method": "full", "importance": importance},
        {"method": "dowser", "importance": importance, "update_ratio": 0.0},
        {"method": "dowser", "importance": importance, "update_ratio": 1.5},
        {"method": "none"},
        {"method": "spider", "accumulate": "mean"},
        {"method": "l2", "strength": -1.0},
        {"method": "half", "round_steps": 0},
    ):
        with pytest.raises(OptionsError):
            SparseTuning(**given)


def test_what_is_trained_is_chosen():
    model = make_model(layers=3)
    everything = [name for name, _ in model.named_parameters()]
    assert choose(model) == [name for name in everything if name not in FROZEN]
    assert choose(model, last_layers=2) == [n for n in everything if "layers.1." in n or "layers.2." in n]
    assert choose(model, ["*up_proj*", "lm_head*"], None)[-1] == "lm_head.weight"
    assert choose(model, ["*up_proj*", "lm_head*"], 1) == ["model.layers.2.mlp.up_proj.weight"]
    for given in ({"last_layers": 4}, {"trainable": ["nothing*"]}, {"trainable": ["lm_head*"], "last_layers": 1}):
        with pytest.raises(OptionsError):
            choose(model, **given)


def test_towers_are_known_and_connectors_are_none():
    towers = ("model.vision_tower.vision_model.encoder.layers.0.q.weight", "model.visual.blocks.0.attn.qkv.weight")
    for name in (*towers, "vision_model.encoder.weight", "audio_tower.conv1.weight"):
        assert in_tower(name), name
    others = ("model.visual.merger.mlp.0.weight", "model.multi_modal_projector.linear_1.weight")
    for name in (*others, "model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.weight"):
        assert not in_tower(name), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spider", "dowser", "half", "l2"])
def test_memory_is_flat_over_a_thousand_steps(base, importance, tmp_path, method):
    """What lives after a step is what lived after the one before: tensors and resident memory alike."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            if state.global_step in (100, 1000):
                gc.collect()
                tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
                seen.append((len(tensors), sum(one.nbytes for one in tensors), resident()))

    tuning = SparseTuning(method, importance=importance if method == "dowser" else None)
    trainer = Trainer(load(base), arguments(tmp_path, max_steps=1000, logging_steps=500), train_dataset=ROWS)
    tuning.attach(trainer)
    trainer.add_callback(Watch())
    trainer.train()
    (count, size, before), (later_count, later_size, after) = seen
    assert later_count <= count
    assert later_size <= size
    assert after < before + 8 * 2**20


def resident():
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
