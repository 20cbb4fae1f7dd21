"""Distillation into the kept entries: its loss, its steps, what moves and what does not."""

import copy
import math
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from helpers import bits, make_model, perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.core.distillation import adam_step_, divergence, kept_accuracy, rate_at
from tailorcli.errors import CheckpointError, DataError, NumericalError, TailorError
from tailorcli.models.places import Place, map_names
from tailorcli.options import DistillOptions
from tailorcli.training.activations import blocks_of, checkpointed
from tailorcli.training.distill import (
    NEW,
    RETAINED,
    Material,
    before_response,
    distill,
    kept_shares,
    mean_of,
    step_losses,
)
from tailorcli.training.entries import Trained, entries_of, positions_in
from tailorcli.training.teachers import (
    Teacher,
    check_head,
    hidden_states,
    loss,
    predicted,
    require_known_logits,
    teach,
)

CPU = torch.device("cpu")


def samples(count=20, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(2, 97, (1, length), generator=generator)} for _ in range(count)]


def trained_of(network, tuned):
    """Every parameter of ``network``, with a random mask and tuned's values in it."""
    generator = torch.Generator().manual_seed(0)
    other = dict(tuned.named_parameters())
    entries = []
    for name, parameter in network.named_parameters():
        mask = torch.rand(parameter.shape, generator=generator) < 0.3
        values = other[name].detach()[mask]
        entries.append(entries_of(name, Place((name,)), parameter.detach(), mask, values, CPU))
    return Trained(network, entries)


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 9), size=st.integers(2, 20))
@settings(max_examples=30, deadline=None)
def test_the_divergence_is_kl_in_nats(seed, tokens, size):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(tokens, size, generator=generator) * 5 for _ in range(2))
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(divergence(teacher, student).double(), expected, rtol=1e-4, atol=1e-6)
    assert bool((divergence(teacher, teacher).abs() < 1e-6).all())


def test_further_tokens_of_a_student_take_their_share_of_its_probability():
    teacher, student = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.3, 0.2, 0.5]])
    found = divergence(teacher.log(), student.log())  # 0.6 log 2 + 0.4 log 2
    assert float(found) == pytest.approx(math.log(2))


def test_kept_accuracy_is_the_teachers_own_of_the_students_choices():
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    kept, whole = kept_accuracy(p.log(), torch.tensor([[1.0, 2.0, 0.0, 9.0], [0.0, 2.0, 1.0, 0.0]]))
    assert float(whole) == pytest.approx(1.1)
    assert float(kept) == pytest.approx(0.3 + 0.5)
    assert all(float(part) == pytest.approx(1.1) for part in kept_accuracy(p.log(), p))


def test_a_step_is_that_of_torchs_adam():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=generator)
    theirs = torch.nn.Parameter(values.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.01)
    first, second = torch.zeros(50), torch.zeros(50)
    for step in range(1, 6):
        gradient = torch.randn(50, generator=generator)
        gradient[:10] *= 1e-8  # where the smallest spread decides
        theirs.grad = gradient.clone()
        optimizer.step()
        adam_step_(values, gradient, first, second, step, 0.01)
    torch.testing.assert_close(values, theirs.detach(), rtol=1e-5, atol=1e-7)


def test_the_rate_goes_up_and_then_down_to_nothing():
    rates = [rate_at(step, 20, 4) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.1


@pytest.mark.parametrize(
    ("held", "part", "transposed"),
    [
        (lambda t: t, None, False),
        (lambda t: torch.stack([t - 100, t - 200, t, t - 300]), 2, False),
        (lambda t: torch.stack([t.T - 100, t.T - 200, t.T, t.T - 300]), 2, True),
        (lambda t: torch.cat([t - 100, t]), None, False),  # gate and up in one
        (lambda t: torch.stack([torch.cat([t - 100, t - 200]), torch.cat([t - 300, t])]), 1, False),  # of each expert
    ],
)
def test_entries_are_found_in_the_parameter_that_holds_their_tensor(tmp_path, held, part, transposed):
    tensor = torch.arange(40.0).view(2, 20)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    parameter = held(tensor).contiguous()
    with Checkpoint.open(tmp_path) as checkpoint:
        place = map_names(checkpoint, {"p": parameter}, {}, {"w": "p"})["w"]
    assert (place.parameters, place.part, place.transposed) == (("p",), part, transposed)
    kept = torch.tensor([0, 4, 19, 20, 37])
    assert torch.equal(parameter.reshape(-1)[positions_in(place, (2, 20), kept)], tensor.reshape(-1)[kept])


def test_entries_start_where_the_patch_has_them_and_their_unit_is_how_far_it_moved_them():
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    mask, values = torch.tensor([[True, False], [True, True]]), torch.tensor([4.0, 3.0, 8.001])
    found = entries_of("w", Place(("p",)), base, mask, values, CPU)
    assert (found.parameter, found.positions.tolist(), found.stored) == ("p", [0, 2, 3], torch.bfloat16)
    assert torch.equal(found.values, values)
    assert found.scale == pytest.approx(math.sqrt((3**2 + 0 + 4.001**2) / 3))
    for start, dtype in ((2**31 - 5, torch.int32), (2**31 - 4, torch.int64)):
        far = entries_of("w", Place(("p",), start=start), base, mask, values, CPU)
        assert (far.positions.dtype, far.positions.tolist()) == (dtype, [start, start + 2, start + 3])


def test_a_network_holds_the_values_of_its_entries_and_leaves_their_gradients_alone():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    base, values = torch.zeros(2, 2, dtype=torch.bfloat16), torch.tensor([1.001, 2.0, -3.0, 0.5])
    each = entries_of("w", Place(("0.weight",)), base, torch.ones(2, 2, dtype=torch.bool), values.clone(), CPU)
    trained = Trained(network, [each])
    weight, x = network[0].weight, torch.tensor([[1.0, 10.0]])
    assert torch.equal(weight.detach().flatten(), values)
    for _ in range(2):  # both losses of a step
        network(x).sum().backward()
    once = network[1].weight.detach().sum(0)  # of each of the first layer's outputs
    torch.testing.assert_close(each.gradient.view(2, 2), 2 * once[:, None] * x)
    assert all(parameter.grad is None for parameter in network.parameters())
    saved = trained.values()
    trained.step(1, 0.5)
    assert not torch.equal(weight.detach().flatten(), values)
    trained.set_values(saved)
    assert torch.equal(saved["values w"], values.bfloat16())  # as they will be written
    assert torch.equal(weight.detach().flatten(), values.bfloat16().float())
    trained.close()
    network(x).sum().backward()
    assert weight.grad is not None
    assert not each.gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_only_kept_entries_move_and_their_gradient_is_the_whole_ones_part(dtype, tied):
    base, tuned = make_model(tied=tied).to(dtype), perturb(make_model(tied=tied)).to(dtype)
    before = {name: value.detach().clone() for name, value in base.named_parameters()}
    teacher = teach(tuned, samples(4), CPU, lambda _: None)
    batch = {"input_ids": torch.cat([s["input_ids"] for s in samples(4)])}
    states = torch.stack(teacher.states)
    plain = copy.deepcopy(base)
    trained = trained_of(base, tuned)
    for (_, mine), (_, other) in zip(base.named_parameters(), plain.named_parameters(), strict=True):
        other.data.copy_(mine.data)
    wanted = predicted(batch, ())
    loss(base, teacher, batch, states, wanted, grad=True).backward()
    loss(plain, teacher, batch, states, wanted, grad=True).backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    whole = dict(plain.named_parameters())
    for each in trained.entries:
        expected = whole[each.parameter].grad.reshape(-1)[each.positions].float()
        torch.testing.assert_close(each.gradient, expected, rtol=1e-4, atol=1e-6)
    trained.step(1, 0.5)
    for name, value in base.named_parameters():
        moved = torch.zeros(value.numel(), dtype=torch.bool)
        for each in trained.entries:
            if each.parameter == name:
                moved[each.positions] = True
        assert bits(value.detach().reshape(-1)[~moved]) == bits(before[name].reshape(-1)[~moved])
        assert not torch.equal(value.detach(), before[name])


def test_the_loss_is_the_mean_over_predicted_tokens_however_it_is_cut(monkeypatch):
    base, tuned = make_model(), perturb(make_model())
    data = samples(3)
    teacher = teach(tuned, data, CPU, lambda _: None)
    batch = {"input_ids": torch.cat([s["input_ids"] for s in data])}
    with torch.no_grad():
        p, q = (m(**batch).logits.double().log_softmax(-1) for m in (tuned, base))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    states = torch.stack(teacher.states)
    for nbytes in (1 << 28, 4 * 100 * 5, 1):  # all tokens at once, five, and one, which fits whatever it takes
        monkeypatch.setattr("tailorcli.training.teachers.CPU_LOGITS_BYTES", nbytes)
        found = float(loss(base, teacher, batch, states, predicted(batch, ()), grad=False).detach())
        assert found == pytest.approx(expected, rel=1e-4)
    wanted = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    expected = float((p.exp() * (p - q)).sum(-1)[wanted].mean())
    for grad in (False, True):
        assert float(loss(base, teacher, batch, states, wanted, grad).detach()) == pytest.approx(expected, rel=1e-4)
        assert float(loss(base, teacher, batch, states, wanted & False, grad).detach()) == 0.0


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_activations_that_are_worked_out_again_give_the_same_gradients(family, monkeypatch):
    base, tuned = (change(student_of(family)) for change in (lambda model: model, perturb))
    data = samples(4) if family != "t5" else [s | {"decoder_input_ids": s["input_ids"]} for s in samples(4)]
    teacher = teach(tuned, data, CPU, lambda _: None)
    batch = {name: torch.cat([s[name] for s in data]) for name in data[0]}
    trained, found, ran = trained_of(base, tuned), [], []
    for block in blocks_of(base).values():
        block.register_forward_hook(lambda *_: ran.append(1))
    for most in (1 << 40, 0):
        monkeypatch.setattr("tailorcli.training.activations.CPU_MOST_BYTES", most)
        with checkpointed(base, 48) as again:
            loss(base, teacher, batch, torch.stack(teacher.states), predicted(batch, ()), grad=True).backward()
        assert again == (most == 0)
        found.append([each.gradient.clone() for each in trained.entries])
        [each.gradient.zero_() for each in trained.entries]
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
    assert any(bool(gradient.any()) for gradient in found[0])
    assert "forward" not in vars(next(iter(blocks_of(base).values())))


def student_of(family):
    """A model with dropout in it, which is off: it is not in training mode."""
    import transformers

    if family != "t5":
        return make_model(family).eval()
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=100, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, dropout_rate=0.5, use_cache=False
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def test_the_losses_gradient_is_that_of_the_whole_expression_however_it_is_cut(monkeypatch):
    base, tuned = make_model(), perturb(make_model())
    for model in (base, tuned):
        model.lm_head = torch.nn.Linear(32, 100)  # with a bias
    base, tuned = base.double(), tuned.double()
    data = samples(3)
    teacher = teach(tuned, data, CPU, lambda _: None)
    batch = {"input_ids": torch.cat([s["input_ids"] for s in data])}
    with torch.no_grad():
        p = tuned(**batch).logits.log_softmax(-1)
    q = base(**batch).logits.log_softmax(-1)
    (p.exp() * (p - q)).sum(-1).mean().backward()
    expected = {name: parameter.grad for name, parameter in base.named_parameters()}
    monkeypatch.setattr("tailorcli.training.teachers.CPU_LOGITS_BYTES", 4 * 100 * 5)
    base.zero_grad()
    loss(base, teacher, batch, torch.stack(teacher.states), predicted(batch, ()), grad=True).backward()
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kept", [("lm_head.bias",), ("lm_head.weight", "lm_head.bias"), ("model.norm.weight",)])
def test_gradients_are_those_of_the_whole_where_few_parameters_are_trained(kept):
    """As in a patch of the output layer alone: nothing before it has a gradient."""
    base, tuned = make_model(), perturb(make_model())
    for model in (base, tuned):
        model.lm_head = torch.nn.Linear(32, 100)
    teacher, batch = teach(tuned, samples(1), CPU, lambda _: None), samples(1)[0]
    grads = []
    for wanted in ({name for name, _ in base.named_parameters()}, kept):
        for name, parameter in base.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(name in wanted)
        (2 * loss(base, teacher, batch, torch.stack(teacher.states), predicted(batch, ()), grad=True)).backward()
        grads.append({name: parameter.grad for name, parameter in base.named_parameters()})
    for name, found in grads[1].items():
        assert (found is not None) == (name in kept)
        assert found is None or torch.equal(found, grads[0][name])


def test_tensors_that_share_a_parameter_have_their_own_entries_of_it():
    network, half = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False)), torch.zeros(2, 3)
    masks = [torch.tensor([[True, False, True], [False] * 3]), torch.tensor([[False, True, True], [True] * 3])]
    values = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0, 6.0, 7.0])]
    entries = [
        entries_of(name, Place(("0.weight",), start=start), half, mask, value, CPU)
        for name, start, mask, value in zip("ab", (0, 6), masks, values, strict=True)
    ]
    before = network[0].weight.detach().clone()
    trained = Trained(network, entries)
    wanted = before.where(~torch.cat(masks), 0.0).flatten()
    wanted[torch.cat(masks).flatten()] = torch.cat(values)
    assert torch.equal(network[0].weight.detach().flatten(), wanted)
    network(torch.tensor([[1.0, 10.0, 100.0]])).sum().backward()
    assert [each.gradient.tolist() for each in entries] == [[1, 100], [10, 100, 1, 10, 100]]
    assert trained.values().keys() == {"values a", "values b"}


def test_gradients_of_many_pieces_are_summed_wider_than_bfloat16(monkeypatch):
    """Of 600 equal summands bfloat16 holds no more than some 256."""
    found = []
    for nbytes in (1 << 28, 1):
        monkeypatch.setattr("tailorcli.training.teachers.CPU_LOGITS_BYTES", nbytes)
        base, tuned = make_model().bfloat16(), perturb(make_model()).bfloat16()
        batch = {"input_ids": torch.full((1, 600), 5)}
        teacher = teach(tuned, [batch], CPU, lambda _: None)
        loss(base, teacher, batch, torch.stack(teacher.states), predicted(batch, ()), grad=True).backward()
        found.append(base.lm_head.weight.grad.float())
    assert float((found[0] - found[1]).norm()) < 0.05 * float(found[0].norm())


def test_hidden_states_are_had_without_logits_of_all_tokens():
    network, seen = make_model(), []
    network.lm_head.register_forward_hook(lambda _, args, output: seen.append(output.shape))
    assert hidden_states(network, samples(1)[0]).shape == (1, 12, 32)
    assert seen == [(1, 1, 100)]


def test_placeholders_of_pictures_are_context():
    ids = torch.tensor([[5, 9, 9, 6, 7]])
    assert predicted({"input_ids": ids}, (9,)).tolist() == [[False, False, True, True, True]]
    assert predicted({"input_ids": ids}, (9, 6)).tolist() == [[False, False, False, True, True]]
    for ends in ((7, 8), (8, 7)):
        assert predicted({"input_ids": ids}, (), ends).tolist() == [[True, True, True, True, False]]


def test_what_ends_an_answer_counts():
    """Of a response its tokens, each told by the position before it, and what is told behind the last one."""
    response = torch.tensor([[False, True, False, True, True], [True, True, False, False, False]])
    wanted = [[True, False, True, True, True], [True, False, False, False, False]]
    assert before_response(response).tolist() == wanted
    data = [{"input_ids": torch.tensor([[5, 9, 9, 6, 7]])}] * 2
    found = Material(data, Teacher([], None), [], [], [response[:1], response[1:]])
    assert found.counted([0, 1], (9,)).tolist() == [[False, False, True, True, True], [False] * 5]
    ended = Material(data, Teacher([], None, [7]), [], [])
    assert ended.counted([0], ()).tolist() == [[True, True, True, True, False]]  # behind the end comes nothing


def test_a_tenth_is_held_out_and_the_rest_comes_in_a_new_order_each_time_round():
    def split(count, **how):
        return Material.split(samples(count), Teacher([], None), DistillOptions(batch_size=1, **how))

    def held(material):
        return sorted(place for batch in material.held for place in batch)

    for count, wanted in ((2, 1), (4, 1), (20, 2), (30, 3)):
        found = split(count)
        trained = [place for step in found.train for batch in step for place in batch]
        assert len(held(found)) == wanted
        assert sorted([*held(found), *trained]) == list(range(count))
    assert len({tuple(held(split(20, seed=seed))) for seed in range(4)}) > 1
    found = split(20)
    rounds = [[found.batches(18 * turn + step, seed) for step in range(18)] for seed in (0, 1) for turn in (0, 1)]
    assert all(sorted(one) == sorted(found.train) for one in rounds)
    assert all(one != other for one, other in combinations(rounds, 2))
    with pytest.raises(DataError, match="two samples"):
        split(1)


def test_what_is_held_out_weighs_by_its_tokens_and_a_teacher_keeps_all_of_itself():
    base, tuned = make_model().eval(), perturb(make_model(), scale=0.1).eval()
    data = [sample for length in (4, 9) for sample in samples(1, length, seed=length)]
    tuned.generation_config.eos_token_id = 98
    teacher = teach(tuned, data, CPU, lambda _: None)
    material = Material(data, teacher, [], [[0], [1]])
    with torch.no_grad():
        logits = [[network(**sample).logits[0] for network in (tuned, base)] for sample in data]
    expected = torch.cat([divergence(*pair) for pair in logits]).mean()  # of 13 tokens
    assert material.held_out_loss(base, (), CPU) == pytest.approx(float(expected), rel=1e-4)
    kept, whole = (sum(float(kept_accuracy(*pair)[part]) for pair in logits) for part in (0, 1))
    assert material.kept_share(base, (), CPU) == pytest.approx(kept / whole, rel=1e-5)
    assert kept < 0.999 * whole
    assert material.kept_share(tuned, (), CPU) == pytest.approx(1.0)
    assert [*teacher.ends] == [98]
    with torch.no_grad():
        tuned.lm_head.weight.zero_()  # the teacher stays what it was, whatever becomes of its network
    torch.testing.assert_close(teacher.head(teacher.states[0]), logits[0][0])


class Recorded:
    """Entries whose only value is the number of the steps that they took."""

    def __init__(self):
        self.network, self.entries, self.rates, self.left = make_model(), [], [], None

    def step(self, number, rate):
        self.rates.append(rate)
        assert number == len(self.rates)

    def values(self):
        return {"steps": len(self.rates)}

    def set_values(self, values):
        self.left = values["steps"]


def test_the_course_of_a_run(monkeypatch):
    """Two of 40 steps of warming up, an evaluation every second, the end five evaluations after the best."""
    seen = iter([([1.0], 1.0), ([2.0], 0.5), ([1.0], 0.9), *[([5.0], 5.0)] * 4])  # new + 3 * retained: 4, 3.5, 3.7, 20
    each = SimpleNamespace(share=1.0, most_tokens=1)
    by_number = lambda *given: {NEW: given[-1] + 0.0, RETAINED: 2.0 * given[-1]}  # noqa: E731
    monkeypatch.setattr("tailorcli.training.distill.step_losses", by_number)
    monkeypatch.setattr("tailorcli.training.distill.held_out", lambda *_: next(seen))
    trained = Recorded()
    found = distill(trained, {NEW: each, RETAINED: each}, DistillOptions(steps=40, rate=0.5, weight=3.0), CPU)
    assert (found.steps, found.best, trained.left) == ([0, 2, 4, 6, 8, 10, 12], 2, 2)
    assert trained.rates == pytest.approx([0.25, 0.5, *(0.5 * (41 - step) / 39 for step in range(3, 13))])
    assert found.trained_new == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5]
    assert found.trained_retained == [1.0, 5.0, 9.0, 13.0, 17.0, 21.0]


def test_a_loss_that_is_no_number_ends_a_run(monkeypatch):
    each = SimpleNamespace(share=1.0, most_tokens=1)
    monkeypatch.setattr("tailorcli.training.distill.step_losses", lambda *_: {NEW: math.inf, RETAINED: 0.0})
    monkeypatch.setattr("tailorcli.training.distill.held_out", lambda *_: ([1.0], 1.0))
    with pytest.raises(NumericalError, match="the new loss is inf in steps 1 to 2"):
        distill(Recorded(), {NEW: each, RETAINED: each}, DistillOptions(steps=40), CPU)


def test_of_several_tasks_the_least_is_told():
    of = {f"{NEW} 1": 0.9, f"{NEW} 2": 0.6, RETAINED: 0.8}
    materials = {kind: SimpleNamespace(kept_share=lambda *_, share=share: share) for kind, share in of.items()}
    assert kept_shares(None, materials, (), CPU) == {"old": 0.8, "new": 0.6}


def test_training_brings_the_patch_nearer_to_both_teachers():
    base, tuned = make_model(), perturb(make_model(), scale=0.05)
    new, old = samples(20, seed=1), samples(20, seed=2)
    options = DistillOptions(steps=20, rate=0.1, batch_size=4)
    materials = {
        "new": Material.split(new, teach(tuned, new, CPU, lambda _: None), options),
        "retained": Material.split(old, teach(base, old, CPU, lambda _: None), options),
    }
    trained = trained_of(base, tuned)
    history = distill(trained, materials, options, CPU)
    objective = [a + b for a, b in zip(history.new, history.retained, strict=True)]
    assert history.steps == list(range(21))
    assert min(objective) == objective[history.steps.index(history.best)] < 0.9 * objective[0]
    now = [materials[kind].held_out_loss(base, (), CPU) for kind in ("new", "retained")]
    assert sum(now) == pytest.approx(min(objective), rel=1e-5)  # the best state is left in it


def test_it_stops_early_where_the_held_out_loss_rises_and_keeps_the_best_state():
    base, tuned = make_model(), perturb(make_model(), scale=0.05)
    new, old = samples(6, seed=1), samples(6, seed=2)
    options = DistillOptions(steps=60, rate=50.0, batch_size=4)
    materials = {
        "new": Material.split(new, teach(tuned, new, CPU, lambda _: None), options),
        "retained": Material.split(old, teach(base, old, CPU, lambda _: None), options),
    }
    trained = trained_of(base, tuned)
    start = [each.values.clone() for each in trained.entries]
    history = distill(trained, materials, options, CPU)
    assert history.best == 0
    assert history.steps[-1] < 60
    assert all(torch.equal(each.values, value) for each, value in zip(trained.entries, start, strict=True))


def test_a_run_that_goes_on_ends_as_one_that_was_never_broken_off():
    def run(stop=None, state=None):
        base, tuned = make_model(), perturb(make_model(), scale=0.05)
        new, old = samples(10, seed=1), samples(10, seed=2)
        options = DistillOptions(steps=12, rate=0.1, batch_size=4)
        materials = {
            "new": Material.split(new, teach(tuned, new, CPU, lambda _: None), options),
            "retained": Material.split(old, teach(base, old, CPU, lambda _: None), options),
        }
        trained = trained_of(base, tuned)
        saved = {}

        def save(step, history, best):
            saved[step] = (copy.deepcopy(history), best, {n: v.clone() for n, v in trained.state().items()})
            if step == stop:
                raise KeyboardInterrupt

        more = {}
        if state is not None:
            step, (history, best, values) = state
            trained.load(values)
            more = {"start": step, "history": history, "best": best}
        try:
            distill(trained, materials, options, CPU, save=save, **more)
        except KeyboardInterrupt:
            return saved
        return {name: bits(value.detach()) for name, value in base.named_parameters()}

    broken = run(stop=6)
    assert run(state=(6, broken[6])) == run()


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "granite", "cohere", "falcon-h1", "recurrent-gemma", "t5"])
def test_logits_are_the_models_own(family):
    import transformers

    small = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    if family == "gpt2":
        network = make_model("gpt2")
    elif family == "gemma2":
        config = transformers.Gemma2Config(**small, head_dim=8, final_logit_softcapping=0.5)
        network = transformers.Gemma2ForCausalLM(config)
    elif family == "granite":
        network = transformers.GraniteForCausalLM(transformers.GraniteConfig(**small, logits_scaling=7.0))
    elif family == "cohere":
        network = transformers.CohereForCausalLM(transformers.CohereConfig(**small, logit_scale=0.3))
    elif family == "falcon-h1":
        states = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
        config = transformers.FalconH1Config(**small, **states, lm_head_multiplier=0.02)
        network = transformers.FalconH1ForCausalLM(config)
    elif family == "recurrent-gemma":
        config = transformers.RecurrentGemmaConfig(
            **small, head_dim=8, lru_width=32, block_types=["recurrent", "attention"], logits_soft_cap=0.5
        )
        network = transformers.RecurrentGemmaForCausalLM(config)
    else:
        config = transformers.T5Config(vocab_size=50, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
        network = transformers.T5ForConditionalGeneration(config)
    ids = torch.randint(2, 50, (1, 7))
    batch = {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})
    check_head(network.eval(), batch)
    assert hidden_states(network, batch).shape == (1, 7, 32)


def test_logits_are_bare_where_a_model_around_the_text_leaves_out_what_its_config_names():
    """Aya Vision leaves out the scale of Cohere's text model, PaliGemma 2 the cap of Gemma's."""
    import transformers

    torch.manual_seed(0)
    config = transformers.CohereConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, logit_scale=0.3
    )
    network = transformers.CohereForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(2, 50, (1, 7))}
    assert check_head(network, batch) is False
    network.logit_scale = 1.0  # of the class's own forward
    assert check_head(network, batch) is True
    teacher = teach(network, [batch], torch.device("cpu"), lambda _: None, bare=True)
    logits = network(**batch).logits
    torch.testing.assert_close(teacher.head(teacher.states[0]), logits[0])
    wanted = torch.ones(1, 7, dtype=torch.bool)
    assert float(loss(network, teacher, batch, teacher.states[0][None], wanted, False)) < 1e-5


def test_a_model_without_such_an_output_layer_is_refused():
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(TailorError, match="no linear output layer"):
        check_head(transformers.BertModel(config), {"input_ids": torch.ones(1, 4, dtype=torch.long)})


def test_logits_that_are_not_the_models_own_are_refused():
    wanted = torch.tensor([1.0, -2.0, 4.0])
    require_known_logits(None, wanted + 0.03, wanted)
    with pytest.raises(CheckpointError, match="in a way that is not known"):
        require_known_logits(None, wanted + 0.05, wanted)
    with pytest.raises(NumericalError, match="no numbers in float32"):
        require_known_logits(None, wanted, wanted / 0)


def gradients_of(network, materials, options):
    """The gradients of all entries after both losses of a step, with the losses."""
    trained = trained_of(copy.deepcopy(network), perturb(copy.deepcopy(network)))
    losses = step_losses(trained.network, materials, options, CPU, (), 0)
    return torch.cat([each.gradient for each in trained.entries]), {kind: float(loss) for kind, loss in losses.items()}


def test_a_step_of_samples_of_many_lengths_is_their_mean_over_all_tokens():
    base = make_model("llama").eval()
    tuned = perturb(copy.deepcopy(base)).eval()
    options = DistillOptions(batch_size=64)
    mixed = [sample for length in (4, 9, 7) for sample in samples(6, length, seed=length)]
    of = {NEW: teach(tuned, mixed, CPU, lambda _: None), RETAINED: teach(base, mixed, CPU, lambda _: None)}
    materials = {kind: Material.split(mixed, teacher, options) for kind, teacher in of.items()}
    [[_, *others]] = [materials[NEW].batches(0, 0)]
    assert others  # several lengths in one step
    gradient, found = gradients_of(base, materials, options)
    student = trained_of(copy.deepcopy(base), perturb(copy.deepcopy(base))).network
    for kind, teacher in ((NEW, tuned), (RETAINED, base)):
        places = [place for batch in materials[kind].batches(0, 0) for place in batch]
        with torch.no_grad():
            logits = [(teacher(**mixed[p]).logits[0], student(**mixed[p]).logits[0]) for p in places]
        each = torch.cat([divergence(*pair) for pair in logits])
        assert found[kind] == pytest.approx(float(each.mean()), rel=1e-4)
    assert float(gradient.abs().max()) > 0


def test_the_retained_samples_weigh_as_asked():
    base = make_model("llama").eval()
    data = samples(10)
    of = {NEW: teach(perturb(copy.deepcopy(base)).eval(), data, CPU, lambda _: None)}
    of |= {RETAINED: teach(base, data, CPU, lambda _: None)}
    options = [DistillOptions(batch_size=64, weight=weight) for weight in (1e-9, 3.0)]
    materials = {kind: Material.split(data, teacher, options[0]) for kind, teacher in of.items()}
    light, heavy = (gradients_of(base, materials, each)[0] for each in options)
    trained = trained_of(copy.deepcopy(base), perturb(copy.deepcopy(base)))
    [places] = materials[RETAINED].batches(0, 0)
    materials[RETAINED].loss(trained.network, places, (), CPU, grad=True).backward()
    alone = torch.cat([each.gradient for each in trained.entries])
    assert float(alone.norm()) > 0.01 * float(light.norm())
    torch.testing.assert_close(heavy, light + 3 * alone, rtol=1e-3, atol=1e-6)


def test_tasks_weigh_by_their_shares():
    base = make_model("llama").eval()
    teachers = [perturb(copy.deepcopy(base), seed=seed).eval() for seed in (1, 2)]
    options = DistillOptions(batch_size=4, weight=1e-9)

    def materials_with(*shares):
        found = {
            f"{NEW} {number}": Material.split(
                samples(), teach(teacher, samples(), CPU, lambda _: None), options, share=s
            )
            for number, (teacher, s) in enumerate(zip(teachers, shares, strict=True), 1)
        }
        return found | {RETAINED: Material.split(samples(), teach(base, samples(), CPU, lambda _: None), options)}

    first, second, both, uneven = (
        gradients_of(base, materials_with(*shares), options)[0] for shares in ((1, 0), (0, 1), (1, 1), (3, 1))
    )
    torch.testing.assert_close(both, (first + second) / 2, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(uneven, 0.75 * first + 0.25 * second, rtol=1e-3, atol=1e-7)
    assert mean_of([1.0, 3.0], materials_with(3, 1)) == 1.5
